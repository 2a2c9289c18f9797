"""A train step with the state that it starts from: arrays on their devices, or their shapes alone."""

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jmp
import optax

from lora_dpo_jax.lora import LoraConfig, frozen_copy, loraize, trainable_filter
from lora_dpo_jax.models import CausalLM, DecoderConfig
from lora_dpo_jax.models.quantization import quantize
from lora_dpo_jax.preference_objective import PreferenceObjective
from lora_dpo_jax.runs.config import ModelConfig
from lora_dpo_jax.sharding import Placement
from lora_dpo_jax.training.reference_sync import ReferenceSync
from lora_dpo_jax.training.step import StepMetrics, TrainState, TrainStep


@dataclass
class Learner:
    """A step, the state that it takes next, and the devices of both."""

    placement: Placement
    step: TrainStep
    state: TrainState  # arrays, or ShapeDtypeStructs with their shardings

    def __call__(self, batch: Any) -> StepMetrics:
        """Takes a step, and keeps the new state."""
        self.state, metrics = self.step(self.state, batch)
        return metrics

    def compile(self, batch: Any) -> Any:
        """The compiled step, to ask for its memory and cost. `batch` is arrays, or shapes with their shardings."""
        return self.step.compile(self.state, batch)


def real_learner(
    objective: PreferenceObjective,
    optimizer: optax.GradientTransformation,
    model: CausalLM,
    placement: Placement,
    *,
    key,
    reference: Any = None,
    reference_sync: ReferenceSync | None = None,
    schedule: optax.Schedule | None = None,
) -> Learner:
    """`model` has adapters, `key` is for dropout. For the rest see TrainState and TrainStep."""
    moves = reference_sync is not None and reference_sync.moves
    state = TrainState.init(model, optimizer, key=key, reference=reference, reference_moves=moves)
    return _learner(objective, optimizer, placement, placement.put_parameters(state), schedule, reference_sync)


def abstract_learner(
    objective: PreferenceObjective,
    optimizer: optax.GradientTransformation,
    decoder: DecoderConfig,
    placement: Placement,
    *,
    lora: LoraConfig,
    model: ModelConfig,
    precision: jmp.Policy,
    has_reference_adapters: bool = False,
    reference_sync: ReferenceSync | None = None,
) -> Learner:
    """A learner of shapes alone: it compiles without weights, and for devices that are not here."""

    def make() -> TrainState:
        dtype = model.weights_dtype(precision.compute_dtype)
        base = CausalLM.init(decoder, model.compute, key=jax.random.key(0))
        base = quantize(jax.tree.map(lambda x: x.astype(dtype), base), model.quantization)
        policy = loraize(base, lora, key=jax.random.key(0))
        adapters, weights = eqx.partition(policy, trainable_filter(policy))
        policy = eqx.combine(jax.tree.map(lambda x: x.astype(precision.param_dtype), adapters), weights)
        reference = frozen_copy(policy) if has_reference_adapters else None
        moves = reference_sync is not None and reference_sync.moves
        return TrainState.init(policy, optimizer, key=jax.random.key(1), reference=reference, reference_moves=moves)

    with placement.scope():  # the order of a weight's axes may depend on the platform
        shapes = eqx.filter_eval_shape(make)
    state = placement.abstract_parameters(shapes)
    return _learner(objective, optimizer, placement, state, None, reference_sync)


def _learner(
    objective: PreferenceObjective,
    optimizer: optax.GradientTransformation,
    placement: Placement,
    state: TrainState,
    schedule: optax.Schedule | None,
    reference_sync: ReferenceSync | None,
) -> Learner:
    step = TrainStep(objective, optimizer, schedule=schedule, reference_sync=reference_sync, scope=placement.scope)
    return Learner(placement, step, state)
