"""The factors that a new adapter starts from."""

import math
from typing import Any

import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
from haliax import Axis, NamedArray

from lora_dpo_jax.axes import RANK
from lora_dpo_jax.lora.adapter import ByLayer, stack_axes
from lora_dpo_jax.lora.config import LoraConfig
from lora_dpo_jax.tensor_names import axes_of


def new_factors(layer: Any, config: LoraConfig, by_layer: ByLayer | None, *, key) -> tuple[NamedArray, NamedArray]:
    """Float32 A {*stack, lora_rank, *In} and B {*stack, *Out, lora_rank}: each layer of a stack has its own.

    A layer whose rank is that of `config` starts the same whatever the ranks of the others.
    """
    ranks = {config.r} if by_layer is None else set(by_layer.ranks) - {0}
    if len(ranks) == 1:
        return _draw(layer, config, *ranks, key=key)
    assert by_layer is not None
    stack, largest = stack_axes(layer), max(ranks)
    of_layers = np.reshape(by_layer.ranks, [axis.size for axis in stack])
    lora_A, lora_B = jax.tree.map(jnp.zeros_like, _draw(layer, config, largest, key=key))
    for rank in sorted(ranks):
        drawn = _draw(layer, config, rank, key=key if rank == config.r else jax.random.fold_in(key, rank))
        has_rank = hax.named(jnp.asarray(of_layers == rank), stack)
        A, B = (_padded(factor, largest) for factor in drawn)
        lora_A = hax.where(has_rank, A, lora_A).rearrange(A.axes)
        lora_B = hax.where(has_rank, B, lora_B).rearrange(B.axes)
    return lora_A, lora_B


def _padded(factor: NamedArray, rank: int) -> NamedArray:
    """With zeros up to `rank`."""
    return hax.pad(factor, {RANK: (0, rank - factor.axis_size(RANK))})


def _draw(layer: Any, config: LoraConfig, rank: int, *, key) -> tuple[NamedArray, NamedArray]:
    """A and B of one rank for all layers of the stack."""
    Rank = Axis(RANK, rank)
    In, Out, stack = axes_of(layer.In), axes_of(layer.Out), stack_axes(layer)
    k_A, k_B = jax.random.split(key)
    A_axes, B_axes = stack + (Rank,) + In, stack + Out + (Rank,)
    zero_A = config.a_init == "zero"
    zero_B = config.zero_init_b and not zero_A
    fan_in = math.prod(axis.size for axis in In)
    lora_A = hax.zeros(A_axes) if zero_A else _kaiming_uniform(k_A, A_axes, fan_in)
    lora_B = hax.zeros(B_axes) if zero_B else _kaiming_uniform(k_B, B_axes, rank)
    return lora_A, lora_B


def _kaiming_uniform(key, axes: tuple[Axis, ...], fan_in: int) -> NamedArray:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): torch's kaiming_uniform with a = sqrt(5), PEFT's default."""
    bound = 1 / math.sqrt(fan_in)
    return hax.random.uniform(key, axes, minval=-bound, maxval=bound, dtype=jnp.float32)
