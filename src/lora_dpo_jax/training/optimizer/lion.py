"""Lion: the sign of a mean of gradients."""

from dataclasses import dataclass

import optax

from lora_dpo_jax.training.optimizer.interface import Optimizer
from lora_dpo_jax.training.optimizer.schedules import is_decay, require


@dataclass(frozen=True)
class Lion(Optimizer):
    """Algorithm 2 of https://arxiv.org/abs/2302.06675, by optax.

    Every number moves by the learning rate in each step. The paper takes 3 to 10 times less of it than with AdamW, and
    3 to 10 times more weight_decay.
    """

    beta1: float = 0.9  # the share of the running mean in what the sign is taken of
    beta2: float = 0.99  # decay of the running mean of gradients

    def __post_init__(self):
        super().__post_init__()
        require(is_decay(self.beta1), "beta1", self.beta1, "in [0, 1), in float32 too")
        require(is_decay(self.beta2), "beta2", self.beta2, "in [0, 1), in float32 too")

    def rule(self, schedule: optax.Schedule) -> optax.GradientTransformation:
        return optax.lion(schedule, b1=self.beta1, b2=self.beta2, weight_decay=self.weight_decay)
