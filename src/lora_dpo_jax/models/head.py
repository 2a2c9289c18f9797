"""From hidden states to logits. No other module computes logits."""

from typing import Any

import equinox as eqx
import haliax as hax
import jax.numpy as jnp
from haliax import Axis, NamedArray

from lora_dpo_jax.lora import unwrapped


class Head(eqx.Module):
    """Maps hidden states {..., embed} to float32 logits {..., vocab}."""

    linear: Any  # a Linear or its adapter; the weight of a tied head is that of the embedding
    scale: float = eqx.field(static=True, default=1.0)  # of the logits, before the softcap
    softcap: float | None = eqx.field(static=True, default=None)  # logits = softcap * tanh(logits / softcap)

    def __call__(self, hidden: NamedArray, *, key=None) -> NamedArray:
        logits = self.linear(hidden, key=key).astype(jnp.float32)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else hax.tanh(logits / self.softcap) * self.softcap

    @property
    def Embed(self) -> Axis:
        return unwrapped(self.linear).In

    @property
    def Vocab(self) -> Axis:
        return unwrapped(self.linear).Out
