"""From hidden states to logits: the one place where logits come from."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from haliax import Axis, NamedArray


class Head(eqx.Module):
    """Maps hidden states {..., embed} to float32 logits {..., vocab}."""

    linear: Any  # a Linear or LoraLinear, of which the weight is the embedding's where they are tied

    def __call__(self, hidden: NamedArray, *, key=None) -> NamedArray:
        return self.linear(hidden, key=key).astype(jnp.float32)

    @property
    def Embed(self) -> Axis:
        return getattr(self.linear, "wrapped", self.linear).In

    @property
    def Vocab(self) -> Axis:
        return getattr(self.linear, "wrapped", self.linear).Out
