"""The state of a run as shapes alone: for compiling a step without arrays, or without the devices."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from lora_dpo_jax.lora import LoraConfig, frozen_copy, loraize, trainable_filter
from lora_dpo_jax.models import CausalLM, ComputeConfig, DecoderConfig
from lora_dpo_jax.models.compute import DEFAULT_COMPUTE
from lora_dpo_jax.models.quantization import quantize
from lora_dpo_jax.sharding import Placement
from lora_dpo_jax.training.step import TrainState


def describe_state(
    decoder: DecoderConfig,
    lora: LoraConfig,
    optimizer: optax.GradientTransformation,
    placement: Placement,
    *,
    dtype: Any,
    adapter_dtype: Any = jnp.float32,
    compute: ComputeConfig = DEFAULT_COMPUTE,
    quantization: str = "none",
    with_frozen_adapters: bool = False,
) -> TrainState:
    """The state of a run as ShapeDtypeStructs that lie where the run's arrays would."""

    def make() -> TrainState:
        base = CausalLM.init(decoder, compute, key=jax.random.key(0))
        base = quantize(jax.tree.map(lambda x: x.astype(dtype), base), quantization)
        model = loraize(base, lora, key=jax.random.key(0))
        adapters, weights = eqx.partition(model, trainable_filter(model))
        model = eqx.combine(jax.tree.map(lambda x: x.astype(adapter_dtype), adapters), weights)
        reference = frozen_copy(model) if with_frozen_adapters else None
        return TrainState.init(model, optimizer, key=jax.random.key(1), reference=reference)

    return placement.describe_parameters(eqx.filter_eval_shape(make))


def bytes_of_a_device(tree: Any) -> int:
    """Of its shards of the arrays of `tree`, which are described or real."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )
