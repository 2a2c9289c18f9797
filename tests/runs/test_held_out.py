"""What evaluations log of pairs, ranked answers and single ones; and the baselines, once."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_pairs import new_adapters, random_answers, random_pairs, table_of

from lora_dpo_jax.data.examples import TokenizedExample
from lora_dpo_jax.data.memory import MemoryExamples
from lora_dpo_jax.data.table import ExampleTable
from lora_dpo_jax.evaluation import scores_of
from lora_dpo_jax.losses import LOSSES, Dpo, Loss
from lora_dpo_jax.preference_objective import PreferenceObjective
from lora_dpo_jax.runs.held_out import HeldOutScores, metric_names
from lora_dpo_jax.training.loop import StepInfo

PAIRS = table_of(random_pairs(12))
RANKED = table_of(
    MemoryExamples(
        [
            TokenizedExample(pair.prompt, (*pair.responses, pair.prompt), ((0, 1), (0, 2), (1, 2))[: number % 3 + 1])
            for number, pair in enumerate(random_pairs(6))
        ]
    )
)


class Recorder:
    """A tracker that remembers."""

    def __init__(self):
        self.logged: list[dict[str, float]] = []
        self.summaries: list[dict[str, float]] = []

    def log(self, metrics, *, step):
        self.logged.append({"step": step, **metrics})

    def log_summary(self, metrics):
        self.summaries.append(dict(metrics))


def random_scores(table: ExampleTable, seed: int) -> Any:
    return scores_of(table, np.random.default_rng(seed).normal(-50, 5, len(table.arrays.response_tokens)).astype("f4"))


class Fake:
    """Scores a table without a model: other scores of the policy each time, and the same of the reference."""

    def __init__(self, table: ExampleTable):
        self.examples, self.calls = table, 0

    def __call__(self, model):
        self.calls += 1
        return random_scores(self.examples, self.calls)

    def of_table(self, score):
        return random_scores(self.examples, 0)


def followed(loss: Loss, table: ExampleTable, steps=(0, 5, 10), *, moves: bool = False, earlier=()):
    """(the hook after evaluations after `steps` steps, what it has logged)."""
    fake: Any = Fake(table)
    recorder: Any = Recorder()
    hook = HeldOutScores(fake, PreferenceObjective(loss), fake if loss.needs_reference else None, recorder, earlier)
    state: Any = SimpleNamespace(model=NOT_EQUAL, reference=REFERENCE, reference_moves=moves)
    for step in steps:
        hook(StepInfo(step, state))
    return hook, recorder


NOT_EQUAL = new_adapters()
REFERENCE = {"of another": "structure"}  # so that it is not the policy's


def margins_of(scores, table: ExampleTable) -> np.ndarray:
    log_probs, examples = np.asarray(scores.log_probs.array), table.arrays.examples
    return log_probs[np.asarray(examples.chosen.array)] - log_probs[np.asarray(examples.rejected.array)]


def test_what_does_not_change_is_logged_once_and_all_else_at_each_evaluation():
    hook, recorder = followed(Dpo(), PAIRS)
    assert [line["step"] for line in recorder.logged] == [0, 5, 10]
    assert len(recorder.summaries) == 1
    of_reference = margins_of(random_scores(PAIRS, 0), PAIRS)
    assert recorder.summaries[0]["eval/reference_log_prob/accuracy"] == np.mean(of_reference > 0)
    margins = 0.1 * (margins_of(hook.last_scores, PAIRS) - of_reference)
    assert recorder.logged[-1]["eval/rewards/margins_se"] == pytest.approx(
        np.std(margins, ddof=1) / np.sqrt(12), rel=1e-4
    )
    assert hook.first_scores is not None and hook.reference_scores is not None
    assert margins_of(hook.first_scores, PAIRS) == pytest.approx(margins_of(random_scores(PAIRS, 1), PAIRS))
    names = {f"eval/{name}" for name in metric_names(hook.objective, PAIRS)}
    assert all(line.keys() == names | {"step"} for line in recorder.logged)

    resumed, again = followed(Dpo(), PAIRS, [10], earlier=[recorder.logged[0], recorder.summaries[0]])
    assert not again.summaries and resumed.baselines == hook.baselines
    assert resumed.first_scores is None, "which another process has had"


@pytest.mark.parametrize(
    "loss, moves, seed", [(Dpo(), True, 1), (LOSSES["simpo"](), False, 1)], ids=["moving reference", "no reference"]
)
def test_a_baseline_is_of_the_model_before_the_first_step(loss, moves, seed, monkeypatch):
    """The moving reference of that evaluation, or the policy; none if no evaluation came before the first step."""
    monkeypatch.setattr("lora_dpo_jax.runs.held_out.reference_model", lambda model, adapters: model)
    _, recorder = followed(loss, PAIRS, moves=moves)
    expected = np.mean(margins_of(random_scores(PAIRS, seed), PAIRS) > 0)
    assert [line["eval/reference_log_prob/accuracy"] for line in recorder.summaries] == [expected]
    _, recorder = followed(loss, PAIRS, [5, 10], moves=moves)
    (line,) = recorder.summaries
    assert "eval/longer_response/accuracy" in line and not [name for name in line if "reference" in name]


def test_a_ranked_example_counts_once_however_many_responses_it_compares():
    hook, recorder = followed(Dpo(), RANKED, [0])
    margins = 0.1 * (margins_of(hook.last_scores, RANKED) - margins_of(hook.reference_scores, RANKED))
    means = [x.mean() for x in np.split(margins, np.cumsum(RANKED.arrays.comparison_counts)[:-1])]
    line = recorder.logged[0]
    assert line["eval/rewards/margins"] == pytest.approx(np.mean(means), rel=1e-4)
    assert line["eval/rewards/margins_se"] == pytest.approx(np.std(means, ddof=1) / np.sqrt(6), rel=1e-4)
    assert sum(value for name, value in recorder.summaries[0].items() if name.endswith("/pairs")) == len(margins)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_single_answers_have_neither_lengths_to_compare_nor_baselines(name, capsys):
    answers = random_answers(8)
    hook, recorder = followed(LOSSES[name](), answers, [0, 5])
    assert not recorder.summaries
    assert not [name for name in recorder.logged[-1] if name.endswith("_se") or "longer" in name]
    assert {f"eval/{name}" for name in metric_names(hook.objective, answers)} == recorder.logged[0].keys() - {"step"}
    hook.print()
    assert "accuracy" in capsys.readouterr().out


def test_the_table_shows_the_start_the_choice_and_the_end(capsys):
    hook, recorder = followed(Dpo(), PAIRS, [0, 5, 10, 15])
    hook.print(chosen=5)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[2:] == "after step 0 after step 5 after step 15".split()
    shown = recorder.logged[1]
    assert f"{shown['eval/dpo_accuracy']:.1%} ± {shown['eval/dpo_accuracy_se']:.1%}" in lines[2]
    baselines = hook.baselines
    assert [line[:30].strip() for line in lines if "log-prob" in line] == ["log-prob of the reference"]
    assert f"{baselines['longer_response/accuracy']:.1%} ±" in next(line for line in lines if "longer resp" in line)
    assert not [line for line in lines if line != line.rstrip()]
    hook.print(chosen=15)
    assert "after step 5" not in capsys.readouterr().out
