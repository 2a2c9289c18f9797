"""What the compiled step takes of a device's memory, by XLA's own account, on devices that need not be here:

    python -m bench.memory --shape 8b --row_lengths '[2048, 4096, 8192, 16384]'
    python -m bench.memory --shape 8b --topology v5e:4x4 --trainer.train_batch_size 128 --train_seq_len 4096

Compiles with libtpu (`pip install -e '.[tpu]'`), which needs no TPU. Nothing is executed and no weight exists: the
shape of a model is all that is needed. Prints a table and JSON.
"""

import time
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from bench import models
from bench import pairs as benchmark_pairs
from bench.measure import emit
from bench.wiring import Lora, Subject, Trainer
from lora_dpo_jax.cost.devices import devices_of_topology
from lora_dpo_jax.cost.memory import ProgramMemory, largest_arrays
from lora_dpo_jax.data import PartShape, PreferenceBatch
from lora_dpo_jax.data.packing import pack
from lora_dpo_jax.losses import Dpo
from lora_dpo_jax.preference_objective import PreferenceObjective
from lora_dpo_jax.runs.config import ModelConfig
from lora_dpo_jax.runs.learner import Learner, abstract_learner
from lora_dpo_jax.runs.steps import lay_out_steps
from lora_dpo_jax.settings.arguments import parse
from lora_dpo_jax.sharding import Placement


@dataclass(frozen=True)
class LargeModel(ModelConfig):
    gradient_checkpointing: str = "full"


@dataclass(frozen=True)
class LargeLora(Lora):
    r: int = 64


@dataclass(frozen=True)
class LargeTrainer(Trainer):
    train_batch_size: int = 128


@dataclass(frozen=True)
class Options(Subject):
    shape: str = "8b"
    data: str = "ultrafeedback"
    model: LargeModel = field(default_factory=LargeModel)
    lora: LargeLora = field(default_factory=LargeLora)
    trainer: LargeTrainer = field(default_factory=LargeTrainer)
    topology: str = "v5p:2x2x1"
    devices: int | None = None  # the first ones of the topology; all by default
    reference: Literal["live", "cached"] = "live"
    row_lengths: list[int] = field(default_factory=list)  # tokens; by default what a run on `data` would choose


def main() -> None:
    options = parse(Options)
    where = placement(options)
    rows = [measure(options, where, parts) for parts in batches(options, where)]
    print(markdown(rows))
    emit(
        {"shape": options.shape, "topology": options.topology, "devices": where.mesh.size, "programs": rows},
        options.out,
    )


def placement(options: Options) -> Placement:
    """Over devices that are only described."""
    return Placement(options.trainer.mesh, devices_of_topology(options.topology)[1][: options.devices])


def measure(options: Options, placement: Placement, parts: tuple[PreferenceBatch, ...]) -> dict[str, Any]:
    """Of the step compiled for a batch, given as shapes: MB of a device."""
    learner = learner_of(options, placement)
    began = time.perf_counter()
    compiled = learner.compile(placement.abstract_batch(parts))
    memory = ProgramMemory.of(compiled)
    return {
        "rows": " + ".join(" x ".join(str(axis.size) for axis in part.tokens.axes) for part in parts),
        "arguments_mb": memory.arguments / 1e6,
        "temporary_mb": memory.temporary / 1e6,
        "program_mb": memory.code / 1e6,
        "total_mb": memory.total / 1e6,
        "largest_arrays": largest_arrays(compiled.as_text()),
        "compile_seconds": time.perf_counter() - began,
    }


def learner_of(options: Options, placement: Placement) -> Learner:
    return abstract_learner(
        PreferenceObjective(Dpo()),
        options.optimizer.build(options.warmup + options.steps),
        models.decoder_config(options.shape),
        placement,
        lora=options.lora,
        model=options.model,
        precision=options.trainer.precision_on(placement.mesh.devices.flat[0].platform),
    )


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| micro x rows x tokens | arguments MB | temporary MB | program MB | total MB | largest arrays | compile s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['rows']} | {row['arguments_mb']:,.0f} | {row['temporary_mb']:,.0f} | {row['program_mb']:,.0f} "
            f"| {row['total_mb']:,.0f} | {', '.join(row['largest_arrays'])} | {row['compile_seconds']:.0f} |"
        )
    return "\n".join(lines)


def batches(options: Options, placement: Placement) -> list[tuple[PreferenceBatch, ...]]:
    """One of full rows for each length asked for, or what a step of the data's pairs is laid into."""
    if options.row_lengths:
        layouts = [
            (PartShape.of_pairs(2, placement.row_shards, length, targets=length, pairs=length // 128),)
            for length in options.row_lengths
        ]
    else:
        count = options.trainer.train_batch_size
        vocab_size = models.decoder_config(options.shape).vocab_size
        pairs = benchmark_pairs.load(
            options.data, count, vocab_size=vocab_size, tokenizer=options.tokenizer, cap=options.train_seq_len
        )
        parallelism = options.trainer.per_device_parallelism
        ids, row_shards = [np.arange(count)], placement.row_shards
        with placement.scope():  # a micro-batch costs what it costs these devices
            steps = lay_out_steps(pairs, ids, options.layout, parallelism=parallelism, row_shards=row_shards)
        layouts = [steps.shapes.parts]
    return [tuple(_empty(layout, options.reference) for layout in parts) for parts in layouts]


def _empty(layout: PartShape, reference: str) -> PreferenceBatch:
    known = (lambda number: np.zeros(2, np.float32)) if reference == "cached" else None
    return pack([], [], layout, known)


if __name__ == "__main__":
    main()
