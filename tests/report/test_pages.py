"""Pages of runs of all kinds from their files: without matplotlib, held-out examples, comparisons or a record."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from html_pages import HtmlPage, checked_page

from lora_dpo_jax.judging.comparison import Comparison, Result
from lora_dpo_jax.judging.interface import Usage
from lora_dpo_jax.judging.rates import Rate, Rates
from lora_dpo_jax.main.report import ReportConfig, main, with_named_runs
from lora_dpo_jax.report.comparison import comparison_page
from lora_dpo_jax.report.judged import judged
from lora_dpo_jax.report.page import report_page
from lora_dpo_jax.report.record import (
    Completions,
    Facts,
    HeldOut,
    Record,
    Scored,
    ShownPair,
    ShownResponse,
    Sitting,
    read_record,
    write_record,
)
from lora_dpo_jax.report.run_files import JudgeFiles, Series, read_run
from lora_dpo_jax.settings.arguments import parse

MARKUP = "</title></style></svg></pre><script>alert(1)</script>{{ 7 * 7 }}{% raw %}&lt;\u202e\x1b[0m"
SHOWN = "</title></style></svg></pre><script>alert(1)</script>{{ 7 * 7 }}{% raw %}&lt;\\u202e\\x1b[0m"
SETTINGS = f"initialize_from_hf: base\nloss: {{type: sft, note: {json.dumps(MARKUP)}}}\npeft_save_path: null\n"


@pytest.fixture(autouse=True)
def no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def folder_of(path: Path, lines: list[dict] = (), record: Record | None = None, settings: str = SETTINGS) -> Path:  # type: ignore[assignment]
    path.mkdir()
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "config.yaml").write_text(settings)
    if record is not None:
        write_record(path, record)
    return path


def page_of(*args, **kwargs) -> HtmlPage:
    return checked_page(report_page(read_run(folder_of(*args, **kwargs))))


def trained(steps: int, **metrics: float) -> list[dict]:
    return [{"step": step, "train/loss": 1 / (step + 1), **metrics} for step in range(steps)]


def held_out_of(chosen: list[int], rejected: list[int], before: list[float], after: list[float]) -> HeldOut:
    count = len(after)
    moments = Scored(0, before, before), Scored(9, after, after)  # type: ignore[arg-type]
    return HeldOut(chosen, rejected, [*range(count)], [1.0] * count, [], *moments)


FACTS = Facts(9, "pairs", 40, 4, "2 x 64", "1 x cpu", 1, {"jax": MARKUP})


def test_a_run_without_anything_but_two_files_has_a_page(tmp_path):
    page = page_of(tmp_path / "run", trained(3))
    assert "nothing was held out" in page.text and page.tables["Loss by step"][1:] == [
        ["0", "1.000"],
        ["1", "0.5000"],
        ["2", "0.3333"],
    ]
    assert not page.pictures and "pip install 'lora_dpo_jax[report]'" in page.text
    assert MARKUP.partition("\u202e")[0] in page.text, "in its settings"


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    page = page_of(tmp_path / "run", [{"step": 0, "parameter_count": 10}], Record(facts=FACTS))
    assert "has not taken a step yet" in page.text and "0 of 9 steps are done" in page.text


def test_a_run_over_answers_says_what_its_metrics_say(tmp_path):
    """Of single answers nothing is compared, so its accuracy is that of labels."""
    lines = [{"step": 0, "eval/loss": 0.6, "eval/dpo_accuracy": 0.5}, *trained(2)]
    lines.append({"step": 2, "eval/loss": 0.5, "eval/dpo_accuracy": 0.8})
    facts = dataclasses.replace(FACTS, num_steps=2, noun="answers", held_out=100)
    page = page_of(tmp_path / "run", lines, Record(facts=facts, sittings=[Sitting(0, 2, 3725.0, "2026")]))
    assert "Held-out accuracy went from 50.0% to 80.0%" in page.text
    assert "80.0% of them have a reward on the side that their label says (standard error 4.0%)" in page.text
    assert "1 h 2 min" in page.text and "Held-out comparisons" not in page.text


def test_a_run_of_imitation_says_what_its_loss_says(tmp_path):
    lines = [{"step": 0, "eval/loss": 0.5}, {"step": 1, "eval/loss": 0.25}]
    facts = dataclasses.replace(FACTS, noun="examples", loss_warning=f"loss.beta is odd {MARKUP}")
    page = page_of(tmp_path / "run", lines, Record(facts=facts))
    assert "Held-out loss fell from 0.5000 to 0.2500" in page.text and f"loss.beta is odd {SHOWN}" in page.text


def test_figures_are_those_of_the_adapters_that_were_chosen(tmp_path):
    """Of three evaluations the second is the best one, and the run ended early."""
    lines = [{"step": step, "eval/loss": loss} for step, loss in ((0, 0.7), (2, 0.4), (4, 0.5))]
    record = Record(facts=FACTS, chosen_step=2, notes={"chosen": f"those after step 2 {MARKUP}", "stopped early": "so"})
    page = page_of(tmp_path / "run", lines, record)
    assert "Held-out loss fell from 0.7000 to 0.4000" in page.text and "0.7000 → 0.4000" in page.text
    assert f"Chosen: those after step 2 {SHOWN}." in page.text and "Stopped early: so." in page.text
    assert "has not finished" not in page.text
    row = checked_page(comparison_page([read_run(tmp_path / "run")] * 2)).tables["Final figures, ± standard error"][1]
    assert row[4] == "0.4000"


def test_numbers_that_are_not_finite_are_called_so(tmp_path):
    lines = [*trained(2), {"step": 2, "train/loss": None, "train/grad_norm": None}, {"step": 2, "eval/loss": None}]
    record = Record(facts=FACTS, held_out=held_out_of([1, 2], [2, 1], [0.0, 0.0], [1.0, math.nan]))
    record = dataclasses.replace(
        record, held_out=dataclasses.replace(record.held_out, after=Scored(9, [1.0, None], [None, None]))
    )
    page = page_of(tmp_path / "run", lines, record)
    assert page.tables["Loss by step"][-1] == ["2", "not finite", "not finite"]


def test_accuracy_is_told_by_length_with_errors_and_baselines(tmp_path):
    """Four comparisons of four prompts: three are right; in two the chosen response is the longer one."""
    held_out = held_out_of([9, 9, 3, 5], [4, 3, 8, 5], [0.0] * 4, [1.0, 0.5, 2.0, -1.0])
    page = page_of(tmp_path / "run", [], Record(facts=FACTS, held_out=held_out))
    error = np.std([1, 1, 1, 0], ddof=1) / 2
    assert page.tables["Accuracy on held-out comparisons, ± standard error"][1:] == [
        ["all", "4", "50.0%", f"75.0% ±\u00a0{error:.1%}"],
        ["the chosen response is longer", "2", "50.0%", "100.0%"],
        ["the rejected response is longer", "1", "50.0%", "100.0%"],
        ["both are as long", "1", "50.0%", "0.0%"],
        ["baseline: the longer response", "4", f"62.5% ±\u00a0{np.std([1, 1, 0, 0.5], ddof=1) / 2:.1%}", ""],
        ["baseline: what the untrained model finds likelier", "4", "50.0%", ""],
    ]
    bins = page.tables["Accuracy by how much longer the chosen response is"][1:]
    assert sum(int(row[1]) for row in bins) == 4


def test_markup_in_everything_that_is_recorded_is_shown_as_text(tmp_path):
    response = ShownResponse([MARKUP, "x", "y"], [1.5, -0.5, 0.0], 1.0, left_out=7)
    pair = ShownPair(MARKUP, MARKUP, 0.25, response, response)
    record = Record(
        facts=FACTS,
        prompts=[MARKUP, "two"],
        completed_before=Completions(0, [MARKUP, ""]),
        completed_after=Completions(9, [MARKUP, "done"]),
        most_right=[pair],
        most_wrong=[pair],
    )
    path = folder_of(tmp_path / "<i>run", [*trained(1), {"step": 1, f"train/{MARKUP}": 1.0}], record)
    (path / "judge").mkdir()
    (path / "judge" / "judge.json").write_text(json.dumps({MARKUP: MARKUP}))
    result = dict.fromkeys(("prompt", "candidate", "baseline", "outcome"), MARKUP) | {"reasons": [MARKUP, None]}
    (path / "judge" / "results.jsonl").write_text(3 * f"{json.dumps(result)}\n" + "half of a li")
    text = report_page(read_run(path))
    page = checked_page(text)
    assert "i" not in page.tags and "alert(1)" in page.text
    # A version and a metric; of each pair origin, prompt, two responses and what moved most in them; a prompt and both
    # of its completions; a key and a value of the judge's file, and two prompts that were judged.
    assert page.text.count(SHOWN) == 2 + 2 * 6 + 3 + 2 + 2 * 5
    assert '<span class="p4" title="+1.500">' in text and '<span class="n2" title="-0.500">' in text
    assert "(nothing)" in page.text and "7 more tokens are not shown" in page.text


def test_what_a_judge_wrote_is_told_in_words():
    rate = Rate(0.75, 0.6, 0.9)
    rates = Rates(
        counts={"win": 3, "loss": 1, "tie": 0, "inconsistent": 2, "unparsed": 0},
        rates={"win": rate, "unparsed": Rate(0.0)},
        win_rate=rate,
        length_controlled_win_rate=Rate(None, why="all are longer"),
        prefers_first=Rate(0.5, 0.5, 0.5),
    )
    answers = [Result("a", "b", "c", "win", ("", "")) for _ in range(6)]
    compared = Comparison(answers, 0, rates, 6, 6, Usage(1, 2), Usage(), 1.5)
    summary = json.loads(json.dumps({"judge": {"type": "reward"}, **compared.as_json(), "settings": {"a": 1}}))
    found = judged(JudgeFiles("judge.json", summary, []))
    assert "in 75.0% (95% interval 60.0% to 90.0%) of the prompts on which both orders agree (4 of 6)" in found.words
    assert [row[:3] for row in found.table.rows] == [
        ["win", "75.0%", "60.0% to 90.0%"],
        ["win rate, of prompts on which both orders agree", "75.0%", "60.0% to 90.0%"],
        ["win rate at equal length", "undefined", ""],
        ["how often the judge prefers the first place", "50.0%", "50.0% to 50.0%"],
    ]
    assert found.others["prompts"] == "6" and found.others["judge.type"] == "reward"
    assert not [name for name in found.others if name.startswith(("win_rate", "rates", "counts", "settings"))]
    assert judged(JudgeFiles("other.json", {"a": {"b": 1.5}}, [])).others == {"a.b": "1.5"}


def test_runs_that_hold_out_the_same_are_compared_pair_by_pair(tmp_path):
    def run(name: str, chosen: list[int], after: list[float]):
        lines = [{"step": 9, "eval/loss": 0.5, "eval/dpo_accuracy": sum(x > 0 for x in after) / len(after)}]
        record = Record(facts=FACTS, held_out=held_out_of(chosen, [2] * len(after), [0.0] * len(after), after))
        return read_run(folder_of(tmp_path / name, lines, record))

    best = run("best", [3] * 100, [1.0] * 90 + [-1.0] * 10)
    same = run("same", [3] * 100, [1.0] * 88 + [-1.0] * 12)
    worse = run("worse", [3] * 100, [1.0] * 60 + [-1.0] * 40)
    other = run("other", [4] * 100, [-1.0] * 100)
    text = checked_page(comparison_page([best, same, worse, other])).text
    assert "Run A has the highest held-out accuracy, 90.0%." in text
    assert "It leads run B by 2.0 points on the same comparisons (standard error 1.4): it may be chance." in text
    assert "It leads run C by 30.0 points on the same comparisons (standard error 4.6): a clear difference." in text
    assert "It leads run D by 90.0 points, but the two hold out other examples" in text
    with pytest.raises(ValueError, match="27 runs are too many"):
        comparison_page([best] * 27)


def test_long_curves_become_means_of_stretches():
    series = Series(np.arange(1000), np.arange(1000.0))
    binned = series.binned(10)
    assert binned.steps.tolist() == [*range(99, 1000, 100)]
    np.testing.assert_allclose(binned.values, np.arange(49.5, 1000, 100))
    assert series.binned(1000) is series


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "runs is missing"),
        (["gone"], "gone is no run's folder: it has no metrics.jsonl"),
        (["run", "--output", "thesis.html"], "thesis.html' exists and is no page of this command"),
        (["run", "--output", "."], "is a folder; name a file in it"),
        (["run", "run", "--verdicts", "[a]"], "are of one run, and runs names 2"),
        (["run", "--verdicts", "[gone.json]"], "gone.json is missing"),
        (["broken"], "line 1 is not JSON"),
        (["unreadable"], "report.json: format=7 is of another version"),
    ],
)
def test_mistakes_are_told_in_a_line(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "run", trained(1))
    (folder_of(tmp_path / "broken") / "metrics.jsonl").write_text("{\n")
    (folder_of(tmp_path / "unreadable") / "report.json").write_text('{"format": 7}')
    (tmp_path / "thesis.html").write_text("<html>mine</html>")
    with pytest.raises((ValueError, OSError), match=message):
        main(parse(ReportConfig, with_named_runs(words)))
    assert (tmp_path / "thesis.html").read_text() == "<html>mine</html>" and not (tmp_path / "gone").exists()


def test_a_record_is_read_as_it_was_written(tmp_path):
    held_out = held_out_of([1, 2], [2, 1], [0.0, 0.0], [0.1, -0.2])
    response = ShownResponse(["a"], [None], None)
    record = Record(FACTS, [Sitting(0, 4, 1.5, "now")], ["p"], Completions(0, ["\ud800"]), None, held_out)
    record = dataclasses.replace(record, most_right=[ShownPair("o", "p", None, response, response)])
    write_record(tmp_path, record)
    read = read_record(tmp_path)
    assert dataclasses.replace(read, completed_before=record.completed_before) == record
    assert record.until(0) == Record(
        FACTS, [], ["p"], None, None, dataclasses.replace(held_out, before=None, after=None)
    )
    assert record.until(3).completed_before is not None and record.until(3).held_out.after is None
    assert record.until(3).sittings == [Sitting(0, 3, 1.5, "now")] and record.until(3).most_right == []
