"""Keys and values of the tokens seen so far, for generation."""

from typing import Any

import equinox as eqx
import haliax as hax
import jax.numpy as jnp
from haliax import Axis, NamedArray

from lora_dpo_jax.axes import KEY_POSITION, POSITION, ROW
from lora_dpo_jax.models.config import DecoderConfig
from lora_dpo_jax.sharding import zeros


class KeyValueCache(eqx.Module):
    """The cache of one layer. For a stack of layers, its axis comes first.

    A step reads all of it once, so the axis that it sums over comes last but one: then a product on a CPU reads
    neighbours together.
    """

    k: NamedArray  # {row, kv_head, head_size, key_position}
    v: NamedArray  # {row, kv_head, key_position, head_size}

    @staticmethod
    def empty(config: DecoderConfig, stack: tuple[Axis, ...], Row: Axis, slots: int, dtype) -> "KeyValueCache":
        Heads, HeadSize, Slot = config.KVHeads, config.HeadSize, Axis(KEY_POSITION, slots)
        k, v = (*stack, Row, Heads, HeadSize, Slot), (*stack, Row, Heads, Slot, HeadSize)
        return KeyValueCache(zeros(k, dtype), zeros(v, dtype))

    def write(self, k: NamedArray, v: NamedArray, slot: jnp.ndarray) -> "KeyValueCache":
        """Puts keys and values {row, key_position, ...} at cache slots `slot`, `slot + 1`, ..."""
        start: Any = {KEY_POSITION: hax.named(slot, ())}
        return KeyValueCache(*(old.updated_slice(start, _like(new, old)) for old, new in ((self.k, k), (self.v, v))))

    def admit(self, new: "PackedKeys", source: NamedArray, is_new: NamedArray) -> "KeyValueCache":
        """Replaces the first slots of the rows in `is_new`, bool {row}, by keys and values of packed tokens.

        `source`, int32 {row, key_position}: the number of the token that each slot takes, counted over all packed rows.
        """
        return KeyValueCache(_admitted(self.k, new.k, source, is_new), _admitted(self.v, new.v, source, is_new))


class PackedKeys(eqx.Module):
    """What a layer's attention computes of packed tokens, rotated: what a cache takes of them."""

    k: NamedArray  # {row, key_position, kv_head, head_size}, with the axis of a stack first
    v: NamedArray


def _admitted(old: NamedArray, new: NamedArray, source: NamedArray, is_new: NamedArray) -> NamedArray:
    tokens = new.flatten_axes((ROW, KEY_POSITION), POSITION)
    here = hax.auto_sharded(tokens.take(POSITION, source))
    slots = source.resolve_axis(KEY_POSITION)
    kept = hax.where(is_new, _like(here, old), old[KEY_POSITION, : slots.size])
    start: Any = {KEY_POSITION: hax.named(jnp.int32(0), ())}
    return hax.auto_sharded(old.updated_slice(start, _like(kept, old)))


def _like(new: NamedArray, old: NamedArray) -> NamedArray:
    """`new` in the dtype and the order of axes of `old`."""
    return new.astype(old.dtype).rearrange(tuple(axis.name for axis in old.axes))
