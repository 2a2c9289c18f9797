"""A run assembled by the functions of `lora_dpo_jax.runs`, around pairs and weights made for measuring."""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from bench import models
from lora_dpo_jax.data import ExampleOrder, ExampleTable, PackingConfig
from lora_dpo_jax.evaluation import Scorer
from lora_dpo_jax.lora import LoraConfig, unwrap_lora
from lora_dpo_jax.losses import Dpo, Loss
from lora_dpo_jax.models import CausalLM
from lora_dpo_jax.models.quantization import quantize
from lora_dpo_jax.preference_objective import PreferenceObjective
from lora_dpo_jax.runs.base import load_weights, with_new_adapters
from lora_dpo_jax.runs.config import ModelConfig
from lora_dpo_jax.runs.learner import Learner, real_learner
from lora_dpo_jax.runs.steps import Steps, lay_out_steps
from lora_dpo_jax.sharding import Placement
from lora_dpo_jax.training.loop import TrainerConfig
from lora_dpo_jax.training.optimizer import AdamW, Optimizer


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
    layout: PackingConfig = field(default_factory=PackingConfig)
    lora: Lora = field(default_factory=Lora)
    optimizer: Optimizer = field(default_factory=lambda: AdamW(learning_rate=1e-4, lr_schedule="constant"))
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
    responses: int = 2  # to a prompt of a profile; more are ranked lists, of which each comparison counts as a pair
    apart: bool = False  # the comparisons of a ranked list as pairs of their own, with its prompt in each
    loss: Loss = field(default_factory=Dpo)
    reference: Literal["live", "cached"] = "cached"  # in every step, or computed once before the first
    profile: str | None = None  # a folder for JAX's profile of one more step

    @property
    def all_steps(self) -> int:
        return self.warmup + self.steps + (self.profile is not None)

    def __post_init__(self):
        super().__post_init__()
        if self.reference not in ("live", "cached"):
            raise ValueError(f"reference={self.reference!r} must be live or cached")
        if self.pairs < 1:
            raise ValueError(f"pairs={self.pairs} must be positive")
        if self.responses < 2:
            raise ValueError(f"responses={self.responses} must be at least 2")

    @property
    def comparisons(self) -> int:
        """Of one example."""
        return 1 if self.apart else math.comb(self.responses, 2)


@dataclass(frozen=True)
class Wired:
    """A run, ready to go."""

    learner: Learner
    steps: Steps  # warm-up and all
    reference: np.ndarray | None  # the reference's log-probs, float32 [response]; None: none, or each step's own
    reference_seconds: float | None  # what computing them took


def wire(options: Options, pairs: ExampleTable, devices: list | None = None) -> Wired:
    """Everything up to the first step, on `devices` or on all there are."""
    trainer = options.trainer
    placement = Placement(trainer.mesh, devices)
    model = adapted_model(options, placement)
    num_steps = options.all_steps
    order = ExampleOrder(tuple(pairs.counts), trainer.seed, shuffle=False)
    ids = [order.batch(n, trainer.train_batch_size) for n in range(num_steps)]
    parallelism, row_shards = trainer.per_device_parallelism, placement.row_shards
    steps = lay_out_steps(pairs, ids, options.layout, parallelism=parallelism, row_shards=row_shards)
    reference, reference_seconds = None, None
    if options.reference == "cached" and options.loss.needs_reference and not options.loss.needs_tokens_of_reference:
        began = time.perf_counter()
        reference = reference_log_probs(model, pairs, placement)
        reference_seconds = time.perf_counter() - began
    optimizer, schedule = options.optimizer.build(num_steps), options.optimizer.schedule(num_steps)
    objective, key = PreferenceObjective(options.loss, trainer.token_metrics), jax.random.key(1)
    learner = real_learner(objective, optimizer, model, placement, key=key, schedule=schedule)
    return Wired(learner, steps, reference, reference_seconds)


def adapted_model(options: Subject, placement: Placement) -> CausalLM:
    """Read from the folder or random, and with new adapters."""
    trainer, settings = options.trainer, options.model
    decoder, precision = models.decoder_config(options.shape), trainer.precision
    if _has_weights(options.shape):
        folder = Path(options.shape)
        base = load_weights(folder, decoder, settings, placement, compute_dtype=precision.compute_dtype)
    else:
        dtype = settings.weights_dtype(precision.compute_dtype)
        base = models.random_model(decoder, settings.compute, placement, dtype=dtype, seed=trainer.seed)
        base = quantize(base, settings.quantization)
    key = jax.random.key(trainer.seed)
    return with_new_adapters(base, options.lora, placement, dtype=precision.param_dtype, key=key)


def reference_log_probs(model: CausalLM, pairs: ExampleTable, placement: Placement) -> np.ndarray:
    """float32 [response of `pairs`] of the model without its adapters, as an evaluation computes them."""
    score = Scorer(pairs, rows=placement.row_shards, put_batch=placement.put_batch, scope=placement.scope)
    scores = score(unwrap_lora(model))
    return np.asarray(scores.log_probs.array)


def _has_weights(shape: str) -> bool:
    folder = Path(shape)
    return shape not in models.SHAPES and any(folder.glob("*.safetensors"))
