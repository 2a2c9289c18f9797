"""The gated MLP of a layer, which acts on each token separately."""

import equinox as eqx
import haliax.nn as hnn
import jax
from haliax import Axis, NamedArray

from lora_dpo_jax.axes import GATE_UP
from lora_dpo_jax.lora import split_key
from lora_dpo_jax.models.config import DecoderConfig
from lora_dpo_jax.models.gates import ACTIVATIONS
from lora_dpo_jax.models.linear import linear, product, products

GateUp = Axis(GATE_UP, 2)


class Mlp(eqx.Module):
    """down(activation(gate(x)) * up(x)). One matrix holds either both gate and up, or each of them."""

    activation: str = eqx.field(static=True)
    gate_proj: hnn.Linear | None
    up_proj: hnn.Linear | None
    gate_up_proj: hnn.Linear | None
    down_proj: hnn.Linear

    @staticmethod
    def init(config: DecoderConfig, *, key) -> "Mlp":
        Embed, Inner, bias, fused = config.Embed, config.Mlp, config.mlp_bias, config.fused_gate_up
        keys = jax.random.split(key, 3)
        return Mlp(
            config.activation,
            gate_proj=None if fused else linear(Embed, Inner, key=keys[0], use_bias=bias),
            up_proj=None if fused else linear(Embed, Inner, key=keys[1], use_bias=bias),
            gate_up_proj=linear(Embed, (GateUp, Inner), key=keys[0], use_bias=bias) if fused else None,
            down_proj=linear(Inner, Embed, key=keys[2], use_bias=bias),
        )

    def __call__(self, x: NamedArray, segments: NamedArray, *, key=None) -> tuple[NamedArray, dict[str, NamedArray]]:
        """See `layers.FeedForward`."""
        k_gate, k_up, k_down = split_key(key, 3)
        if self.gate_up_proj is not None:
            both = product(self.gate_up_proj, x, key=k_gate)
            gate, up = both[GateUp, 0], both[GateUp, 1]
        else:
            gate, up = products((self.gate_proj, self.up_proj), x, (k_gate, k_up))
        return product(self.down_proj, ACTIVATIONS[self.activation](gate) * up, key=k_down), {}
