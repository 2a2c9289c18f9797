"""Schedule-free AdamW: an average of the adapters takes the place of a decaying learning rate.

y   the adapters of the train state, of which gradients are taken
z   the adapters of plain AdamW, in the optimizer's state
x   the average of all z, which is evaluated and exported: y = beta1 x + (1 - beta1) z
"""

from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import jax
import optax
from optax.contrib import ScheduleFreeState, schedule_free

from lora_dpo_jax.training.optimizer.adamw import Moments
from lora_dpo_jax.training.optimizer.interface import chained, scaled_by_rate
from lora_dpo_jax.training.optimizer.schedules import require

T = TypeVar("T")


@dataclass(frozen=True)
class ScheduleFree(Moments):
    """Schedule-free AdamW (https://arxiv.org/abs/2405.15682), by optax. Its averages are evaluated."""

    lr_schedule: Literal["constant"] = "constant"  # after the warmup; the average takes the place of a decay

    def __post_init__(self):
        super().__post_init__()
        require(
            self.beta1 > 0, "beta1", self.beta1, "above 0: the average has this share in what gradients are taken of"
        )
        require(self.min_lr_ratio == 0, "min_lr_ratio", self.min_lr_ratio, "0: the rate does not fall")

    def rule(self, schedule: optax.Schedule) -> optax.GradientTransformation:
        """That of z: AdamW without momentum, whose place y takes."""
        direction = optax.scale_by_rms(self.beta2, self.epsilon, eps_in_sqrt=False, bias_correction=True)
        return scaled_by_rate(direction, schedule, self.weight_decay)

    def _parts(self, schedule: optax.Schedule) -> list[optax.GradientTransformation]:
        return [schedule_free(chained(super()._parts(schedule)), schedule, b1=self.beta1)]


def adapters_to_evaluate(opt_state: optax.OptState, adapters: T) -> T:
    """The averaged adapters if the state is of a schedule-free optimizer, else `adapters` themselves."""
    nodes = jax.tree.leaves(opt_state, is_leaf=_is_schedule_free)
    found = next((node for node in nodes if _is_schedule_free(node)), None)
    return adapters if found is None else _average(found.b1, adapters, found.z)


@jax.jit
def _average(beta1: jax.Array, adapters: T, z: T) -> T:
    """x. What optax.contrib.schedule_free_eval_params gives, in a form that is exact where y and z are equal."""
    more = (1.0 - beta1) / beta1

    def average(y: jax.Array, z: jax.Array) -> jax.Array:
        wide = y.astype(z.dtype)
        return (wide + more * (wide - z)).astype(y.dtype)

    return jax.tree.map(average, adapters, z)


def _is_schedule_free(node: Any) -> bool:
    return isinstance(node, ScheduleFreeState)
