"""What all optimizers share: the schedule, clipping, LoRA+ and a state in float32."""

import abc
import math
from dataclasses import dataclass

import draccus
import jax
import jax.numpy as jnp
import optax

from lora_dpo_jax.lora import output_filter
from lora_dpo_jax.training.optimizer.schedules import Schedule, require


@dataclass(frozen=True)
class Optimizer(Schedule, draccus.ChoiceRegistry, abc.ABC):
    """An optimizer of adapters, chosen by its `type` in the configuration."""

    weight_decay: float = 0.0  # decoupled: each step shrinks every adapter by learning_rate * weight_decay
    max_grad_norm: float | None = 1.0  # clips the gradient's norm over all adapters; null or 0 does not clip
    # LoRA+ (https://arxiv.org/abs/2402.12354): the learning rate of B, and of DoRA's magnitudes, is so many times that
    # of A; null is 1. The paper has 16, with a smaller learning_rate.
    lora_plus_ratio: float | None = None

    @classmethod
    def default_choice_name(cls) -> str:
        return "adamw"

    def __post_init__(self):
        super().__post_init__()
        require(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, "at least 0, and finite")
        require((self.max_grad_norm or 0) >= 0, "max_grad_norm", self.max_grad_norm, "at least 0, or null")
        ratio = 1.0 if self.lora_plus_ratio is None else self.lora_plus_ratio
        require(0 < ratio < math.inf, "lora_plus_ratio", self.lora_plus_ratio, "a positive number, or null")

    @abc.abstractmethod
    def rule(self, schedule: optax.Schedule) -> optax.GradientTransformation:
        """From gradients to updates at the rates of `schedule`, with the decay of weights."""

    def build(self, num_train_steps: int) -> optax.GradientTransformation:
        """Clipping, then the rule. Its state is float32 (but for adamw_8bit) whatever the dtype of the adapters.

        Its `update` needs the adapters as an argument. As in torch, gradients that are not finite reach the adapters:
        the caller must check for them.
        """
        parts = self._parts(self.schedule(num_train_steps))
        if self.max_grad_norm:
            parts.insert(0, _clip_by_global_norm(self.max_grad_norm))
        return _in_float32(chained(parts))

    def _parts(self, schedule: optax.Schedule) -> list[optax.GradientTransformation]:
        """Everything but clipping, in its order."""
        parts = [self.rule(schedule)]
        if self.lora_plus_ratio is not None:
            parts.append(_faster_output_factors(self.lora_plus_ratio))
        return parts


def chained(parts: list[optax.GradientTransformation]) -> optax.GradientTransformation:
    return parts[0] if len(parts) == 1 else optax.chain(*parts)


def scaled_by_rate(
    direction: optax.GradientTransformation, schedule: optax.Schedule, weight_decay: float
) -> optax.GradientTransformation:
    """A rule that goes against `direction`, with decoupled decay of weights."""
    return optax.chain(direction, optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(schedule))


def _clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """torch.nn.utils.clip_grad_norm_, with its 1e-6 in the denominator, which optax's clipping lacks."""

    def clip(updates, params=None):
        del params
        scale = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda update: update * scale, updates)

    return optax.stateless(clip)


def _faster_output_factors(ratio: float) -> optax.GradientTransformation:
    """Multiplies the rate of B. As in torch, the decay of weights is a part of the update and grows with the rate."""

    def scale(updates, params=None):
        del params
        return jax.tree.map(
            lambda update, is_faster: update * ratio if is_faster else update, updates, output_filter(updates)
        )

    return optax.stateless(scale)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs `inner` on float32 copies. Returns its updates in the dtype of the params, which must not change."""

    def init(params):
        return inner.init(_astype_float32(params))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("The optimizer needs the adapters: call update(gradients, state, adapters).")
        updates, state = inner.update(_astype_float32(updates), state, _astype_float32(params))
        return jax.tree.map(lambda update, param: update.astype(param.dtype), updates, params), state

    return optax.GradientTransformation(init, update)


def _astype_float32(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(jnp.float32), tree)
