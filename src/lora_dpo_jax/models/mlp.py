"""The gated MLP of a layer, which acts on each token separately."""

from collections.abc import Callable

import equinox as eqx
import haliax.nn as hnn
import jax
from haliax import NamedArray

from lora_dpo_jax.lora import split_key
from lora_dpo_jax.models.config import DecoderConfig
from lora_dpo_jax.models.linear import linear, product

ACTIVATIONS: dict[str, Callable] = {
    "silu": hnn.silu,
    "gelu": lambda x: hnn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: hnn.gelu(x, approximate=True),
    "relu": hnn.relu,
}


class Mlp(eqx.Module):
    """down(activation(gate(x)) * up(x))."""

    activation: str = eqx.field(static=True)
    gate_proj: hnn.Linear
    up_proj: hnn.Linear
    down_proj: hnn.Linear

    @staticmethod
    def init(config: DecoderConfig, *, key) -> "Mlp":
        Embed, Inner, bias = config.Embed, config.Mlp, config.mlp_bias
        keys = jax.random.split(key, 3)
        return Mlp(
            config.activation,
            gate_proj=linear(Embed, Inner, key=keys[0], use_bias=bias),
            up_proj=linear(Embed, Inner, key=keys[1], use_bias=bias),
            down_proj=linear(Inner, Embed, key=keys[2], use_bias=bias),
        )

    def __call__(self, x: NamedArray, *, key=None) -> tuple[NamedArray, dict[str, NamedArray]]:
        """See `layers.FeedForward`."""
        k_gate, k_up, k_down = split_key(key, 3)
        gate = ACTIVATIONS[self.activation](product(self.gate_proj, x, key=k_gate))
        return product(self.down_proj, gate * product(self.up_proj, x, key=k_up), key=k_down), {}
