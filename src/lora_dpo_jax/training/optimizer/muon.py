"""Muon: momentum whose matrices are made orthogonal; AdamW for all that is no factor A or B."""

import math
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import optax
from haliax import NamedArray
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from lora_dpo_jax.axes import RANK
from lora_dpo_jax.lora import map_factors
from lora_dpo_jax.training.optimizer.adamw import Moments
from lora_dpo_jax.training.optimizer.interface import scaled_by_rate
from lora_dpo_jax.training.optimizer.schedules import is_decay, require

Sides = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Muon(Moments):
    """https://kellerjordan.github.io/posts/muon by optax, for A and B of each layer alone; the rest has AdamW.

    DoRA's magnitudes and rows of tokens are the rest: they take `beta1`, `beta2` and `epsilon`.
    """

    momentum: float = 0.95  # decay of the running mean of gradients
    nesterov: bool = True  # looks ahead by one step of momentum
    ns_steps: int = 5  # Newton-Schulz iterations that make a matrix orthogonal
    # The root mean square of a matrix's update before the learning rate, whatever its shape: with 0.2, a learning rate
    # of AdamW fits (https://arxiv.org/abs/2502.16982; match_rms_adamw in torch). null: the orthogonal matrix itself
    # times sqrt(max(1, rows / columns)), as in torch by default. Its learning rates are about 0.001 to 0.02.
    consistent_rms: float | None = 0.2

    def __post_init__(self):
        super().__post_init__()
        require(is_decay(self.momentum), "momentum", self.momentum, "in [0, 1), in float32 too")
        require(1 <= self.ns_steps < 100, "ns_steps", self.ns_steps, "at least 1, and below 100")
        rms = 1.0 if self.consistent_rms is None else self.consistent_rms
        require(0 < rms < math.inf, "consistent_rms", self.consistent_rms, "a positive number, or null")

    def rule(self, schedule: optax.Schedule) -> optax.GradientTransformation:
        direction = optax.chain(
            scale_by_muon(
                ns_steps=self.ns_steps,
                beta=self.momentum,
                nesterov=self.nesterov,
                weight_dimension_numbers=lambda tree: map_factors(_dimensions, tree),
            ),
            optax.stateless(lambda updates, params: map_factors(self._scaled, updates)),
        )
        return _split(scaled_by_rate(direction, schedule, self.weight_decay), self.adamw(schedule))

    def _scaled(self, update: NamedArray, sides: Sides) -> NamedArray:
        rows, columns = (math.prod(axis.size for axis in update.resolve_axis(side)) for side in sides)
        if self.consistent_rms is None:
            return update * math.sqrt(max(1.0, rows / columns))
        return update * (self.consistent_rms * math.sqrt(max(rows, columns)))


def _dimensions(array: NamedArray, sides: Sides) -> NamedArray:
    """optax takes all dimensions but these as those of a stack."""
    outputs, inputs = (tuple(array.axis_names.index(name) for name in side) for side in sides)
    return NamedArray(MuonDimensionNumbers(inputs, outputs), array.axis_names)  # pyright: ignore[reportArgumentType]


def _split(of_matrices: optax.GradientTransformation, of_others: optax.GradientTransformation):
    """One transformation for factors A and B, another one for all else."""

    def parts(tree: Any) -> tuple[Any, Any]:
        return eqx.partition(tree, map_factors(lambda array, sides: RANK in array.axis_names, tree))

    def init(params):
        matrices, others = parts(params)
        return of_matrices.init(matrices), of_others.init(others)

    def update(updates, state, params=None):
        gradients, adapters = parts(updates), parts(params)
        matrices, matrices_state = of_matrices.update(gradients[0], state[0], adapters[0])
        others, others_state = of_others.update(gradients[1], state[1], adapters[1])
        return eqx.combine(matrices, others), (matrices_state, others_state)

    return optax.GradientTransformation(init, update)
