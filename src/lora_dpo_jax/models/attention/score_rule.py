"""The rule that turns products of queries and keys into attention scores. All implementations of attention share it."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import Array


class ScoreRule(eqx.Module):
    """score = cap(scale * q.k) for the keys that mask and window allow, beside one sink a head.

    Sinks are frozen weights and get no gradient.
    """

    scale: float = eqx.field(static=True)
    # score = softcap * tanh(score / softcap), as in Gemma 2 (section 2 of https://arxiv.org/abs/2408.00118)
    softcap: float | None = eqx.field(static=True, default=None)
    window: int | None = eqx.field(static=True, default=None)  # tokens: keys must be closer than this
    # float32 {kv_head, q_heads_per_group}: the score of a key without a value, which only takes weight from other keys
    sinks: Any = None

    def scores(self, products: Array, unit: float = 1.0) -> Array:
        """The scores, times `unit`, of a block of products q.k, both float32. Ignores window and sinks."""
        if self.softcap is None:
            return products * (self.scale * unit)
        return jnp.tanh(products * (self.scale / self.softcap)) * (self.softcap * unit)

    def slope(self, d_scores: Array, scores: Array, unit: float = 1.0) -> Array:
        """The gradient of a block of `scale * products`, from the gradient of its scores.

        The argument `scores` is the result of the method `scores` for the same `unit`, before any mask.
        """
        if self.softcap is None:
            return d_scores
        return d_scores * (1.0 - jnp.square(scores / (self.softcap * unit)))
