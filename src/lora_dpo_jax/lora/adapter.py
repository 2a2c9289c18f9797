"""The interface of adapters: a frozen layer and the factors that are trained beside it.

    Adapter
      wrapped    the frozen layer, weight {*stack, *Out, *In}
      factors    "lora_A.weight": {*stack, lora_rank, *In}, ...    under the names of PEFT's tensors
      by_layer   the rank and the scaling of each layer of the stack, if they differ, or None

Surgery, merging, export, loading and the cost of a step use this interface. `variants.py` chooses the class.
"""

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
from haliax import Axis, NamedArray
from haliax.axis import AxisSpec

from lora_dpo_jax.lora.config import LoraConfig
from lora_dpo_jax.tensor_names import axes_of, gathered_axes


class Factor(NamedTuple):
    """A trainable array of an adapter. It holds one of PEFT's tensors for each layer of its stack that has a name."""

    array: NamedArray  # {*stack, then the axes of the sides in any order}
    side_names: tuple[tuple[str, ...], ...]  # names of the axes that make up each dimension of the tensor
    gathered: tuple[str, ...] = ()  # those of them that number matrices: see `tensor_names.Gathered`

    @property
    def sides(self) -> tuple[tuple[Axis, ...], ...]:
        return tuple(self.array.resolve_axis(names) for names in self.side_names)

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        return tuple(math.prod(axis.size for axis in side) for side in self.sides)

    @property
    def matrix_sides(self) -> tuple[tuple[Axis, ...], ...]:
        """The sides of one matrix of a tensor."""
        return tuple(tuple(axis for axis in side if axis.name not in self.gathered) for side in self.sides)

    def in_order(self) -> NamedArray:
        """{*stack, *sides}"""
        return self.array.rearrange((..., *(axis for side in self.sides for axis in side)))

    def matrices(self) -> NamedArray:
        """{*stack, *gathered, *matrix_sides}"""
        axes = (axis for side in self.matrix_sides for axis in side)
        return self.array.rearrange((..., *self.array.resolve_axis(self.gathered), *axes))

    def tensor_of(self, matrices: Any) -> Any:
        """The tensor, from NumPy's [*gathered, a dimension for each side]."""
        depth = len(self.gathered)
        order: list[list[int]] = []
        for number, names in enumerate(self.side_names):
            at = [self.gathered.index(name) if name in self.gathered else None for name in names]
            dims = [depth + number if i is None else i for i in at]
            order.append(list(dict.fromkeys(dims)))
        shape = [math.prod(matrices.shape[dim] for dim in dims) for dims in order]
        return matrices.transpose([dim for dims in order for dim in dims]).reshape(shape)


class ByLayer(eqx.Module):
    """How the layers of a stack differ: in rank or scaling, or because only some of them are targets.

    The stack holds all factors at the largest rank. Beyond a layer's own rank, the rows of A and the columns of B are
    zero. They stay zero, because the gradient of each is a multiple of the other.
    """

    scaling: NamedArray  # float32 {*stack, but for gathered axes}: of each layer; 0 where a layer is no target
    # The same for each layer in the order of its names, as Python's numbers; 0 where a layer is no target.
    ranks: tuple[int, ...] = eqx.field(static=True)
    scalings: tuple[float, ...] = eqx.field(static=True)

    @staticmethod
    def of(layer: Any, settings: Sequence[LoraConfig | None]) -> "ByLayer | None":
        """None if all layers are the same. `settings` of each, in the order of names; None is no target."""
        ranks = tuple(0 if one is None else one.r for one in settings)
        scalings = tuple(0.0 if one is None else one.scaling for one in settings)
        if len(set(ranks)) == len(set(scalings)) == 1:
            return None
        stack = named_axes(layer)
        by_stack = np.reshape(scalings, [axis.size for axis in stack])
        return ByLayer(hax.named(jnp.asarray(by_stack, jnp.float32), stack), ranks, scalings)


class Adapter(eqx.Module):
    """A frozen layer and the trainable term that is added to its output."""

    wrapped: eqx.AbstractVar[Any]  # the frozen layer
    scaling: eqx.AbstractVar[float]  # of all layers, unless `by_layer` has those of each
    dropout: eqx.AbstractVar[float]
    by_layer: eqx.AbstractVar[ByLayer | None]  # None if all layers are targets, with the same rank and scaling
    is_target: ClassVar[bool] = True  # whether target_modules names the layer

    @classmethod
    @abstractmethod
    def init(cls, layer: Any, config: LoraConfig, by_layer: ByLayer | None, *, key) -> "Adapter":
        """A new adapter of `layer` with float32 factors. It adds zero to the layer's output.

        Without `by_layer`, `config` has the rank and the scaling of all layers of the stack.
        """

    @property
    @abstractmethod
    def factors(self) -> dict[str, Factor]:
        """All trainable arrays, by PEFT's names for the tensors of one layer, such as lora_A.weight.

        See `plain` for an adapter that files hold in another form.
        Must also work on a tree whose arrays were replaced by None or bools.
        """

    @property
    def constants(self) -> dict[str, NamedArray]:
        """Frozen arrays beside the layer, by the names of their fields. A checkpoint keeps them."""
        return {}

    @property
    @abstractmethod
    def rank(self) -> int:
        """The rank at which the factors are held: the largest of the stack."""

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations that the adapter adds to the forward pass, over all layers of the stack.

        By default, each number of the factors is multiplied and added once.
        """
        return 2 * self.parameter_count

    @abstractmethod
    def __call__(self, x: NamedArray, *, key=None) -> NamedArray:
        """`key`, JAX's or a `TokenKey`, switches dropout on."""

    @abstractmethod
    def merge(self, weight: Any, tensors: Mapping[str, Any], scaling: Any) -> Any:
        """The weight [..., out, in] with the factors folded in. All arrays are float32, of NumPy or JAX.

        `tensors` are the matrices of the factors of `plain`, in PEFT's order of dimensions, with the same leading axes
        as the weight. `scaling` is a number, or [..., 1, 1].
        """

    @abstractmethod
    def adds_nothing(self) -> jax.Array:
        """Whether the factors leave the output of the wrapped layer unchanged: a bool without axes."""

    def plain(self) -> "Adapter":
        """The adapter as files hold it, whose `factors` are PEFT's tensors. It computes the same."""
        return self

    def for_inference(self) -> "Adapter":
        """The adapter without what only training needs, in the form in which most adapters share compiled programs."""
        return self

    @property
    def parameter_count(self) -> int:
        return sum(factor.array.size for factor in self.factors.values())

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(*gathered, out, in) of one layer."""
        gathered = [axis.size for axis in stack_axes(self.wrapped) if axis.name in gathered_axes(self.wrapped)]
        return *gathered, hax.axis_size(self.wrapped.Out), hax.axis_size(self.wrapped.In)

    @property
    def scale(self) -> Any:
        """The scaling: a number, or float32 {*stack}, which is 0 where a layer is no target."""
        return self.scaling if self.by_layer is None else self.by_layer.scaling

    def settings_of(self, index: int) -> tuple[int, float]:
        """(rank, scaling) of one layer, by its place in the order of names; (0, 0.0) if it is no target."""
        by_layer = self.by_layer
        return (self.rank, self.scaling) if by_layer is None else (by_layer.ranks[index], by_layer.scalings[index])

    def merged(self) -> Any:
        """The wrapped layer with the factors folded in, computed in float32 and rounded once to the weight's dtype."""
        weight = self.wrapped.weight
        sides = names_of(self.wrapped.Out), names_of(self.wrapped.In)
        plain = Factor(weight.astype(jnp.float32), sides)
        axes = plain.in_order().axes
        before = _matrices(plain)
        scaling = self.scaling
        if self.by_layer is not None:
            array = self.by_layer.scaling.array
            scaling = array.reshape(array.shape + (1,) * (before.ndim - array.ndim))
        tensors = {name: _matrices(factor) for name, factor in self.plain().factors.items()}
        after = self.merge(before, tensors, scaling)
        if self.by_layer is not None:
            after = jnp.where(scaling != 0, after, before)
        total = hax.named(after.reshape([axis.size for axis in axes]), axes).rearrange(weight.axes)
        return dataclasses.replace(self.wrapped, weight=total.astype(weight.dtype))

    def with_factors(self, arrays: Mapping[str, NamedArray]) -> Self:
        """The adapter with these arrays in place of its factors."""
        return eqx.tree_at(lambda adapter: [adapter.factors[name].array for name in arrays], self, [*arrays.values()])

    def with_dropout(self, rate: float) -> Self:
        return dataclasses.replace(self, dropout=rate)


def unwrapped(layer: Any) -> Any:
    """The layer without its adapter, if it has one."""
    return layer.wrapped if isinstance(layer, Adapter) else layer


def names_of(side: AxisSpec) -> tuple[str, ...]:
    """The names of the axes of one side of a linear layer."""
    return tuple(axis.name for axis in axes_of(side))


def stack_axes(layer: Any) -> tuple[Axis, ...]:
    """The axes of a linear layer's stacks, which lead in its weight {*stack, *Out, *In}."""
    sides = axes_of(layer.In) + axes_of(layer.Out)
    return tuple(axis for axis in layer.weight.axes if axis not in sides)


def named_axes(layer: Any) -> tuple[Axis, ...]:
    """Those of the axes of a linear layer's stacks along which names are numbered."""
    gathered = gathered_axes(layer)
    return tuple(axis for axis in stack_axes(layer) if axis.name not in gathered)


def _matrices(factor: Factor) -> jax.Array:
    """float32 [*stack, a dimension for each side of a matrix]"""
    array = factor.matrices().array.astype(jnp.float32)
    shape = [math.prod(axis.size for axis in side) for side in factor.matrix_sides]
    depth = array.ndim - sum(len(side) for side in factor.matrix_sides)
    return array.reshape(*array.shape[:depth], *shape)
