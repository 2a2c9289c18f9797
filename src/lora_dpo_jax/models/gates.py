"""How gated MLPs and experts make their inner values from a gate and an up-projection."""

from collections.abc import Callable
from dataclasses import dataclass

import haliax.nn as hnn
import jax
import jax.numpy as jnp
from jax import Array

ACTIVATIONS: dict[str, Callable] = {
    "silu": hnn.silu,
    "gelu": lambda x: hnn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: hnn.gelu(x, approximate=True),
    "relu": hnn.relu,
}


@dataclass(frozen=True)
class ClampedGate:
    """gate * sigmoid(alpha * gate) * (up + 1), with gate at most `limit` and up within +- `limit`, as in gpt-oss."""

    alpha: float
    limit: float

    def __call__(self, gate: Array, up: Array) -> Array:
        gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        return gate * jax.nn.sigmoid(gate * self.alpha) * (up + 1)
