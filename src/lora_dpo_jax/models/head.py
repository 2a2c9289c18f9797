"""From hidden states to logits. No other module computes logits."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from haliax import Axis, NamedArray

from lora_dpo_jax.lora import unwrapped


class Head(eqx.Module):
    """Maps hidden states {..., embed} to float32 logits {..., vocab}."""

    linear: Any  # a Linear or its adapter; the weight of a tied head is that of the embedding

    def __call__(self, hidden: NamedArray, *, key=None) -> NamedArray:
        return self.linear(hidden, key=key).astype(jnp.float32)

    @property
    def Embed(self) -> Axis:
        return unwrapped(self.linear).In

    @property
    def Vocab(self) -> Axis:
        return unwrapped(self.linear).Out
