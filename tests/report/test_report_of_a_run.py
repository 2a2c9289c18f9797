"""The report of real runs: what it says equals what was logged, resumed runs have all of it, and data stay data."""

import logging
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from html_pages import HtmlPage, checked_page
from tiny_runs import preference_rows, read_metrics, run_config, write_rows

from lora_dpo_jax.main import report
from lora_dpo_jax.main.train import main
from lora_dpo_jax.report.charts import number, percent
from lora_dpo_jax.report.page import report_page
from lora_dpo_jax.report.record import Facts, Record, read_record
from lora_dpo_jax.report.run_files import read_run
from lora_dpo_jax.runs.best import BestAdapters
from lora_dpo_jax.runs.config import TrainConfig
from lora_dpo_jax.runs.held_out import HeldOutScores
from lora_dpo_jax.runs.recording import Recorder
from lora_dpo_jax.runs.report import Samples
from lora_dpo_jax.settings.arguments import parse
from lora_dpo_jax.training.loop import StepInfo, TrainerConfig

pytestmark = pytest.mark.usefixtures("two_devices")

MARKUP = """<script>alert(1)</script><b onclick="x">&amp;'{{ 7 * 7 }}</b>"""
RUN_ID = """<i>&"run" {{ 1 }}"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    """A run of four steps over rows with markup; three pairs of twelve are held out."""
    folder = tmp_path_factory.mktemp("report")
    rows = preference_rows(12)
    for row in rows:
        row["prompt"][-1]["content"] += MARKUP
        row["chosen"][0]["content"] += MARKUP
    return run_config(
        folder,
        write_rows(folder / "<train>.jsonl", rows),
        report=True,
        validation_split_fraction=0.25,
        sample_prompts=[MARKUP, "why sleeps the cat?"],
        generation={"max_new_tokens": 2},
        optimizer={"learning_rate": 1e-2},
        peft_save_path=str(folder / "<adapter> it's"),
        trainer__id=RUN_ID,
        trainer__num_train_steps=4,
        trainer__steps_per_eval=2,
        trainer__best={"metric": "eval/loss"},
        trainer__checkpointer={"keep": [{"every": 2}]},
    )


@pytest.fixture(scope="module")
def run_dir(config) -> Path:
    """After it was stopped between its steps 2 and 4, and resumed. `whole` beside it never was.

    Their pages are without pictures, and their completions are the ends of the prompts: neither is drawn here.
    """
    run_dir = config.trainer.run_dir(RUN_ID)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_dpo_jax.generation.generate", lambda model, ids, *_, **__: [x[-40:] for x in ids])
        patch.setitem(sys.modules, "matplotlib", None)
        main(config)
        shutil.copytree(run_dir, run_dir.parent / "whole")
        shutil.rmtree(run_dir / "checkpoints" / "step-4")
        main(config)
    return run_dir


@pytest.fixture(scope="module")
def record(run_dir) -> Record:
    found = read_record(run_dir)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def page(run_dir) -> HtmlPage:
    """With pictures."""
    return checked_page(report_page(read_run(run_dir)))


def test_markup_in_data_settings_and_names_is_shown_as_text(page):
    assert not page.tags & {"b", "i"} and "alert(1)" in page.text
    assert page.text.count(MARKUP) == 6, "a sample prompt, also in its setting, and two prompts and chosen responses"
    assert page.text.count(MARKUP[-20:]) > page.text.count(MARKUP), "completions end like their prompts"
    assert f"Run {RUN_ID}" in page.text and "<adapter> it's" in page.text and "<train>.jsonl" in page.text


def test_every_part_of_the_page_is_there(page):
    assert [title for level, title in page.headings if level == 2] == [
        "In short",
        "Curves",
        "Held-out comparisons",
        "Most right and most wrong",
        "Completions before and after",
        "Speed and padding",
        "Use the adapter",
        "Settings and versions",
    ]
    drawn = {title for title, _ in page.pictures}
    assert drawn >= {"Loss", "Accuracy", "Reward margin", "Rewards", "Learning rate", "Gradient norm", "Reward margins"}


def test_figures_on_the_page_are_those_of_metrics_jsonl(config, page):
    lines = read_metrics(config)
    evaluated = {line["step"]: line for line in lines if "eval/loss" in line}
    trained = {line["step"]: line for line in lines if "train/loss" in line}
    assert set(evaluated) == {0, 2, 4} and set(trained) == {0, 1, 2, 3}
    for title, name, shown in (
        ("Loss by step", "loss", number),
        ("Accuracy by step", "dpo_accuracy", percent),
        ("Reward margin by step", "rewards/margins", number),
    ):
        expected = [
            [str(step)] + [shown(of[step][f"{part}/{name}"]) if step in of else "" for part, of in both]
            for both in [(("train", trained), ("eval", evaluated))]
            for step in range(5)
        ]
        assert page.tables[title][1:] == expected
    assert "Chosen: the adapters after step 4, whose eval/loss of " in page.text
    first, last = evaluated[0], evaluated[4]
    assert f"{percent(first['eval/dpo_accuracy'])} → {percent(last['eval/dpo_accuracy'])}" in page.text
    assert f"{number(first['eval/loss'])} → {number(last['eval/loss'])}" in page.text


def test_margins_of_the_record_are_those_that_were_logged(config, record):
    (last,) = (line for line in read_metrics(config) if line["step"] == 4)
    held_out = record.held_out
    assert held_out.before.margins == [0, 0, 0] and held_out.after.step == 4
    np.testing.assert_allclose(np.mean(held_out.after.margins), last["eval/rewards/margins"], rtol=1e-5)
    np.testing.assert_allclose(np.mean(held_out.after.differences), last["eval/dpo_margin_policy"], rtol=1e-5)
    np.testing.assert_allclose(np.mean(held_out.reference), last["eval/dpo_margin_ref"], rtol=1e-5)


def test_log_ratios_of_the_tokens_add_up_to_the_margin(config, record):
    pairs = [*record.most_right, *record.most_wrong]
    assert len(pairs) == 2 and pairs[0].margin == max(record.held_out.after.margins)
    assert pairs[1].margin == min(record.held_out.after.margins) < pairs[0].margin
    for pair in pairs:
        sums = [np.sum(side.log_ratios, dtype=np.float64) for side in (pair.chosen, pair.rejected)]
        assert min(map(len, (pair.chosen.pieces, pair.rejected.pieces))) > 1
        # Sums of about 100 float32 log-probs of about -5 nats, in another program.
        np.testing.assert_allclose(config.loss.beta * (sums[0] - sums[1]), pair.margin, atol=1e-5)
        np.testing.assert_allclose(sums, [pair.chosen.log_ratio, pair.rejected.log_ratio], atol=1e-5)


def test_a_resumed_run_reports_like_one_that_never_stopped(run_dir, record):
    whole = read_record(run_dir.parent / "whole")
    assert [(sitting.first_step, sitting.last_step) for sitting in record.sittings] == [(0, 2), (2, 4)]
    assert [(sitting.first_step, sitting.last_step) for sitting in whole.sittings] == [(0, 4)]
    assert record.completed_before.step == 0 and record.completed_after.step == 4
    for part in ("completed_before", "completed_after", "held_out", "most_right", "most_wrong", "prompts"):
        assert getattr(record, part) == getattr(whole, part), part


def test_the_command_writes_the_same_page_again(run_dir, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    written = (run_dir / "report.html").read_bytes()
    (run_dir / "report.html").unlink()
    report.main(parse(report.ReportConfig, report.with_named_runs([str(run_dir)])))
    assert (run_dir / "report.html").read_bytes() == written
    assert str(run_dir / "report.html") in capsys.readouterr().out


def test_several_runs_are_compared_on_the_same_examples(run_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    other = tmp_path / "slower"
    shutil.copytree(run_dir.parent / "whole", other)
    settings = (other / "config.yaml").read_text()
    assert "learning_rate: 0.01\n" in settings
    (other / "config.yaml").write_text(settings.replace("learning_rate: 0.01\n", "learning_rate: 0.5\n"))
    words = [str(run_dir), str(other), "--output", str(tmp_path / "both.html")]
    page = checked_page(report.main(parse(report.ReportConfig, report.with_named_runs(words))).read_text())
    assert page.tables["Settings that differ"] == [
        ["setting", "A", "B"],
        ["optimizer.learning_rate", "0.01", "0.5"],
    ]
    head, first, second = page.tables["Final figures, ± standard error"]
    assert [first[1], second[1]] == [RUN_ID, "slower"] and first[2:7] == second[2:7]
    assert "Run B has the same accuracy." in page.text
    table = page.tables["Loss, held out by step"]
    assert table[0] == ["step", "A", "B"] and all(row[1] == row[2] for row in table[1:])
    assert not page.tags & {"i", "b"} and head[0] == "run"


def test_a_report_that_fails_ends_no_run(tmp_path, caplog):
    facts, samples = Facts(4, "pairs", 9, 3, "1 x 8", "1 x cpu", 1, {}), Samples([], None, None, stop_ids=())  # type: ignore[arg-type]
    scores = HeldOutScores(None, None, None, None, [])  # type: ignore[arg-type]
    best = BestAdapters(TrainerConfig(), 4, scores, {}, None, None)  # type: ignore[arg-type]
    (tmp_path / "report.json").write_text("{")
    recorder = Recorder(tmp_path, facts, scores, best, samples, None, first_step=2, began=0.0)
    scores.scores.append((2, {}))
    scores.last_scores, scores.last_margins = object(), [0.0]  # type: ignore[assignment]
    recorder(StepInfo(2, None))  # type: ignore[arg-type]  # there is no table
    assert recorder.finish() is None  # there are no metrics
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 3 and all("report.html" in line and "not affected" in line for line in told)
    assert [name for name in ("is no JSON", "AttributeError", "FileNotFoundError") if name not in " ".join(told)] == []
