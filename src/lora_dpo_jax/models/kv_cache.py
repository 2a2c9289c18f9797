"""Keys and values of the tokens seen so far, for generation."""

from typing import Any

import equinox as eqx
import haliax as hax
import jax.numpy as jnp
from haliax import Axis, NamedArray

from lora_dpo_jax.axes import KEY_POSITION
from lora_dpo_jax.models.config import DecoderConfig


class KeyValueCache(eqx.Module):
    """The cache of one layer, {row, key_position, kv_head, head_size}. For a stack of layers, its axis comes first."""

    k: NamedArray
    v: NamedArray

    @staticmethod
    def empty(config: DecoderConfig, stack: tuple[Axis, ...], Row: Axis, slots: int, dtype) -> "KeyValueCache":
        axes = (*stack, Row, Axis(KEY_POSITION, slots), config.KVHeads, config.HeadSize)
        return KeyValueCache(hax.zeros(axes, dtype=dtype), hax.zeros(axes, dtype=dtype))

    def write(self, k: NamedArray, v: NamedArray, slot: jnp.ndarray) -> "KeyValueCache":
        """Puts keys and values {row, key_position, ...} at cache slots `slot`, `slot + 1`, ..."""
        start: Any = {KEY_POSITION: hax.named(slot, ())}
        return KeyValueCache(
            self.k.updated_slice(start, k.astype(self.k.dtype)),
            self.v.updated_slice(start, v.astype(self.v.dtype)),
        )
