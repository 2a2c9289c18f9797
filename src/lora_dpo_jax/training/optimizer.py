"""AdamW with warmup, decay and clipping. It makes the same updates as torch and transformers with the same settings."""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_dpo_jax.lora import output_filter
from lora_dpo_jax.settings.choices import check_choices


@dataclass(frozen=True)
class OptimizerConfig:
    """torch.optim.AdamW under a transformers schedule, after torch's clip_grad_norm_.

    `warmup` below 1 is a fraction of the run, rounded up to whole steps as in transformers. From 1 on it is a number of
    steps. If this number exceeds the run, the rate rises until the end of the run.
    """

    learning_rate: float = 5e-6  # the peak; as in TRL's and Levanter's LoRA-DPO examples
    weight_decay: float = 0.0  # decoupled: each step shrinks every adapter by learning_rate * weight_decay
    beta1: float = 0.9  # decay of the running mean of gradients
    beta2: float = 0.999  # decay of the running mean of squared gradients
    epsilon: float = 1e-8  # added to the root of the mean of squared gradients
    max_grad_norm: float | None = 1.0  # clips the gradient's norm over all adapters; null or 0 does not clip
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"  # how the rate falls after the warmup
    warmup: int | float = 0  # below 1 a fraction of the run, from 1 on a number of steps
    # LoRA+ (https://arxiv.org/abs/2402.12354): the learning rate of B, and of DoRA's magnitudes, is so many times that
    # of A; null is 1. The paper has 16, with a smaller learning_rate.
    lora_plus_ratio: float | None = None
    min_lr_ratio: float = 0.0  # final rate of linear and cosine, as a fraction of learning_rate; 0 in transformers

    def __post_init__(self):
        _require(0 <= self.learning_rate < math.inf, "learning_rate", self.learning_rate, "at least 0, and finite")
        _require(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, "at least 0, and finite")
        _require(0 <= float(np.float32(self.beta1)) < 1, "beta1", self.beta1, "in [0, 1), in float32 too")
        _require(0 <= float(np.float32(self.beta2)) < 1, "beta2", self.beta2, "in [0, 1), in float32 too")
        _require(0 < self.epsilon < math.inf, "epsilon", self.epsilon, "above 0, and finite")
        _require((self.max_grad_norm or 0) >= 0, "max_grad_norm", self.max_grad_norm, "at least 0, or null")
        check_choices(self, "optimizer")
        whole = 0 <= self.warmup < 1 or (1 <= self.warmup < 2**31 and float(self.warmup).is_integer())
        _require(whole, "warmup", self.warmup, "a fraction in [0, 1) or a whole number of steps below 2**31")
        ratio = 1.0 if self.lora_plus_ratio is None else self.lora_plus_ratio
        _require(0 < ratio < math.inf, "lora_plus_ratio", self.lora_plus_ratio, "a positive number, or null")
        _require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", self.min_lr_ratio, "in [0, 1]")

    def warmup_steps(self, num_train_steps: int) -> int:
        if self.warmup < 1:
            return math.ceil(num_train_steps * self.warmup)
        return int(self.warmup)

    def schedule(self, num_train_steps: int) -> optax.Schedule:
        """The learning rate of update `step`, counted from 0, as a float32 scalar.

        As in transformers, update 0 of a warmup has rate 0 and changes nothing, and update `warmup_steps` has the peak
        rate.
        """
        warmup_steps = self.warmup_steps(num_train_steps)
        decay_steps = max(1, num_train_steps - warmup_steps)
        decay = _DECAYS[self.lr_schedule]

        def learning_rate(step):
            step = jnp.asarray(step).astype(jnp.float32)
            progress = jnp.clip((step - warmup_steps) / decay_steps, 0.0, 1.0)
            decayed = self.min_lr_ratio + (1.0 - self.min_lr_ratio) * decay(progress)
            warming = step / max(1, warmup_steps)
            return self.learning_rate * jnp.where(step < warmup_steps, warming, decayed)

        return learning_rate

    def build(self, num_train_steps: int) -> optax.GradientTransformation:
        """Clipping, then AdamW. Its state is float32 whatever the dtype of the adapters.

        Its `update` needs the adapters as an argument. As in torch, gradients that are not finite reach the adapters:
        the caller must check for them.
        """
        parts: list[optax.GradientTransformation] = [
            optax.adamw(
                self.schedule(num_train_steps),
                b1=self.beta1,
                b2=self.beta2,
                eps=self.epsilon,
                weight_decay=self.weight_decay,
            )
        ]
        if self.max_grad_norm:
            parts.insert(0, _clip_by_global_norm(self.max_grad_norm))
        if self.lora_plus_ratio is not None:
            parts.append(_faster_output_factors(self.lora_plus_ratio))
        return _in_float32(parts[0] if len(parts) == 1 else optax.chain(*parts))


_DECAYS = {
    "constant": jnp.ones_like,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
}


def _require(holds: bool, field: str, found, needed: str) -> None:
    if not holds:
        raise ValueError(f"optimizer.{field}={found!r} must be {needed}.")


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
