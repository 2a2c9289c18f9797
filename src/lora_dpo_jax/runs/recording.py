"""Keeps what a run's report shows, and writes the report at the end. A report that fails ends no run."""

import dataclasses
import logging
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lora_dpo_jax
from lora_dpo_jax.lora import equals_reference, reference_model
from lora_dpo_jax.losses import ComparisonLoss, Loss, Scores
from lora_dpo_jax.losses.mix import Mix
from lora_dpo_jax.processes.exchange import is_first_process
from lora_dpo_jax.report.page import write_report
from lora_dpo_jax.report.record import (
    Completions,
    Facts,
    HeldOut,
    Record,
    Scored,
    Sitting,
    now_in_words,
    numbers_of,
    read_record,
    write_record,
)
from lora_dpo_jax.runs.assembly import Run
from lora_dpo_jax.runs.report import HeldOutScores, Samples
from lora_dpo_jax.runs.shown_pairs import most_right_and_wrong
from lora_dpo_jax.training.loop import StepInfo
from lora_dpo_jax.training.step import TrainState

logger = logging.getLogger("lora_dpo_jax")

PACKAGES = ("jax", "jaxlib", "equinox", "marin-haliax", "optax", "transformers", "numpy")


class Recorder:
    """A hook that runs after evaluations and samples. All processes must call it; the first one writes."""

    def __init__(
        self,
        run_dir: Path,
        facts: Facts,
        loss: Loss,
        scores: HeldOutScores,
        samples: Samples,
        tokenizer: Any,
        *,
        first_step: int,
        began: float,
    ):
        """`began`: the start of the command, as a time of time.perf_counter. `first_step`: of this process."""
        self.run_dir, self.facts, self.loss, self.tokenizer = run_dir, facts, loss, tokenizer
        self.scores, self.samples, self.began = scores, samples, began
        self.sitting = Sitting(first_step, first_step, 0.0, now_in_words())
        self.record = Record()
        self._told, self._evaluated = len(samples.completions), len(scores.scores)
        with warned():
            if is_first_process():
                self.record = (read_record(run_dir) or Record()).until(first_step)

    def __call__(self, info: StepInfo[TrainState]) -> None:
        with warned():
            self._add_completions(info.step)
            self._add_scores(info)
            self._write(info.step)

    def finish(self) -> Path | None:
        """Writes report.html. None if that failed, or if this is not the first process."""
        if not is_first_process():
            return None
        with warned():
            self._write(self.sitting.last_step)
            return write_report(self.run_dir)
        return None

    def _write(self, step: int) -> None:
        self.sitting = dataclasses.replace(self.sitting, last_step=step, seconds=time.perf_counter() - self.began)
        if is_first_process():
            earlier = self.record.sittings
            write_record(
                self.run_dir,
                dataclasses.replace(
                    self.record, facts=self.facts, sittings=[*earlier, self.sitting], prompts=list(self.samples.prompts)
                ),
            )

    def _add_completions(self, step: int) -> None:
        if len(self.samples.completions) == self._told:
            return
        self._told = len(self.samples.completions)
        completed = Completions(step, self.samples.completions[-1])
        which = "completed_before" if step == 0 else "completed_after"
        self.record = dataclasses.replace(self.record, **{which: completed})

    def _add_scores(self, info: StepInfo[TrainState]) -> None:
        if len(self.scores.scores) == self._evaluated:
            return
        self._evaluated = len(self.scores.scores)
        is_last, earlier = info.step == self.facts.num_steps, self.record.held_out
        table = self.scores.score.examples
        if not table.arrays.comparison_counts.any():
            return
        if self.scores.last_scores is None and not (info.step == 0 or is_last):
            return  # a pass over the table for the report alone is made at the ends only
        policy, reference = self._scores_of(info.state)
        margins = reward_margins(self.loss, policy, reference, table.arrays.examples)
        moment = Scored(info.step, numbers_of(margins), numbers_of(_differences(policy, table.arrays.examples)))
        held_out = earlier or self._empty(reference)
        which = "before" if info.step == 0 else "after"
        self.record = dataclasses.replace(self.record, held_out=dataclasses.replace(held_out, **{which: moment}))
        if is_last:
            right, wrong = most_right_and_wrong(self.scores.score, info.state, margins, self.tokenizer)
            self.record = dataclasses.replace(self.record, most_right=right, most_wrong=wrong)

    def _scores_of(self, state: TrainState) -> tuple[Scores, Scores | None]:
        """Of the policy and, if the loss has one, of the reference."""
        scores = self.scores
        policy, reference = scores.last_scores, scores.reference_scores
        if self.loss.needs_reference and (reference is None or state.reference_moves):
            reference = scores.score(reference_model(state.model, state.reference))
        if policy is None:
            is_reference = reference is not None and equals_reference(state.model, state.reference)
            policy = reference if is_reference and reference is not None else scores.score(state.model)
        return policy, reference if self.loss.needs_reference else None

    def _empty(self, reference: Scores | None) -> HeldOut:
        """The held-out comparisons without the policy's scores."""
        examples = self.scores.score.examples.arrays.examples
        tokens = np.asarray(self.scores.score.examples.arrays.scored_tokens)
        chosen, rejected = (np.asarray(index.array) for index in (examples.chosen, examples.rejected))
        differences = [] if reference is None else numbers_of(_differences(reference, examples))
        shares = numbers_of(np.asarray(examples.share.array))
        numbers = np.asarray(examples.example_of_comparison.array).tolist()
        return HeldOut(tokens[chosen].tolist(), tokens[rejected].tolist(), numbers, shares, differences)


def reward_margins(loss: Loss, policy: Scores, reference: Scores | None, examples: Any) -> np.ndarray:
    """The reward of the chosen response less that of the rejected one, float32 [comparison].

    Rewards are those of the loss. A loss that needs more than the sums over responses is taken to have the rewards
    beta * log(policy / reference).
    """
    if isinstance(loss, Mix):
        return reward_margins(loss.losses[0], policy, reference, examples)
    if isinstance(loss, ComparisonLoss) and not loss.needs_tokens:

        @jax.jit
        def margins(policy: Scores, reference: Scores | None, examples: Any) -> jax.Array:
            chosen, rejected, *_ = loss.rewards(policy, reference, examples)
            return loss.beta * (chosen - rejected).array

        return np.asarray(margins(policy, reference, examples))
    of_reference = 0.0 if reference is None else _differences(reference, examples)
    return loss.beta * (_differences(policy, examples) - of_reference)


def _differences(scores: Scores, examples: Any) -> np.ndarray:
    """log p(chosen) - log p(rejected) in nats, float32 [comparison]."""
    log_probs = np.asarray(scores.log_probs.array, np.float32)
    return log_probs[np.asarray(examples.chosen.array)] - log_probs[np.asarray(examples.rejected.array)]


def facts_of(run: Run, loss: Loss) -> Facts:
    pairs, devices = run.data.pairs, list(run.learner.placement.mesh.devices.flat)
    versions = {"Python": platform.python_version(), "lora_dpo_jax": lora_dpo_jax.__version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # built from source under another name
            versions[package] = "unknown"
    return Facts(
        num_steps=len(run.steps),
        noun=pairs.arrays.noun,
        training=len(pairs),
        held_out=len(run.data.held_out),
        rows=" or ".join(f"{part.rows} x {part.row_length}" for part in run.steps.shapes.parts),
        devices=f"{len(devices)} x {devices[0].device_kind}",
        processes=jax.process_count(),
        versions=versions,
        loss_warning=loss.warning,
    )


@contextmanager
def warned() -> Iterator[None]:
    """While the block runs, an error is logged as a warning: the report is of no use to the run itself."""
    try:
        yield
    except Exception as error:
        logger.warning(
            "report.html could not be written (%s: %s). The run is not affected", type(error).__name__, error
        )
