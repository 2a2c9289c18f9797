"""The library's parts put together as `main/train.py` puts them together, around pairs and weights made for measuring.

What is new in how a run is wired there belongs here too: everything else in this folder goes through `wire`.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import equinox as eqx
import jax
import jmp
import numpy as np
import optax

from bench import models
from lora_dpo_jax.data import PairLayout, PairOrder, PairTable, PreferenceBatch, RunLayout, packed_batches
from lora_dpo_jax.evaluation import PairScorer
from lora_dpo_jax.huggingface.weights import load_model
from lora_dpo_jax.lora import LoraConfig, loraize, trainable_filter, unwrap_lora
from lora_dpo_jax.losses import Dpo
from lora_dpo_jax.models import CausalLM
from lora_dpo_jax.models.quantization import quantize
from lora_dpo_jax.runs.setup import ModelConfig, layout_of_run
from lora_dpo_jax.sharding import Placement
from lora_dpo_jax.training.loop import TrainerConfig
from lora_dpo_jax.training.optimizer import OptimizerConfig
from lora_dpo_jax.training.step import TrainState, TrainStep


# A run's settings with other defaults. These are classes because a default object would be lost, and the usual defaults
# back in force, as soon as one of its settings is given on the command line.
@dataclass(frozen=True)
class Model(ModelConfig):
    gradient_checkpointing: str = "none"


@dataclass(frozen=True)
class FastModel(ModelConfig):
    gradient_checkpointing: str = "products"  # less to write and read than none


@dataclass(frozen=True)
class Lora(LoraConfig):
    r: int = 16
    alpha: float = 32.0


@dataclass(frozen=True)
class Optimizer(OptimizerConfig):
    learning_rate: float = 1e-4
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"


@dataclass(frozen=True)
class Trainer(TrainerConfig):
    train_batch_size: int = 4


@dataclass(frozen=True)
class Subject:
    """What is measured. `model`, `lora`, `optimizer` and `trainer` are the settings of a run: docs/configuration.md."""

    shape: str = "22m"  # one of profiles.SHAPES, with random weights; or the folder of a model
    data: str = "uf512"  # one of profiles.PROFILES; or a file of preferences (jsonl, parquet)
    tokenizer: str | None = None  # the folder of one, for a file
    train_seq_len: int = 1024  # tokens of prompt + one response; longer rows of a file are left out
    model: ModelConfig = field(default_factory=Model)
    layout: PairLayout = field(default_factory=PairLayout)
    lora: Lora = field(default_factory=Lora)
    optimizer: Optimizer = field(default_factory=Optimizer)
    trainer: Trainer = field(default_factory=Trainer)
    warmup: int = 2  # steps that do not count
    steps: int = 5  # that count
    out: str | None = None  # also write the JSON to this file

    def __post_init__(self):
        if self.warmup < 1 or self.steps < 1:
            raise ValueError(f"warmup={self.warmup} and steps={self.steps} must be positive")


@dataclass(frozen=True)
class Options(Subject):
    model: FastModel = field(default_factory=FastModel)
    pairs: int = 16  # the first ones of the data, in its order, over and over
    pairs_file: str | None = None  # token ids instead of `data`: what bench/compare.py gives every system
    reference: Literal["live", "cached"] = "cached"  # in every step, or computed once before the first

    def __post_init__(self):
        super().__post_init__()
        if self.reference not in ("live", "cached"):
            raise ValueError(f"reference={self.reference!r} must be live or cached")
        if self.pairs < 1:
            raise ValueError(f"pairs={self.pairs} must be positive")


@dataclass
class Wired:
    """A run, ready to go."""

    placement: Placement
    state: TrainState
    step: TrainStep
    batches: Iterator[tuple[PreferenceBatch, ...]]
    batch_ids: list[np.ndarray]  # the pairs of each step, warm-up and all
    layout: RunLayout
    reference_seconds: float | None  # what computing the reference's log-probs took; None: they are computed live


def wire(options: Options, pairs: PairTable, devices: list | None = None) -> Wired:
    """Everything up to the first step, on `devices` or on all there are."""
    trainer = options.trainer
    placement = Placement(trainer.mesh, devices)
    model = adapted_model(options, placement)
    num_steps = options.warmup + options.steps
    optimizer, schedule = options.optimizer.build(num_steps), options.optimizer.schedule(num_steps)

    order = PairOrder(tuple(pairs.sizes), trainer.seed, shuffle=False)
    batch_ids = [order.batch(n, trainer.train_batch_size) for n in range(num_steps)]
    parallelism = trainer.per_device_parallelism
    layout = layout_of_run(pairs, batch_ids, parallelism, options.layout, row_shards=placement.row_shards)
    reference, reference_seconds = None, None
    if options.reference == "cached":
        began = time.perf_counter()
        reference = reference_log_probs(model, pairs, placement)
        reference_seconds = time.perf_counter() - began
    return Wired(
        placement,
        new_state(model, optimizer, placement),
        TrainStep(Dpo(), optimizer, schedule=schedule, scope=placement.scope),
        packed_batches(pairs, batch_ids, layout, place=placement.put_batch, reference=reference),
        batch_ids,
        layout,
        reference_seconds,
    )


def adapted_model(options: Subject, placement: Placement) -> CausalLM:
    """Read from the folder or random, and with new adapters."""
    trainer = options.trainer
    config, compute = models.decoder_config(options.shape), options.model.compute
    dtype = trainer.precision.compute_dtype
    if options.model.dtype is not None:
        dtype = jmp.get_policy(options.model.dtype).param_dtype
    if _has_weights(options.shape):
        with placement.scope():
            base = load_model(
                Path(options.shape),
                config,
                dtype=dtype,
                compute=compute,
                mapping=placement.parameters,
                quantization=options.model.quantization,
            )
    else:
        base = models.random_model(config, compute, placement, dtype=dtype, seed=trainer.seed)
        base = quantize(base, options.model.quantization)
    model = loraize(base, options.lora, key=jax.random.key(trainer.seed))
    adapters, weights = eqx.partition(model, trainable_filter(model))
    adapters = jax.tree.map(lambda x: x.astype(trainer.precision.param_dtype), adapters)
    return eqx.combine(placement.put_parameters(adapters), weights)


def new_state(model: CausalLM, optimizer: optax.GradientTransformation, placement: Placement) -> TrainState:
    return placement.put_parameters(TrainState.init(model, optimizer, key=jax.random.key(1)))


def reference_log_probs(model: CausalLM, pairs: PairTable, placement: Placement) -> np.ndarray:
    """float32 [pair, chosen / rejected] of the model without its adapters, as an evaluation computes them."""
    score = PairScorer(pairs, rows=placement.row_shards, put_batch=placement.put_batch, scope=placement.scope)
    scores = score(unwrap_lora(model))
    return np.stack([np.asarray(scores.chosen.array), np.asarray(scores.rejected.array)], axis=1)


def _has_weights(shape: str) -> bool:
    folder = Path(shape)
    return shape not in models.SHAPES and any(folder.glob("*.safetensors"))
