"""The adapters of the best evaluation, which the final exports hold, and the end of a run that gets no better.

    step            0      25      50      75     100
    eval/loss   0.693   0.401   0.312   0.315   0.344
    kept            *       *       *                      the adapters after 50 steps
    waited          0       0       0       1       2      with patience 2, the run ends after 100 steps

All processes of a run decide alike: the value that counts is that of the first one.
"""

import dataclasses
import logging
from collections.abc import Collection, Mapping
from typing import Any

import equinox as eqx

from lora_dpo_jax.lora import frozen_copy, trainable_filter
from lora_dpo_jax.models import CausalLM
from lora_dpo_jax.processes.exchange import from_first_process
from lora_dpo_jax.runs.held_out import HeldOutScores
from lora_dpo_jax.tracking import Tracker
from lora_dpo_jax.training.choice import PREFIX, BestConfig, Standing
from lora_dpo_jax.training.loop import StepInfo, TrainerConfig
from lora_dpo_jax.training.step import TrainState

logger = logging.getLogger("lora_dpo_jax")

NOTE = "best"  # the name of its note in a checkpoint


class BestAdapters:
    """A hook that follows each evaluation. It keeps the adapters of the best one, and counts those since."""

    def __init__(
        self,
        trainer: TrainerConfig,
        num_steps: int,
        scores: HeldOutScores,
        notes: dict[str, Any],
        adapters: Any,
        tracker: Tracker,
    ):
        """`notes` are those of the run's checkpoints; a resumed run finds its own there.

        `adapters` are those that a resumed run had kept (a tree like the model, with None for weights), or None.
        """
        self.best, self.stopping, self.num_steps = trainer.best, trainer.early_stopping, num_steps
        self.scores, self.notes, self.tracker = scores, notes, tracker
        note = notes.get(NOTE) if self.is_on else None
        if note is not None and note["step"] is not None and adapters is None:
            logger.warning("the checkpoint holds no adapters of the best evaluation: later evaluations compete alone")
            note = None
        self.standing = Standing.read(note, self.best)
        self.adapters = adapters if self.standing.step is not None else None
        self._write_note()

    @property
    def is_on(self) -> bool:
        return self.best.metric is not None

    def __call__(self, info: StepInfo[TrainState]) -> None:
        if not self.is_on:
            return
        value = float(from_first_process(repr(_value_of(self.best, self.scores.latest))))
        former, least = self.standing, self.stopping.min_delta
        self.standing = self.best(former, info.step, value, min_delta=least)
        if self.standing.step != former.step:
            self.adapters = frozen_copy(info.state.model)  # the next step takes the state's own for itself
        self._write_note()
        if info.is_last or self.is_complete():
            self._tell(info.step)

    def is_complete(self) -> bool:
        """Whether the run has waited long enough for a better evaluation."""
        return self.stopping.patience is not None and self.standing.waited >= self.stopping.patience

    def chosen(self, info: StepInfo[TrainState]) -> StepInfo[TrainState]:
        """The state with the adapters to export: the best ones, where the run ends."""
        if self.adapters is None or not info.is_last:
            return info
        model = eqx.combine(self.adapters, info.state.model)
        return dataclasses.replace(info, state=dataclasses.replace(info.state, model=model))

    def words(self) -> dict[str, str]:
        """What was chosen and why, and why the run ended, as texts by title; for the summary and the adapter's card."""
        standing, words = self.standing, {}
        if not self.is_on or standing.last_step is None:
            return words
        of = f"of {standing.evaluations} evaluations"
        if standing.step is None:
            words["chosen"] = f"the last adapters: {self.best.metric} was a number in none {of}"
        else:
            when = f"after step {standing.step}" if standing.step else "before the first step"
            words["chosen"] = (
                f"the adapters {when}, whose {self.best.metric} of {standing.value:.6g} is the {self.best.word} {of}"
            )
        if self.is_complete() and standing.last_step < self.num_steps:
            least = f" by more than {self.stopping.min_delta:g}" if self.stopping.min_delta else ""
            words["stopped early"] = (
                f"after step {standing.last_step} of {self.num_steps}: {standing.waited} evaluations in a row did not "
                f"improve {self.best.metric}{least}"
            )
        return words

    def _tell(self, step: int) -> None:
        standing = self.standing
        summary: dict[str, float] = {}
        if standing.step is not None and standing.value is not None:
            summary = {"best/step": standing.step, f"best/{self.best.metric}": standing.value}
        if step < self.num_steps:
            summary["stopped_early/step"] = step
        if summary:
            self.tracker.log_summary(summary)
        for title, text in self.words().items():
            logger.info("%s %s", title, text)
        if standing.step is None:
            logger.warning("trainer.best: %s was a number in no evaluation; the last adapters count", self.best.metric)
        elif standing.step == 0:
            logger.warning(
                "trainer.best: no evaluation was better than the one before the first step. The final exports hold the "
                "adapters that the run began with"
            )

    def _write_note(self) -> None:
        self.notes.pop(NOTE, None)
        if self.is_on:
            self.notes[NOTE] = self.standing.note()


def kept_like(trainer: TrainerConfig, model: CausalLM) -> Any:
    """A tree like the adapters that a run of these settings keeps; None if it keeps none."""
    return None if trainer.best.metric is None else eqx.filter(model, trainable_filter(model))


def refuse_unknown_metric(best: BestConfig, names: Collection[str]) -> None:
    """Raises ValueError unless evaluations log the metric. `names` are those of their metrics, without a prefix."""
    if best.metric is not None and best.metric.removeprefix(PREFIX) not in names:
        logged = ", ".join(PREFIX + name for name in names)
        raise ValueError(f"trainer.best.metric={best.metric} is not logged by the evaluations of this run: {logged}")


def _value_of(best: BestConfig, metrics: Mapping[str, float]) -> float:
    refuse_unknown_metric(best, metrics.keys())
    assert best.metric is not None
    return float(metrics[best.metric.removeprefix(PREFIX)])
