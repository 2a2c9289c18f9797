"""What a micro-batch costs beside its tokens, in tokens: the constant by which a run chooses the lengths of its rows.

    python -m bench.micro_batches --shape 22m
    python -m bench.micro_batches --shape 8b --lora.r 64 --trainer.mp p=f32,c=bfloat16

The same pairs, all of one size, are trained on in short rows and in long ones, turn by turn. Per step both compute the
same tokens, and the short rows take more micro-batches: what they take longer is the fixed cost of these. Prints JSON.
`MICRO_BATCH_TOKENS` in data/shapes.py is the table that a run reads.
"""

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from bench.measure import emit, host
from bench.models import decoder_config
from bench.wiring import FastModel, Subject, Trainer, adapted_model
from lora_dpo_jax.data import MemoryExamples, PartShape, PreferenceBatch, TokenizedExample, whole_table
from lora_dpo_jax.data.shapes import LENGTH_MULTIPLE, StepShapes
from lora_dpo_jax.losses import Dpo
from lora_dpo_jax.preference_objective import PreferenceObjective
from lora_dpo_jax.runs.learner import Learner, real_learner
from lora_dpo_jax.runs.steps import Steps
from lora_dpo_jax.settings.arguments import parse
from lora_dpo_jax.sharding import Placement

RESPONSES = 0.75  # of a pair's tokens, about as in UltraFeedback


@dataclass(frozen=True)
class OneStep(Trainer):
    train_batch_size: int = 16


@dataclass(frozen=True)
class Options(Subject):
    model: FastModel = field(default_factory=FastModel)
    trainer: OneStep = field(default_factory=OneStep)
    pair_tokens: int = 512  # prompt + both responses; at least 256
    pairs_of_rows: list[int] = field(default_factory=lambda: [1, 8])  # of the short row, and of the long one
    steps: int = 7  # of each, of which the median counts

    def __post_init__(self):
        super().__post_init__()
        if len(self.pairs_of_rows) != 2 or not 1 <= self.pairs_of_rows[0] < self.pairs_of_rows[1]:
            raise ValueError(f"pairs_of_rows={self.pairs_of_rows} must be two positive numbers, the lower first")
        if self.pair_tokens < 256:
            raise ValueError(f"pair_tokens={self.pair_tokens} must be at least 256")


def main() -> None:
    options = parse(Options)
    emit(measure(options), options.out)


def measure(options: Options, devices: list | None = None) -> dict[str, Any]:
    placement = Placement(options.trainer.mesh, devices)
    learner = _learner(options, placement)
    batches = [batch_of(options, placement, pairs) for pairs in options.pairs_of_rows]
    seconds: list[list[float]] = [[], []]
    for turn in range(options.warmup + options.steps):
        for of_rows, batch in zip(seconds, batches, strict=True):
            began = time.perf_counter()
            metrics = learner(batch)
            jax.block_until_ready((learner.state, metrics))
            if turn >= options.warmup:
                of_rows.append(time.perf_counter() - began)
    micro_batches = [batch[0].tokens.axes[0].size for batch in batches]
    tokens = options.trainer.train_batch_size * options.pair_tokens // placement.row_shards
    device = placement.mesh.devices.flat[0]
    return {
        "shape": options.shape,
        "row_tokens": [pairs * options.pair_tokens for pairs in options.pairs_of_rows],
        **fixed_cost(micro_batches, [statistics.median(of_rows) for of_rows in seconds], tokens),
        "device": host() if device.platform == "cpu" else f"{placement.mesh.size} x {device.device_kind}",
        "load_average": round(os.getloadavg()[0], 2),
    }


def fixed_cost(micro_batches: Sequence[int], seconds: Sequence[float], tokens: int) -> dict[str, Any]:
    """Of two ways to compute a step's `tokens` (of a device): more micro-batches in the first, fewer in the second."""
    (many, few), (longer, shorter) = micro_batches, seconds
    fixed = (longer - shorter) / (many - few)
    of_token = (shorter - few * fixed) / tokens
    return {
        "micro_batches": [*micro_batches],
        "seconds": [round(value, 5) for value in seconds],
        "fixed_milliseconds": round(1e3 * fixed, 3),
        "microseconds_of_token": round(1e6 * of_token, 3),
        "micro_batch_tokens": round(fixed / of_token, 1),
    }


def _learner(options: Options, placement: Placement) -> Learner:
    model, total = adapted_model(options, placement), 2 * (options.warmup + options.steps)
    objective, key = PreferenceObjective(Dpo(), options.trainer.token_metrics), jax.random.key(1)
    return real_learner(objective, options.optimizer.build(total), model, placement, key=key)


def _steps(options: Options, placement: Placement, pairs_of_row: int) -> Steps:
    """One step in rows of that many pairs, without padding."""
    count, rows = options.trainer.train_batch_size, placement.row_shards
    if count % (pairs_of_row * rows):
        raise ValueError(
            f"trainer.train_batch_size={count} must be a multiple of {pairs_of_row} pairs (pairs_of_rows) x {rows} rows"
        )
    # Targets are rounded up to whole blocks, and here they are whole ones: padding of them is not counted as fixed.
    response = round(RESPONSES * options.pair_tokens) // LENGTH_MULTIPLE * LENGTH_MULTIPLE // 2
    rng, lengths = np.random.default_rng(0), (options.pair_tokens - 2 * response, response, response)
    vocab_size = decoder_config(options.shape).vocab_size
    pairs = [
        TokenizedExample.pair(*(rng.integers(3, vocab_size, length, np.int32) for length in lengths))
        for _ in range(count)
    ]
    shape = PartShape.of_pairs(
        micro_batches=count // (pairs_of_row * rows),
        rows=rows,
        row_length=pairs_of_row * options.pair_tokens,
        targets=pairs_of_row * 2 * response,
        pairs=pairs_of_row,
    )
    return Steps(whole_table({"pairs": MemoryExamples(pairs, "pairs")}), [np.arange(count)], StepShapes((shape,)))


def batch_of(options: Options, placement: Placement, pairs_of_row: int) -> tuple[PreferenceBatch, ...]:
    """The reference is known, so that nothing but the policy is computed."""
    steps = _steps(options, placement, pairs_of_row)
    return next(steps.batches(placement, reference=np.zeros(2 * len(steps.pairs), np.float32)))


if __name__ == "__main__":
    main()
