"""The interface of adapters: a frozen layer and the factors that are trained beside it.

    Adapter
      wrapped    the frozen layer, weight {*stack, *Out, *In}
      factors    "lora_A.weight": {*stack, lora_rank, *In}, ...    under the names of PEFT's tensors
      active     {*stack} of 0 and 1, or None

Surgery, merging, export, loading and the cost of a step use this interface. `variants.py` chooses the class.
"""

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
from haliax import Axis, NamedArray
from haliax.axis import AxisSpec

from lora_dpo_jax.lora.config import LoraConfig
from lora_dpo_jax.tensor_names import axes_of


class Factor(NamedTuple):
    """A trainable array of an adapter. It holds one of PEFT's tensors for each layer of its stack."""

    array: NamedArray  # {*stack, then the axes of the sides in any order}
    side_names: tuple[tuple[str, ...], ...]  # names of the axes that make up each dimension of the tensor

    @property
    def sides(self) -> tuple[tuple[Axis, ...], ...]:
        return tuple(self.array.resolve_axis(names) for names in self.side_names)

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        return tuple(math.prod(axis.size for axis in side) for side in self.sides)

    def in_order(self) -> NamedArray:
        """{*stack, *sides}"""
        return self.array.rearrange((..., *(axis for side in self.sides for axis in side)))


class Adapter(eqx.Module):
    """A frozen layer and the trainable term that is added to its output."""

    wrapped: eqx.AbstractVar[Any]  # the frozen layer
    scaling: eqx.AbstractVar[float]
    dropout: eqx.AbstractVar[float]
    # {*stack} of 0 and 1 if only some layers of a stack are targets; None if all are.
    active: eqx.AbstractVar[NamedArray | None]

    @classmethod
    @abstractmethod
    def init(cls, layer: Any, config: LoraConfig, active: NamedArray | None, *, key) -> "Adapter":
        """A new adapter of `layer` with float32 factors. It adds zero to the layer's output."""

    @property
    @abstractmethod
    def factors(self) -> dict[str, Factor]:
        """All trainable arrays, by PEFT's names for the tensors of one layer, such as lora_A.weight.

        Must also work on a tree whose arrays were replaced by None or bools.
        """

    @property
    @abstractmethod
    def rank(self) -> int:
        """The rank `r` in the settings of this adapter."""

    @property
    @abstractmethod
    def flops_per_token(self) -> int:
        """Floating-point operations that the adapter adds to the forward pass, over all layers of the stack."""

    @abstractmethod
    def __call__(self, x: NamedArray, *, key=None) -> NamedArray:
        """`key`, JAX's or a `TokenKey`, switches dropout on."""

    @abstractmethod
    def merge(self, weight: Any, tensors: Mapping[str, Any]) -> Any:
        """The weight [..., out, in] with the factors folded in. All arrays are float32, of NumPy or JAX.

        `tensors` are the factors as PEFT stores them, with the same leading axes as the weight.
        """

    @abstractmethod
    def adds_nothing(self) -> jax.Array:
        """Whether the factors leave the output of the wrapped layer unchanged: a bool without axes."""

    @property
    def parameter_count(self) -> int:
        return sum(factor.array.size for factor in self.factors.values())

    def merged(self) -> Any:
        """The wrapped layer with the factors folded in, computed in float32 and rounded once to the weight's dtype."""
        weight = self.wrapped.weight
        plain = Factor(weight.astype(jnp.float32), (names_of(self.wrapped.Out), names_of(self.wrapped.In)))
        axes = plain.in_order().axes
        before = _tensors(plain)
        after = self.merge(before, {name: _tensors(factor) for name, factor in self.factors.items()})
        if self.active is not None:
            after = jnp.where(self.active.array[..., None, None] != 0, after, before)
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


def _tensors(factor: Factor) -> jax.Array:
    """float32 [*stack, *tensor_shape]"""
    array = factor.in_order().array.astype(jnp.float32)
    depth = array.ndim - sum(len(side) for side in factor.side_names)
    return array.reshape(*array.shape[:depth], *factor.tensor_shape)
