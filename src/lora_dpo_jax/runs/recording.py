"""Keeps what a run's report shows, and writes the report at the end. A report that fails ends no run."""

import dataclasses
import json
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
from lora_dpo_jax.evaluation import comparisons_of
from lora_dpo_jax.losses import Loss, Scores
from lora_dpo_jax.processes.exchange import from_first_process, is_first_process
from lora_dpo_jax.report.page import write_report
from lora_dpo_jax.report.record import (
    Completions,
    Facts,
    HeldOut,
    Record,
    Scored,
    Sitting,
    array_of,
    now_in_words,
    numbers_of,
    read_record,
    write_record,
)
from lora_dpo_jax.runs.assembly import Run
from lora_dpo_jax.runs.best import BestAdapters
from lora_dpo_jax.runs.held_out import HeldOutScores
from lora_dpo_jax.runs.report import Samples
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
        scores: HeldOutScores,
        best: BestAdapters,
        samples: Samples,
        tokenizer: Any,
        *,
        first_step: int,
        began: float,
    ):
        """`began`: the start of the command, as a time of time.perf_counter. `first_step`: of this process."""
        self.run_dir, self.facts, self.tokenizer = run_dir, facts, tokenizer
        self.scores, self.best, self.samples, self.began = scores, best, samples, began
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
            if info.is_last:
                self._add_pairs(info)
                self.record = dataclasses.replace(
                    self.record, chosen_step=self.best.standing.step, notes=self.best.words()
                )
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
        """Keeps those of the first evaluation, and those of the adapters that would be exported after this one."""
        scores, is_new = self.scores, len(self.scores.scores) > self._evaluated
        self._evaluated = len(scores.scores)
        policy, margins = scores.last_scores, scores.last_margins
        if not is_new or policy is None or margins is None or not len(margins):
            return
        examples = scores.score.examples.arrays.examples
        moment = Scored(info.step, numbers_of(margins), numbers_of(_differences(policy, examples)))
        held_out = self.record.held_out or self._unscored()
        if info.step == 0:
            held_out = dataclasses.replace(held_out, before=moment)
        if self.best.standing.step in (None, info.step):
            held_out = dataclasses.replace(held_out, after=moment)
        self.record = dataclasses.replace(self.record, held_out=held_out)

    def _add_pairs(self, info: StepInfo[TrainState]) -> None:
        """Those that the final adapters have most right and most wrong. All processes must call this."""
        held_out, score = self.record.held_out, self.scores.score
        after = None if held_out is None else held_out.after
        # The evaluation may be of another process, which a resumed run has not seen: the first one has its record.
        margins = json.loads(from_first_process(json.dumps(None if after is None else after.margins)))
        if margins is not None:
            state = self.best.chosen(info).state
            right, wrong = most_right_and_wrong(score, state, array_of(margins), self.tokenizer)
            self.record = dataclasses.replace(self.record, most_right=right, most_wrong=wrong)

    def _unscored(self) -> HeldOut:
        """The held-out comparisons without the policy's scores."""
        table, reference = self.scores.score.examples, self.scores.reference_scores
        compared = comparisons_of(table)
        _, prompts = np.unique(compared.prompts, return_inverse=True)
        return HeldOut(
            compared.chosen_tokens.tolist(),
            compared.rejected_tokens.tolist(),
            prompts.tolist(),
            numbers_of(compared.weights),
            [] if reference is None else numbers_of(_differences(reference, table.arrays.examples)),
        )


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
