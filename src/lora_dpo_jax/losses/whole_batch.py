"""What a loss needs to know of a whole batch that is computed in parts."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import haliax as hax
import jax
import jax.numpy as jnp
from haliax import Axis, NamedArray

from lora_dpo_jax.axes import ROW
from lora_dpo_jax.losses.examples import Examples
from lora_dpo_jax.losses.interface import Loss
from lora_dpo_jax.losses.scores import Scores


class ScoredPart(NamedTuple):
    """A part of a batch, as a loss takes it. The axes of arrays are {micro, row, slot}, or {row, slot}."""

    policy: Scores
    reference: Scores | None
    examples: Examples


def of_whole_batch(loss: Loss, parts: Sequence[ScoredPart]) -> list[dict[str, NamedArray]]:
    """`Loss.of_batch` of all rows together, for each part: in the part's axes, a scalar as {micro, row} or {row}."""
    policy, reference, examples = jax.tree.map(_joined, *parts, is_leaf=_is_named)
    found = loss.of_batch(_with_empty_responses(policy), _with_empty_responses(reference), examples)
    start, of_parts = 0, []
    for part in parts:
        arrays = jax.tree.leaves(part, is_leaf=_is_named)
        slots = {array.axes[-1].name: array.axes[-1] for array in arrays}
        rows = part.examples.ids.axes[:-1]
        of_parts.append({name: _cut(values, start, rows, slots) for name, values in found.items()})
        start += math.prod(axis.size for axis in rows)
    return of_parts


def _joined(*arrays: NamedArray) -> NamedArray:
    """The rows of all arrays, {row, slot}, with empty slots at the end of shorter rows."""
    Slot = max((array.axes[-1] for array in arrays), key=lambda axis: axis.size)
    empty = -1 if jnp.issubdtype(arrays[0].dtype, jnp.integer) else 0
    # Not -1: a batch of single answers has axes of size 0.
    rows = [array.array.reshape(math.prod(array.array.shape[:-1]), array.axes[-1].size) for array in arrays]
    joined = jnp.concatenate([jnp.pad(x, ((0, 0), (0, Slot.size - x.shape[1])), constant_values=empty) for x in rows])
    return hax.named(joined, (Axis(ROW, joined.shape[0]), Slot))


def _with_empty_responses(scores: Any) -> Any:
    """The scores, or None, in which an empty response has no tokens."""
    return None if scores is None else dataclasses.replace(scores, tokens=hax.maximum(scores.tokens, 0))


def _cut(values: NamedArray, start: int, rows: tuple[Axis, ...], slots: dict[str, Axis]) -> NamedArray:
    """The values of the rows from `start` on, in the part's own axes."""
    shape = tuple(axis.size for axis in rows)
    if not values.axes:
        return hax.named(jnp.broadcast_to(values.array, shape), rows)
    Slot = slots[values.axes[-1].name]
    mine = values.array[start : start + math.prod(shape), : Slot.size]
    return hax.named(mine.reshape(*shape, Slot.size), (*rows, Slot))


def _is_named(leaf: Any) -> bool:
    return isinstance(leaf, NamedArray)
