"""The factors that a new adapter starts from."""

import math
from typing import Any

import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
from haliax import Axis, NamedArray

from lora_dpo_jax.axes import RANK
from lora_dpo_jax.lora.adapter import ByLayer, named_axes, stack_axes
from lora_dpo_jax.lora.config import LoraConfig
from lora_dpo_jax.lora.matrices import of_matrices
from lora_dpo_jax.tensor_names import axes_of


def new_factors(layer: Any, config: LoraConfig, by_layer: ByLayer | None, *, key) -> tuple[NamedArray, NamedArray]:
    """Float32 A {*stack, lora_rank, *In} and B {*stack, *Out, lora_rank}: each layer of a stack has its own.

    A layer whose rank is that of `config` starts the same whatever the ranks of the others.
    """
    ranks = {config.r} if by_layer is None else set(by_layer.ranks) - {0}
    scaling = config.scaling if by_layer is None else by_layer.scaling
    if len(ranks) == 1:
        return _draw(layer, config, next(iter(ranks)), scaling, key=key)
    assert by_layer is not None
    stack, largest = named_axes(layer), max(ranks)
    of_layers = np.reshape(by_layer.ranks, [axis.size for axis in stack])
    lora_A, lora_B = jax.tree.map(_zeros, jax.eval_shape(lambda: _draw(layer, config, largest, scaling, key=key)))
    for rank in sorted(ranks):
        drawn = _draw(layer, config, rank, scaling, key=key if rank == config.r else jax.random.fold_in(key, rank))
        has_rank = hax.named(jnp.asarray(of_layers == rank), stack)
        A, B = (_padded(factor, largest) for factor in drawn)
        lora_A = hax.where(has_rank, A, lora_A).rearrange(A.axes)
        lora_B = hax.where(has_rank, B, lora_B).rearrange(B.axes)
    return lora_A, lora_B


def _padded(factor: NamedArray, rank: int) -> NamedArray:
    """With zeros up to `rank`."""
    return hax.pad(factor, {RANK: (0, rank - factor.axis_size(RANK))})


def _zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(shape.shape, shape.dtype)


def _draw(layer: Any, config: LoraConfig, rank: int, scaling: Any, *, key) -> tuple[NamedArray, NamedArray]:
    """A and B of one rank for all layers of the stack."""
    if config.a_init in OF_WEIGHTS:
        return _from_weights(layer, config.a_init, rank, scaling)
    Rank = Axis(RANK, rank)
    In, Out, stack = axes_of(layer.In), axes_of(layer.Out), stack_axes(layer)
    k_A, k_B = jax.random.split(key)
    A_axes, B_axes = stack + (Rank,) + In, stack + Out + (Rank,)
    if config.a_init == "orthogonal":
        return _orthogonal(key, stack, rank, A_axes, B_axes)
    fan_in = math.prod(axis.size for axis in In)
    if config.a_init == "zero":
        return hax.zeros(A_axes), _kaiming_uniform(k_B, B_axes, rank)
    if config.a_init == "gaussian":
        lora_A = hax.random.normal(k_A, A_axes, dtype=jnp.float32) / rank
    else:
        lora_A = _kaiming_uniform(k_A, A_axes, fan_in)
    return lora_A, hax.zeros(B_axes) if config.zero_init_b else _kaiming_uniform(k_B, B_axes, rank)


def _orthogonal(key, stack, rank: int, A_axes, B_axes) -> tuple[NamedArray, NamedArray]:
    """A and B in orthogonal halves of the space of ranks, as PEFT draws them: B A is zero up to rounding."""
    k_Q, k_A, k_B = jax.random.split(key, 3)
    leading = [axis.size for axis in stack]

    def normal(key, *shape: int) -> jax.Array:
        return jax.random.normal(key, (*leading, *shape), jnp.float32)

    def size(axes: tuple[Axis, ...]) -> int:
        return math.prod(axis.size for axis in axes if axis not in stack) // rank

    Q = jnp.linalg.qr(normal(k_Q, rank, rank))[0]
    A = jnp.matrix_transpose(Q[..., 0::2, :]) @ normal(k_A, rank // 2, size(A_axes)) / 10
    B = normal(k_B, size(B_axes), rank // 2) @ Q[..., 1::2, :] / 10
    return _named(A, A_axes), _named(B, B_axes)


def _from_weights(layer: Any, a_init: str, rank: int, scaling: Any) -> tuple[NamedArray, NamedArray]:
    In, Out, stack = axes_of(layer.In), axes_of(layer.Out), stack_axes(layer)
    most = min(math.prod(axis.size for axis in side) for side in (In, Out))
    if rank > most:
        raise ValueError(
            f"lora.a_init={a_init} takes a layer's factors from its weight, of which {sorted(a.name for a in In)} -> "
            f"{sorted(a.name for a in Out)} has {most}: lora.r={rank} must be at most that, or leave the layer out"
        )
    each = scaling.array if isinstance(scaling, NamedArray) else jnp.full([axis.size for axis in stack], scaling)
    A, B = of_matrices(OF_WEIGHTS[a_init], layer, jnp.where(each > 0, each, 1.0), rank=rank)
    Rank = Axis(RANK, rank)
    return _named(A, (*stack, Rank, *In)), _named(B, (*stack, *Out, Rank))


def _pissa(weight: jax.Array, scaling: jax.Array, *, rank: int) -> tuple[jax.Array, jax.Array]:
    """The largest singular values and vectors (https://arxiv.org/abs/2404.02948), with scaling * B A in the weight."""
    U, S, Vt = jnp.linalg.svd(weight, full_matrices=False)
    root = jnp.sqrt(S[:rank] / scaling)
    return root[:, None] * Vt[:rank], U[:, :rank] * root


def _olora(weight: jax.Array, scaling: jax.Array, *, rank: int) -> tuple[jax.Array, jax.Array]:
    """The first rows of R and columns of Q (https://arxiv.org/abs/2406.01775)."""
    del scaling
    Q, R = jnp.linalg.qr(weight)
    return R[:rank], Q[:, :rank]


OF_WEIGHTS = {"pissa": _pissa, "olora": _olora}


def _named(array: jax.Array, axes: tuple[Axis, ...]) -> NamedArray:
    return hax.named(array.reshape([axis.size for axis in axes]), axes)


def _kaiming_uniform(key, axes: tuple[Axis, ...], fan_in: int) -> NamedArray:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): torch's kaiming_uniform with a = sqrt(5), PEFT's default."""
    bound = 1 / math.sqrt(fan_in)
    return hax.random.uniform(key, axes, minval=-bound, maxval=bound, dtype=jnp.float32)
