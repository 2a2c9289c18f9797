"""Frozen weights held in four or eight bits (QLoRA, https://arxiv.org/abs/2305.14314).

    before                                 after quantize(model, "nf4")

    q_proj: Linear                         q_proj: Linear
      weight  {layers, *Out, *In}            weight: Nf4Weight
                                               codes      uint8 {layers, *Out, *In}, the last of Out halved
                                               absmax     uint8 {layers, *Out, block}
                                               group_max  float32 {layers, group}
                                               mean       float32 {layers}

Each product dequantizes its weight, one layer of the stack at a time, and does so again in the backward pass. No
dequantized copy outlives the product.
"""

import dataclasses
import math
from abc import abstractmethod
from typing import Any, TypeVar

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
import jax.numpy as jnp
import numpy as np
from haliax import Axis, NamedArray
from haliax.axis import AxisSpec

from lora_dpo_jax.dynamic_map import DYNAMIC_MAP, dynamic_value
from lora_dpo_jax.platforms import platform
from lora_dpo_jax.tensor_names import axes_of

M = TypeVar("M")
W = TypeVar("W", bound="QuantizedWeight")

# The sixteen values of 4-bit NormalFloat: appendix E of the paper.
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
    + [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
    + [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    dtype=np.float32,
)
BLOCK = 64  # weights that share an absmax
GROUP = 256  # absmaxes that share a scale


class QuantizedWeight(eqx.Module):
    """Replaces a Linear's weight {..., *Out, *In}; `axes`, `size`, `dtype` and `astype` are those of that weight."""

    error: eqx.AbstractVar[NamedArray]  # float32 {...}: |dequantized - weight| / |weight|, Frobenius norms
    Out: eqx.AbstractVar[tuple[Axis, ...]]
    In: eqx.AbstractVar[tuple[Axis, ...]]
    dtype: eqx.AbstractVar[Any]  # of a merged weight; a product is computed in the dtype of its input

    @classmethod
    @abstractmethod
    def encode(cls: type[W], values: jax.Array, stack: tuple[Axis, ...], Out, In, dtype) -> W:
        """Quantizes `values`, float32 [..., *Out, *In]. Sets `error` to zero."""

    @abstractmethod
    def decode(self) -> jax.Array:
        """float32 [..., *Out, *In]."""

    @property
    def axes(self) -> tuple[Axis, ...]:
        # The axes of a stack come first. Inside a scan over the stack they are absent.
        return self.error.axes + self.Out + self.In

    @property
    def size(self) -> int:
        return _size(self.axes)

    def astype(self, dtype) -> NamedArray:
        """The dequantized weight."""
        return hax.named(self.decode().astype(dtype), self.axes)


class Nf4Weight(QuantizedWeight):
    """NF4 with double quantization, computed as in bitsandbytes: 0.516 bytes a weight.

    A block is 64 consecutive inputs of one output. If the number of inputs is no multiple of 64, the block size is the
    greatest common divisor of both, a power of two. Two neighbouring outputs share a byte; the even output has the high
    bits. The inputs thus keep their axes, and a mesh can split them as in the weight. It never splits `block`.
    """

    codes: NamedArray  # uint8 {..., *Out with the last axis halved, *In}
    absmax: NamedArray  # uint8 {..., *Out, *outer axes of In, block}: codes of the dynamic 8-bit map
    group_max: NamedArray  # float32 {..., group}: the largest |absmax - mean| of 256 consecutive absmaxes
    mean: NamedArray  # float32 {...}: the mean of all absmaxes
    error: NamedArray
    Out: tuple[Axis, ...] = eqx.field(static=True)
    In: tuple[Axis, ...] = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    @classmethod
    def encode(cls, values, stack, Out, In, dtype) -> "Nf4Weight":
        block = math.gcd(BLOCK, _size(In))
        if Out[-1].size % 2 or block < 2:
            raise ValueError(
                f"model.quantization: nf4 packs two outputs in a byte and needs blocks of two inputs or more, but a "
                f"linear layer maps {In} to {Out}; use int8 or none"
            )
        outer, Blocks = _blocks(In, block)
        leading = tuple(axis.size for axis in stack)
        blocks = values.reshape(*leading, _size(Out), -1, block)
        absmax = jnp.max(jnp.abs(blocks), axis=-1)
        nearest = _nearest(blocks / jnp.where(absmax > 0, absmax, 1.0)[..., None], NF4)
        pairs = nearest.reshape(*leading, _size(Out) // 2, 2, -1)
        packed_axes = (*stack, *Out[:-1], Out[-1].resize(Out[-1].size // 2), *In)
        absmax = absmax.reshape(*leading, -1)
        mean = jnp.mean(absmax, axis=-1)
        absmax_codes, group_max = _encode_absmax(absmax - mean[..., None])
        return cls(
            codes=_named((pairs[..., 0, :] << 4) | pairs[..., 1, :], packed_axes),
            absmax=_named(absmax_codes, (*stack, *Out, *outer, Blocks)),
            group_max=_named(group_max, (*stack, Axis("group", group_max.shape[-1]))),
            mean=_named(mean, stack),
            error=hax.zeros(stack, dtype=jnp.float32),
            Out=Out,
            In=In,
            dtype=dtype,
        )

    def decode(self) -> jax.Array:
        codes, absmax = self.codes.array, self._absmax()
        after_out = len(self.error.axes) + len(self.Out)
        values = _nf4_value(jnp.stack([codes >> 4, codes & 15], axis=after_out))
        scaled = values.reshape(*absmax.shape, -1) * absmax[..., None]
        return scaled.reshape([axis.size for axis in self.axes])

    def _absmax(self) -> jax.Array:
        """The dequantized absmaxes, float32, in the axes of `absmax`."""
        codes = self.absmax.array
        depth = len(self.error.axes)
        count = math.prod(codes.shape[depth:])
        group_max = jnp.repeat(self.group_max.array, GROUP, axis=-1)[..., :count].reshape(codes.shape)
        return dynamic_value(codes) * group_max + jnp.expand_dims(self.mean.array, tuple(range(depth, codes.ndim)))


class Int8Weight(QuantizedWeight):
    """Symmetric int8 with one scale per output."""

    codes: NamedArray  # int8 {..., *Out, *In}
    scale: NamedArray  # float32 {..., *Out}
    error: NamedArray
    Out: tuple[Axis, ...] = eqx.field(static=True)
    In: tuple[Axis, ...] = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    @classmethod
    def encode(cls, values, stack, Out, In, dtype) -> "Int8Weight":
        inputs = tuple(range(-len(In), 0))
        scale = jnp.max(jnp.abs(values), axis=inputs, keepdims=True) / 127
        codes = jnp.round(values / jnp.where(scale > 0, scale, 1.0)).astype(jnp.int8)
        error = hax.zeros(stack, dtype=jnp.float32)
        return cls(
            codes=_named(codes, (*stack, *Out, *In)),
            scale=_named(scale, (*stack, *Out)),
            error=error,
            Out=Out,
            In=In,
            dtype=dtype,
        )

    def decode(self) -> jax.Array:
        return self.codes.array * jnp.expand_dims(self.scale.array, tuple(range(-len(self.In), 0)))


QUANTIZATIONS: dict[str, type[QuantizedWeight] | None] = {"none": None, "nf4": Nf4Weight, "int8": Int8Weight}


def quantize(model: M, quantization: str) -> M:
    """Quantizes the weights of the linear layers in the model's stacks, but no embeddings, head, norms or biases."""

    def visit(node: Any) -> Any:
        if isinstance(node, hnn.Linear):
            return dataclasses.replace(node, weight=quantize_weight(node.weight, node.In, node.Out, quantization))
        return node

    def visit_stack(node: Any) -> Any:
        is_stack = isinstance(node, hnn.Stacked)
        return jax.tree.map(visit, node, is_leaf=lambda n: isinstance(n, hnn.Linear)) if is_stack else node

    return jax.tree.map(visit_stack, model, is_leaf=lambda node: isinstance(node, hnn.Stacked))


def quantize_weight(weight: NamedArray, In: AxisSpec, Out: AxisSpec, quantization: str, dtype: Any = None) -> Any:
    """The weight {..., *Out, *In} in the form that `quantization` names; the weight itself for "none".

    `dtype` is the dtype of the weight without quantization; by default, its present one. Leading axes are those of a
    stack, whose layers are quantized separately.
    """
    kind = QUANTIZATIONS[quantization]
    if kind is None:
        return weight
    inputs, outputs = axes_of(In), axes_of(Out)
    stack = tuple(axis for axis in weight.axes if axis not in inputs + outputs)
    values = weight.rearrange((*stack, *outputs, *inputs)).array.astype(jnp.float32)
    encoded = kind.encode(values, stack, outputs, inputs, jnp.dtype(dtype or weight.dtype))
    encoded = jax.lax.optimization_barrier(encoded)  # otherwise XLA would compute the codes again to decode them
    dims = tuple(range(len(stack), values.ndim))
    squared_error = jnp.sum((encoded.decode() - values) ** 2, axis=dims)
    squared_norm = jnp.sum(values**2, axis=dims)
    error = jnp.sqrt(squared_error / jnp.where(squared_norm > 0, squared_norm, 1.0))
    return dataclasses.replace(encoded, error=_named(error, stack))


def quantized_product(inputs: NamedArray, weight: QuantizedWeight) -> NamedArray:
    """Maps inputs {..., *In} to {..., *Out}, in the dtype of the inputs. The weight gets no gradient."""
    In, Out, axes = weight.In, weight.Out, inputs.axes

    def dequantized(weight: QuantizedWeight, dtype) -> NamedArray:
        # If a mesh splits the inputs of a weight, devices exchange its codes, not its values.
        return hax.auto_sharded(weight).astype(dtype)

    # Without custom_vjp, JAX would keep the dequantized weight for the backward pass.
    @jax.custom_vjp
    def product(inputs, weight):
        return inputs.dot(dequantized(weight, inputs.dtype), axis=In)

    def forward(inputs, weight):
        return product(inputs, weight), weight

    def backward(weight, cotangent):
        return cotangent.dot(dequantized(weight, cotangent.dtype), axis=Out).rearrange(axes), None

    product.defvjp(forward, backward)
    return product(inputs, weight)


def parameter_count(tree: Any) -> int:
    """The number of elements in the arrays of `tree`. A quantized weight counts as the weight that it replaces."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, QuantizedWeight))
    return sum(node.size for node in nodes if jax.tree.leaves(node))  # one that was filtered away has no arrays


def _blocks(In: tuple[Axis, ...], block: int) -> tuple[tuple[Axis, ...], Axis]:
    """The outer axes of the input, which no block crosses, and the axis of the blocks inside them."""
    depth = next(i for i in reversed(range(len(In))) if _size(In[i:]) % block == 0)
    return In[:depth], Axis("block", _size(In[depth:]) // block)


def _encode_absmax(centred: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 [..., n] to codes uint8 [..., n] and the maximum of each group [..., ceil(n / 256)]."""
    count = centred.shape[-1]
    groups = -(-count // GROUP)
    padding = [(0, 0)] * (centred.ndim - 1) + [(0, groups * GROUP - count)]
    grouped = jnp.pad(centred, padding).reshape(*centred.shape[:-1], groups, GROUP)
    group_max = jnp.max(jnp.abs(grouped), axis=-1)
    codes = _nearest(grouped / jnp.where(group_max > 0, group_max, 1.0)[..., None], DYNAMIC_MAP)
    return codes.reshape(*centred.shape[:-1], -1)[..., :count], group_max


def _nearest(values: jax.Array, table: np.ndarray) -> jax.Array:
    """uint8: the index of the nearest entry in a sorted table."""
    bounds = (table[:-1] + table[1:]) / 2
    if len(bounds) < 16:  # comparisons, which fuse and vectorize
        return sum((values > bound).astype(jnp.uint8) for bound in bounds)  # pyright: ignore[reportReturnType]
    return jnp.searchsorted(bounds, values).astype(jnp.uint8)


def _nf4_value(codes: jax.Array) -> jax.Array:
    """float32: NF4[codes]."""

    def choose(codes):  # one level of choices for each bit
        values: list[Any] = [jnp.float32(value) for value in NF4]
        for bit in range(4):
            is_set = (codes >> bit) & 1 != 0
            values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
        return values[0]

    # Gathers are slow on a TPU. On other platforms, XLA would broadcast the constants of `choose` to the size of the
    # weight, hoist them out of the loop over layers, and hold sixteen such arrays.
    return choose(codes) if platform() == "tpu" else _gather(codes, NF4)


def _gather(codes: jax.Array, table: np.ndarray) -> jax.Array:
    return jnp.asarray(table).at[codes].get(mode="promise_in_bounds")


def _named(array: jax.Array, axes: tuple[Axis, ...]) -> NamedArray:
    return hax.named(array.reshape([axis.size for axis in axes]), axes)


def _size(axes: tuple[Axis, ...]) -> int:
    return math.prod(axis.size for axis in axes)
