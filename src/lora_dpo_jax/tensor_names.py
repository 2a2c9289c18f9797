"""From the place of an array in a model's tree to the names of its tensors in Hugging Face's files.

    model.layers.segments[0].stacked.layers[0].self_attn.q_proj.weight   {layers: 2, ...}
        model.layers.0.self_attn.q_proj.weight, model.layers.1.self_attn.q_proj.weight

A name is the path of attributes. A stack (`haliax.nn.Stacked`) holds one array for several tensors, whose names are
numbered; so does any module with `numbers`. In nested stacks, the names are in the order of the axes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
from haliax import Axis
from haliax.axis import AxisSpec

M = TypeVar("M")


@runtime_checkable
class Numbered(Protocol):
    """A module whose parts have other numbers in tensor names than in the tree."""

    def numbers(self, path: Sequence[Any], /) -> tuple[Sequence[int], int]:
        """The numbers of an array's slices, and how many entries of `path` these numbers replace.

        `path` leads from this module to the array.
        """
        ...


@runtime_checkable
class Renamed(Protocol):
    """A module whose attributes have other names in tensor names than in the tree."""

    @property
    def tensor_parts(self) -> Mapping[str, str]:
        """The part of a tensor name for an attribute; attributes that are not here are called by their own names."""
        ...


@runtime_checkable
class Sided(Protocol):
    """A module with a `weight` that is no layer of haliax's."""

    weight: Any

    @property
    def tensor_sides(self) -> tuple[tuple[str, ...], ...]:
        """The names of the axes that make up each dimension of the weight's tensor.

        A bias has the first of these dimensions.
        """
        ...


@runtime_checkable
class Gathered(Protocol):
    """A linear layer of a stack whose tensors hold the matrices of several layers, as those of all experts."""

    gathered: tuple[str, ...]  # names of axes of the stack, which lead in the tensors


def gathered_axes(layer: Any) -> tuple[str, ...]:
    """The names of the axes of a linear layer's stack that its tensors have too."""
    return layer.gathered if isinstance(layer, Gathered) else ()


@dataclass(frozen=True)
class Parameter:
    """One array of the model and its tensors: one for each slice of its stacks, or one if it has no stack."""

    names: tuple[str, ...]
    axes: tuple[Axis, ...]  # the axes of stacks come first
    sides: tuple[tuple[Axis, ...], ...]  # axes of each tensor dimension on disk: (out, in) for a matrix
    matrix: tuple[tuple[Axis, ...], tuple[Axis, ...]] | None = None  # (Out, In) of the weight of a linear layer

    @property
    def stack_axes(self) -> tuple[Axis, ...]:
        return self.axes[: len(self.axes) - sum(len(side) for side in self.sides)]

    @property
    def is_layer_matrix(self) -> bool:
        return bool(self.stack_axes) and self.matrix is not None

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        return tuple(math.prod(axis.size for axis in side) for side in self.sides)


def map_parameters(fn: Callable[[Parameter], Any], model: M) -> M:
    """Replaces each array of a model without adapters by `fn(its parameter)`."""

    def is_layer(node: Any) -> bool:
        return isinstance(node, hnn.Linear | hnn.Embedding | hnn.RmsNorm | Sided)

    def visit(path: tuple, layer: Any) -> Any:
        if not is_layer(layer):
            return layer
        fields = [field for field in ("weight", "bias") if getattr(layer, field, None) is not None]
        names = tensor_names(path, model)

        def parameter(field: str) -> Parameter:
            tensors = tuple(f"{name}.{field}" for name in names)
            is_matrix = isinstance(layer, hnn.Linear) and field == "weight"
            matrix = (axes_of(layer.Out), axes_of(layer.In)) if is_matrix else None
            return Parameter(tensors, getattr(layer, field).axes, _sides(layer, field), matrix)

        arrays = [fn(parameter(field)) for field in fields]
        return eqx.tree_at(lambda node: [getattr(node, field) for field in fields], layer, arrays)

    return jax.tree_util.tree_map_with_path(visit, model, is_leaf=is_layer)


def tensor_names(path: tuple, model: Any) -> list[str]:
    """The dotted names of the node at `path`: one, or one for each slice of the stacks that hold the node."""
    names, node, at = [""], model, 0
    while at < len(path):
        if isinstance(node, Numbered):
            numbers, entries = node.numbers(path[at:])
            for entry in path[at : at + entries]:
                node = _step(node, entry)
            at += entries
            names = [f"{name}.{number}" for name in names for number in numbers]
            continue
        entry = path[at]
        renamed = node.tensor_parts if isinstance(node, Renamed) else {}
        node, at = _step(node, entry), at + 1
        part = entry.name if isinstance(entry, jax.tree_util.GetAttrKey) else str(getattr(entry, "idx", entry))
        part = renamed.get(part, part)
        if part == "stacked":
            continue
        names = [f"{name}.{part}".lstrip(".") for name in names]
        if isinstance(node, hnn.Stacked):
            names = [f"{name}.{number}" for name in names for number in range(node.Block.size)]
    return names


def axes_of(side: AxisSpec) -> tuple[Axis, ...]:
    """The axes of one side of a linear layer, as a tuple: `layer.In` may be one axis or several."""
    return cast(tuple[Axis, ...], hax.axis.ensure_tuple(side))


def _sides(layer: Any, field: str) -> tuple[tuple[Axis, ...], ...]:
    if isinstance(layer, Sided):
        names = layer.tensor_sides[:1] if field == "bias" else layer.tensor_sides
        sides = tuple(layer.weight.resolve_axis(of_side) for of_side in names)
    elif isinstance(layer, hnn.Linear):
        gathered = tuple(axis for axis in layer.weight.axes if axis.name in gathered_axes(layer))
        sides = (*gathered, layer.Out) if field == "bias" else (*gathered, layer.Out, layer.In)
    elif isinstance(layer, hnn.Embedding):
        sides = (layer.Vocab, layer.Embed)
    else:
        sides = (layer.axis,)
    return tuple(axes_of(side) for side in sides)


def _step(node: Any, entry: Any) -> Any:
    if isinstance(entry, jax.tree_util.GetAttrKey):
        return getattr(node, entry.name)
    return node[entry.idx if isinstance(entry, jax.tree_util.SequenceKey) else entry.key]
