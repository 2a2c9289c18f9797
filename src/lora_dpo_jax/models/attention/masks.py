"""Attention masks: which keys each query sees."""

import abc
from typing import Any

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
from haliax import Axis, NamedArray

from lora_dpo_jax.axes import KEY_POSITION, POSITION


def as_keys(x: NamedArray) -> NamedArray:
    """Renames the position axis, so that an array of scores can have one axis for keys and one for queries."""
    return x.rename({POSITION: KEY_POSITION})


class AttentionMask(eqx.Module):
    """Defines which keys each query sees."""

    @abc.abstractmethod
    def allowed(self, window: int | None) -> NamedArray:
        """bool {row, position, key_position}. `window` (tokens): keys must be closer than this."""

    @abc.abstractmethod
    def segments(self) -> NamedArray:
        """int32 {row, position}: the number, from 1, of each token's example in its row; 0 for padding, if known."""

    @abc.abstractmethod
    def sequence_lengths(self) -> NamedArray:
        """int32 {row, position}: the number of tokens, so far, of the sequence that a token belongs to."""


class PackedMask(AttentionMask):
    """Several examples in a row, each laid out `prompt | response 1 | ...`; all arrays {row, position}.

    Query *q* sees key *k* when both are in the same segment, *k* does not come after *q*, and *k* is in the prompt
    (branch 0) or in *q*'s branch. Distances are measured in rotary positions, which continue from the prompt in every
    branch.
    """

    segment_ids: NamedArray
    branch_ids: NamedArray
    position_ids: NamedArray
    # Attention computes all scores at once: for so few tokens that kernels would take longer to compile than they save.
    is_short: bool = eqx.field(static=True, default=False)

    def allowed(self, window: int | None) -> NamedArray:
        Pos = self.segment_ids.resolve_axis(POSITION)
        ids = (self.segment_ids, self.branch_ids, self.position_ids, hax.arange(Pos))
        keys: Any = [as_keys(x) for x in ids]
        queries: Any = [x.broadcast_axis(keys[-1].axes) for x in ids]
        key_segment, key_branch, key_position, key_index = keys
        segment, branch, position, index = queries
        mask = (segment == key_segment) & ((key_branch == 0) | (branch == key_branch)) & (index >= key_index)
        if window is not None:
            mask = mask & (position - key_position < window)
        return mask

    def segments(self) -> NamedArray:
        return self.segment_ids

    def sequence_lengths(self) -> NamedArray:
        """See `AttentionMask`. A token of a shared prompt gets the length of the sequence with the first response."""
        positions = self.position_ids.rearrange((..., POSITION))
        segment, branch = (x.rearrange(positions.axes).array for x in (self.segment_ids, self.branch_ids))
        last = segment.shape[-1] - 1
        index = jnp.broadcast_to(jnp.arange(last + 1, dtype=jnp.int32), segment.shape)
        new_run = (segment[..., 1:] != segment[..., :-1]) | (branch[..., 1:] != branch[..., :-1])
        ends = jnp.where(new_run, index[..., :-1], last)
        ends = jnp.concatenate([ends, index[..., -1:]], axis=-1)
        end = jax.lax.cummin(ends, axis=ends.ndim - 1, reverse=True)
        after = jnp.minimum(end + 1, last)
        goes_on = (branch == 0) & (jnp.take_along_axis(segment, after, axis=-1) == segment)
        end = jnp.where(goes_on, jnp.take_along_axis(end, after, axis=-1), end)
        lengths = jnp.take_along_axis(positions.array, end, axis=-1) + 1
        return NamedArray(lengths, positions.axis_names)

    @staticmethod
    def causal(Row: Axis, Pos: Axis) -> "PackedMask":
        """One unbranched sequence a row."""
        ones = hax.ones((Row, Pos), dtype=jnp.int32)
        return PackedMask(ones, ones * 0, hax.arange(Pos).broadcast_to((Row, Pos)))


class CachedMask(AttentionMask):
    """Queries at `position_ids` {row, position} over a key-value cache.

    Cache slots hold keys at `key_position_ids` {row, key_position}; a negative id marks an empty slot.
    """

    position_ids: NamedArray
    key_position_ids: NamedArray

    def allowed(self, window: int | None) -> NamedArray:
        key = self.key_position_ids
        position = self.position_ids.broadcast_axis(key.resolve_axis(KEY_POSITION))
        mask = (position >= key) & (key >= 0)
        if window is not None:
            mask = mask & (position - key < window)
        return mask

    def segments(self) -> NamedArray:
        return hax.ones_like(self.position_ids)  # padding computes what nobody reads

    def sequence_lengths(self) -> NamedArray:
        return (hax.max(self.position_ids, axis=POSITION) + 1).broadcast_to(self.position_ids.axes)
