"""How a run does on its held-out examples: what its evaluations find, log, and print at the end."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_dpo_jax.accuracy import (
    ACCURACY,
    GROUPS,
    LONGER,
    MARGIN,
    REFERENCE,
    baselines_of,
    in_words,
    statistics_of,
)
from lora_dpo_jax.data.table import ExampleTable
from lora_dpo_jax.evaluation import Evaluation, Scorer, comparisons_of, evaluate_by_sums, evaluate_by_tokens
from lora_dpo_jax.lora import equals_reference, reference_model
from lora_dpo_jax.losses import Scores
from lora_dpo_jax.preference_objective import PreferenceObjective
from lora_dpo_jax.runs.reference_scores import ReferenceLogProbs
from lora_dpo_jax.tracking import Tracker
from lora_dpo_jax.training.choice import PREFIX
from lora_dpo_jax.training.loop import StepInfo
from lora_dpo_jax.training.step import TrainState

logger = logging.getLogger("lora_dpo_jax")

CELL, MARGIN_OF_TITLES = 18, 2  # of a table: the width of a column, and the space after the titles of its rows


class HeldOutScores:
    """A hook that scores the held-out examples, and logs means with their standard errors; baselines once."""

    def __init__(
        self,
        score: Scorer,
        objective: PreferenceObjective,
        reference: ReferenceLogProbs | None,
        tracker: Tracker,
        earlier: Sequence[Mapping[str, Any]],
        *,
        scored_by: str = "the reference",
    ):
        """`earlier`: the lines of metrics.jsonl that a resumed run has logged so far. `scored_by`: see `table`."""
        self.score, self.objective, self.reference, self.tracker = score, objective, reference, tracker
        self.scored_by = scored_by
        self.scores = [(line["step"], _scores(line)) for line in earlier if "eval/loss" in line]
        # The policy's scores in the run's first evaluation, if this process made it, and in the last one.
        self.first_scores: Scores | None = None
        self.last_scores: Scores | None = None
        self.reference_scores: Scores | None = None  # in the last evaluation
        self.last_margins: np.ndarray | None = None  # likewise: float32 [comparison], see Loss.margins
        self.baselines = next((_scores(line) for line in earlier if PREFIX + LONGER in line), {})

    def __call__(self, info: StepInfo[TrainState]) -> None:
        if not len(self.score.examples):
            return
        found = self._by_tokens(info.state) if self.objective.needs_tokens else self._by_sums(info.state)
        means = found.means | statistics_over(self.score.examples, found)
        self.first_scores = self.first_scores if self.scores else found.policy
        self.last_scores, self.reference_scores = found.policy, found.reference
        self.last_margins = found.margins
        self.scores.append((info.step, means))
        self.tracker.log({PREFIX + name: value for name, value in means.items()}, step=info.step)
        self._log_baselines(info, found)
        texts = {"loss": "loss {:.4f}", "dpo_accuracy": "accuracy {:.3f}", "rewards/margins": "margin {:.3f}"}
        shown = ", ".join(text.format(means[name]) for name, text in texts.items() if name in means)
        logger.info("held-out after %d steps: %s", info.step, shown)

    @property
    def latest(self) -> dict[str, float]:
        """The metrics of the last evaluation."""
        return self.scores[-1][1]

    def _log_baselines(self, info: StepInfo[TrainState], found: Evaluation) -> None:
        if self.baselines:
            return
        # A moving reference is what it was at the beginning; a policy without a reference begins as what it trains.
        is_fixed = found.reference is not None and not info.state.reference_moves
        at_start = found.policy if found.reference is None else found.reference
        self.baselines = baselines_over(self.score.examples, at_start if is_fixed or info.step == 0 else None)
        if self.baselines:
            self.tracker.log_summary({PREFIX + name: value for name, value in self.baselines.items()})

    def _by_tokens(self, state: TrainState) -> Evaluation:
        columns = self.objective.loss.columns_in(self.score.examples.arrays.columns)
        return evaluate_by_tokens(self.objective, columns, self.score, state.model, state.reference)

    def _by_sums(self, state: TrainState) -> Evaluation:
        model, reference_scores = state.model, self._of_reference(state)
        if reference_scores is not None and equals_reference(model, state.reference):
            policy_scores = reference_scores
        else:
            policy_scores = self.score(model)
        return evaluate_by_sums(self.objective.loss, policy_scores, reference_scores, self.score.examples)

    def _of_reference(self, state: TrainState) -> Scores | None:
        if self.reference is None:
            return None
        if state.reference_moves:
            return self.score(reference_model(state.model, state.reference))
        # A reference that never changes: its scores serve every evaluation of the run.
        return self.reference.of_table(self.score) if self.reference_scores is None else self.reference_scores

    def print(self, chosen: int | None = None) -> None:
        """Prints a table of the first evaluation, the last one, and the one after `chosen` steps if it is another."""
        ends = self.scores[:1] + self.scores[1:][-1:]
        if not ends:
            return
        others = [(step, means) for step, means in self.scores if step == chosen and step not in dict(ends)]
        columns = {f"after step {step}": means for step, means in ends[:1] + others[:1] + ends[1:]}
        title = f"held-out {self.score.examples.arrays.noun}"
        print("\n" + "\n".join(table(title, columns, self.baselines, scored_by=self.scored_by)))


def metric_names(objective: PreferenceObjective, held_out: ExampleTable) -> list[str]:
    """The names of the metrics that evaluations log, without the prefix eval/. It needs no model."""
    margins = np.zeros(len(held_out.arrays.comparisons), np.float32)
    names = objective.metric_names(held_out.arrays.examples)
    if len(margins) and MARGIN in names:
        names += statistics_of(margins, comparisons_of(held_out))
    return names


def statistics_over(examples: ExampleTable, found: Evaluation) -> dict[str, float]:
    """Standard errors, and means by which response is longer; nothing of examples that are not compared."""
    return {} if found.margins is None else statistics_of(found.margins, comparisons_of(examples))


def baselines_over(examples: ExampleTable, reference: Scores | None) -> dict[str, float]:
    """See `accuracy.baselines_of`; nothing of examples that are not compared."""
    if not len(examples.arrays.comparisons):
        return {}
    margins = None
    if reference is not None:
        log_probs, arrays = np.asarray(reference.log_probs.array, np.float64), examples.arrays.examples
        margins = log_probs[np.asarray(arrays.chosen.array)] - log_probs[np.asarray(arrays.rejected.array)]
    return baselines_of(comparisons_of(examples), margins)


def table(
    title: str, columns: Mapping[str, Mapping[str, float]], baselines: Mapping[str, float], *, scored_by: str
) -> list[str]:
    """The lines of a table: a column for each evaluation, by its title; then the baselines.

    `scored_by` says whose log-probs are one of the baselines, such as "the base".
    """
    sizes = {group: f"  {group.replace('_', ' ')} ({baselines.get(f'{group}/pairs', 0):,.0f})" for group in GROUPS}
    rows: list[tuple[str, Sequence[str]]] = [(title, [*columns])]

    def add(title: str, name: str, found: Sequence[Mapping[str, float]], *, percent: bool = True) -> None:
        cells = [in_words(name, means, percent=percent) if name in means else "" for means in found]
        if any(cells):
            rows.append((title, cells))

    def add_with_groups(title: str, name: str, found: Sequence[Mapping[str, float]], *, percent: bool = True) -> None:
        add(title, name, found, percent=percent)
        for group, words in sizes.items():
            add(words, f"{group}/{name}", found, percent=percent)

    evaluations = [*columns.values()]
    add_with_groups("accuracy", ACCURACY, evaluations)
    add_with_groups("reward margin", MARGIN, evaluations, percent=False)
    add("loss", "loss", evaluations, percent=False)
    if baselines:
        rows.append(("accuracy of what knows no preferences", []))
    add("longer response", LONGER, [baselines])
    add_with_groups(f"log-prob of {scored_by}", REFERENCE, [baselines])
    width = max(MARGIN_OF_TITLES + len(title) for title, cells in rows if cells)
    return [(f"{title:<{width}}" + "".join(f"{cell:>{CELL}}" for cell in cells)).rstrip() for title, cells in rows]


def _scores(line: Mapping[str, Any]) -> dict[str, float]:
    """The scores in a line of metrics.jsonl, where null stands for infinities and NaN."""
    return {name.removeprefix(PREFIX): math.nan if x is None else x for name, x in line.items() if name != "step"}
