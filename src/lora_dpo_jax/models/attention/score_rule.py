"""How products of queries and keys become the scores whose softmax weighs the values: one rule for every way of
computing attention, whole or block by block."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import Array


class ScoreRule(eqx.Module):
    """score = cap(scale * q.k), of keys that the mask and the window let through, beside one sink a head.

    Sinks are frozen weights: nothing gives a gradient to them.
    """

    scale: float = eqx.field(static=True)
    # score = softcap * tanh(score / softcap), as in Gemma 2 (section 2 of https://arxiv.org/abs/2408.00118)
    softcap: float | None = eqx.field(static=True, default=None)
    window: int | None = eqx.field(static=True, default=None)  # tokens: keys must be closer than this
    # float32 {kv_head, q_heads_per_group}: the score of a key without a value, which only takes weight from the others
    sinks: Any = None

    def scores(self, products: Array, unit: float = 1.0) -> Array:
        """Scores, times `unit`, of a block of products q.k, both float32; without window or sinks."""
        if self.softcap is None:
            return products * (self.scale * unit)
        return jnp.tanh(products * (self.scale / self.softcap)) * (self.softcap * unit)

    def slope(self, d_scores: Array, scores: Array, unit: float = 1.0) -> Array:
        """The gradient of a block of `scale * products` from that of their scores.

        `scores` are what `scores` gave for the same `unit`, before any mask.
        """
        if self.softcap is None:
            return d_scores
        return d_scores * (1.0 - jnp.square(scores / (self.softcap * unit)))
