"""AdamW whose state is in 8 bits: a quarter of the memory, block by block.

The mean of gradients takes the signed dynamic map. Of the mean of squared gradients, the root takes the unsigned map:
it spans half as many decades as the mean itself, which bitsandbytes stores. docs/optimizers.md has the errors of both.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import optax
from haliax import NamedArray

from lora_dpo_jax.axes import RANK
from lora_dpo_jax.dynamic_map import dynamic_code, dynamic_value
from lora_dpo_jax.lora import map_factors
from lora_dpo_jax.training.optimizer.adamw import Moments
from lora_dpo_jax.training.optimizer.interface import scaled_by_rate


@dataclass(frozen=True)
class AdamW8bit(Moments):
    """AdamW with two bytes of state a number of A and B, and 8 bytes for each of their blocks.

    A block is all ranks at one input of A, or at one output of B. The rest, DoRA's magnitudes and rows of tokens, stays
    in float32, as small arrays and embeddings do in bitsandbytes.
    """

    def rule(self, schedule: optax.Schedule) -> optax.GradientTransformation:
        direction = _scale_by_adam_8bit(self.beta1, self.beta2, self.epsilon)
        return scaled_by_rate(direction, schedule, self.weight_decay)


class Blocks(eqx.Module):
    """An array in 8 bits."""

    codes: NamedArray  # uint8, with the axes of the array
    absmax: NamedArray  # float32, without the axis of ranks
    signed: bool = eqx.field(static=True)

    @staticmethod
    def of(array: NamedArray, *, signed: bool) -> "Blocks | NamedArray":
        """The array itself if it has no ranks."""
        if RANK not in array.axis_names:
            return array
        absmax = hax.max(hax.abs(array), axis=RANK)
        share = (array / hax.where(absmax > 0, absmax, 1.0)).rearrange(array.axes)
        codes = dynamic_code(share.array, signed=signed)
        if not signed:  # nothing but zero becomes zero
            codes = jnp.maximum(codes, (share.array > 0).astype(jnp.uint8))
        return Blocks(hax.named(codes, array.axes), absmax, signed)

    def values(self) -> NamedArray:
        """float32, with the axes of the array."""
        values = hax.named(dynamic_value(self.codes.array, signed=self.signed), self.codes.axes)
        return (values * self.absmax).rearrange(self.codes.axes)


class Moments8bit(NamedTuple):
    count: jax.Array  # int32: updates so far
    mean: Any  # Blocks in the place of each array with ranks
    root: Any  # of the mean of squares, likewise


def _scale_by_adam_8bit(beta1: float, beta2: float, epsilon: float) -> optax.GradientTransformation:
    """optax.scale_by_adam. The update is made of the new means before they are rounded, as in bitsandbytes."""

    def blocks(tree: Any, *, signed: bool) -> Any:
        return map_factors(lambda array, sides: Blocks.of(array, signed=signed), tree)

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return Moments8bit(jnp.zeros((), jnp.int32), blocks(zeros, signed=True), blocks(zeros, signed=False))

    def update(updates, state, params=None):
        del params
        count = state.count + 1
        mean = jax.tree.map(lambda g, old: beta1 * old + (1 - beta1) * g, updates, _values(state.mean))
        square = jax.tree.map(lambda g, old: beta2 * old**2 + (1 - beta2) * g * g, updates, _values(state.root))
        bias1, bias2 = (1 - jnp.float32(beta) ** count for beta in (beta1, beta2))
        scaled = jax.tree.map(lambda m, v: (m / bias1) / (jnp.sqrt(v / bias2) + epsilon), mean, square)
        root = jax.tree.map(jnp.sqrt, square)
        return scaled, Moments8bit(count, blocks(mean, signed=True), blocks(root, signed=False))

    return optax.GradientTransformation(init, update)


def _values(tree: Any) -> Any:
    is_blocks = lambda node: isinstance(node, Blocks)  # noqa: E731
    return jax.tree.map(lambda node: node.values() if is_blocks(node) else node, tree, is_leaf=is_blocks)
