"""What a loss needs to know of a whole batch that is computed in parts."""

import itertools
import math
from collections.abc import Sequence

import haliax as hax
from haliax import NamedArray

from lora_dpo_jax.axes import COMPARISON
from lora_dpo_jax.losses.interface import Loss


def of_whole_batch(loss: Loss, inputs: Sequence[dict[str, NamedArray]]) -> list[dict[str, NamedArray]]:
    """`Loss.of_batch` for each part, in the axes of the part, from the `Loss.batch_inputs` of all parts."""
    axes = [next(iter(of_part.values())).axes for of_part in inputs]
    flat = [
        {name: hax.flatten_axes(values.rearrange(at), at, COMPARISON) for name, values in of_part.items()}
        for of_part, at in zip(inputs, axes, strict=True)
    ]
    found = loss.of_batch(
        {name: hax.concatenate(COMPARISON, [of_part[name] for of_part in flat]) for name in inputs[0]}
    )
    sizes = [math.prod(axis.size for axis in at) for at in axes]
    starts = itertools.accumulate(sizes[:-1], initial=0)
    return [
        {name: _cut(values, start, at) for name, values in found.items()}
        for at, start in zip(axes, starts, strict=True)
    ]


def _cut(values: NamedArray, start: int, axes: tuple[hax.Axis, ...]) -> NamedArray:
    """The values {comparison} from `start` on that fill `axes`."""
    shape = [axis.size for axis in axes]
    return hax.named(values.array[start : start + math.prod(shape)].reshape(shape), axes)
