"""AdamW, with the same updates as torch's."""

import math
from dataclasses import dataclass

import optax

from lora_dpo_jax.training.optimizer.interface import Optimizer
from lora_dpo_jax.training.optimizer.schedules import is_decay, require


@dataclass(frozen=True)
class Moments(Optimizer):
    """An optimizer with Adam's settings."""

    beta1: float = 0.9  # decay of the running mean of gradients
    beta2: float = 0.999  # decay of the running mean of squared gradients
    epsilon: float = 1e-8  # added to the root of the mean of squared gradients

    def __post_init__(self):
        super().__post_init__()
        require(is_decay(self.beta1), "beta1", self.beta1, "in [0, 1), in float32 too")
        require(is_decay(self.beta2), "beta2", self.beta2, "in [0, 1), in float32 too")
        require(0 < self.epsilon < math.inf, "epsilon", self.epsilon, "above 0, and finite")

    def adamw(self, schedule: optax.Schedule) -> optax.GradientTransformation:
        return optax.adamw(schedule, b1=self.beta1, b2=self.beta2, eps=self.epsilon, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class AdamW(Moments):
    """torch.optim.AdamW under a schedule of transformers, after torch's clip_grad_norm_."""

    def rule(self, schedule: optax.Schedule) -> optax.GradientTransformation:
        return self.adamw(schedule)
