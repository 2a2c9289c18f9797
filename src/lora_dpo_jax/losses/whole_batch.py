"""What a loss needs to know of a whole batch that is computed in parts."""

import itertools
import math
from collections.abc import Sequence

import haliax as hax
from haliax import NamedArray

from lora_dpo_jax.axes import COMPARISON, EXAMPLE, RESPONSE
from lora_dpo_jax.losses.interface import Loss


def of_whole_batch(loss: Loss, inputs: Sequence[dict[str, NamedArray]]) -> list[dict[str, NamedArray]]:
    """`Loss.of_batch` for each part, in the axes of the part, from the `Loss.batch_inputs` of all parts."""
    axes = [{_slot(values): values.axes for values in of_part.values()} for of_part in inputs]
    flat: dict[str, NamedArray] = {}
    for name, values in inputs[0].items():
        slot = _slot(values)
        of_parts = ((of_part[name].rearrange(at[slot]), at[slot]) for of_part, at in zip(inputs, axes, strict=True))
        flat[name] = hax.concatenate(slot, [hax.flatten_axes(values, at, slot) for values, at in of_parts])
    found = loss.of_batch(flat)
    starts = {slot: _starts([at[slot] for at in axes]) for slot in axes[0]}
    return [
        {name: _cut(values, starts[_slot(values)][part], at[_slot(values)]) for name, values in found.items()}
        for part, at in enumerate(axes)
    ]


def _slot(values: NamedArray) -> str:
    """What the values are of: comparisons, examples or responses."""
    return next(axis.name for axis in values.axes if axis.name in (COMPARISON, EXAMPLE, RESPONSE))


def _starts(axes: list[tuple[hax.Axis, ...]]) -> list[int]:
    """Where the slots of each part begin among those of all parts."""
    sizes = [math.prod(axis.size for axis in at) for at in axes]
    return list(itertools.accumulate(sizes[:-1], initial=0))


def _cut(values: NamedArray, start: int, axes: tuple[hax.Axis, ...]) -> NamedArray:
    """The values {slot} from `start` on that fill `axes`."""
    shape = [axis.size for axis in axes]
    return hax.named(values.array[start : start + math.prod(shape)].reshape(shape), axes)
