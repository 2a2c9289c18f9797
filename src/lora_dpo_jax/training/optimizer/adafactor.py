"""Adafactor: AdamW without momentum, whose squared gradients are kept as the means of rows and columns."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import haliax as hax
import jax
import jax.numpy as jnp
import optax
from haliax import NamedArray

from lora_dpo_jax.lora import map_factors
from lora_dpo_jax.training.optimizer.interface import Optimizer, scaled_by_rate
from lora_dpo_jax.training.optimizer.schedules import require


@dataclass(frozen=True)
class Adafactor(Optimizer):
    """transformers' Adafactor as its Trainer uses it: scale_parameter and relative_step are false."""

    # The mean of squared gradients decays at step t, from 1, by 1 - t ** decay_rate.
    decay_rate: float = -0.8
    clip_threshold: float = 1.0  # the largest root mean square of a matrix's update, before the learning rate
    epsilon: float = 1e-30  # added to squared gradients

    def __post_init__(self):
        super().__post_init__()
        require(-1 <= self.decay_rate < 0, "decay_rate", self.decay_rate, "in [-1, 0)")
        require(0 < self.clip_threshold < math.inf, "clip_threshold", self.clip_threshold, "positive, and finite")
        require(0 < self.epsilon < math.inf, "epsilon", self.epsilon, "above 0, and finite")

    def rule(self, schedule: optax.Schedule) -> optax.GradientTransformation:
        direction = _scale_by_factored_rms(self.decay_rate, self.clip_threshold, self.epsilon)
        return scaled_by_rate(direction, schedule, self.weight_decay)


class FactoredRms(NamedTuple):
    """Means of squared gradients, each in the place of its array, float32."""

    count: jax.Array  # int32: updates so far
    rows: Any  # {*stack, *rows}: of a matrix, the means over its columns; of a vector, the squares themselves
    columns: Any  # {*stack, *columns}: of a matrix, the means over its rows; of a vector, of no use: {*stack}


def _scale_by_factored_rms(decay_rate: float, threshold: float, epsilon: float) -> optax.GradientTransformation:
    """optax.scale_by_factored_rms and optax.clip_by_block_rms, but for each matrix of a stack alone.

    optax factors the two largest dimensions of an array, and one of these may number the layers.
    """

    def means(squares):
        rows = map_factors(lambda x, sides: _mean(x, *sides[1:]), squares)
        return rows, map_factors(lambda x, sides: _mean(x, sides[0]), squares)

    def init(params):
        return FactoredRms(jnp.zeros((), jnp.int32), *means(jax.tree.map(jnp.zeros_like, params)))

    def update(updates, state, params=None):
        del params
        count = state.count + 1
        share = count.astype(jnp.float32) ** decay_rate  # of the newest gradient
        new = means(jax.tree.map(lambda gradient: gradient * gradient + epsilon, updates))
        old = state.rows, state.columns
        rows, columns = jax.tree.map(lambda old, new: (1.0 - share) * old + share * new, old, new)

        def scaled(gradient: NamedArray, sides, rows: NamedArray, columns: NamedArray) -> NamedArray:
            if len(sides) == 2:
                scaled = gradient * hax.rsqrt(rows / _mean(rows, sides[0])) * hax.rsqrt(columns)
            else:
                scaled = gradient * hax.rsqrt(rows)
            rms = hax.sqrt(_mean(scaled * scaled, *sides))
            return (scaled / hax.maximum(rms / threshold, 1.0)).rearrange(gradient.axes)

        return map_factors(scaled, updates, rows, columns), FactoredRms(count, rows, columns)

    return optax.GradientTransformation(init, update)


def _mean(array: NamedArray, *sides: tuple[str, ...]) -> NamedArray:
    """The mean over the axes of some sides; the array itself without any."""
    names = [name for side in sides for name in side]
    return hax.mean(array, axis=names) if names else array
