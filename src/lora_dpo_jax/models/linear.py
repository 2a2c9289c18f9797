"""Linear layers for a decoder with frozen weights."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
import jax.numpy as jnp
from haliax import NamedArray
from haliax.axis import AxisSpec

from lora_dpo_jax.axes import EXPERT
from lora_dpo_jax.lora import apply_all
from lora_dpo_jax.lora.adapter import names_of
from lora_dpo_jax.models.quantization import QuantizedWeight, quantized_product

PRODUCT = "product"  # the name of a linear layer's output in checkpointing policies


class Linear(hnn.Linear):
    """A linear layer without haliax's scaling by one, for which the backward pass would keep a copy of the weight.

    The weight is a NamedArray or a QuantizedWeight, which a product dequantizes.
    """

    weight: Any

    def __call__(self, inputs: NamedArray, *, key=None) -> NamedArray:
        del key
        if isinstance(self.weight, QuantizedWeight):
            product = quantized_product(inputs, self.weight)
        else:
            # Without `preferred_element_type`, einsum would round the result to the dtype of the factors.
            dtype = getattr(self.dot_general, "result_dtype", None)
            options: Any = {"dot_general": self.dot_general, "preferred_element_type": dtype}
            product = inputs.dot(self.weight, axis=self.In, **options)
        out = hax.auto_sharded(product)
        return out if self.bias is None else hax.auto_sharded(out + self.bias)


class GatheredLinear(Linear):
    """The same layer of all experts, whose tensor holds all of their matrices: see `tensor_names.Gathered`."""

    gathered: ClassVar[tuple[str, ...]] = (EXPERT,)


def inputs_first(node: Any) -> Any:
    """A linear layer with the weight {*stack, *In, *Out}, anything else as it is. Of NumPy's arrays, it is a view."""
    if not isinstance(node, Linear) or isinstance(node, GatheredLinear):
        return node
    In, Out = names_of(node.In), names_of(node.Out)
    stack = tuple(axis.name for axis in node.weight.axes if axis.name not in (*In, *Out))
    if EXPERT in stack:
        return node
    names = (*stack, *In, *Out)
    order = [node.weight.axis_names.index(name) for name in names]
    return dataclasses.replace(node, weight=NamedArray(node.weight.array.transpose(order), names))


def linear(
    In: AxisSpec, Out: AxisSpec, *, key, use_bias: bool, dot_general: Any = None, kind: type[Linear] = Linear
) -> Linear:
    made = hnn.Linear.init(In, Out, key=key, use_bias=use_bias, dot_general=dot_general)
    return kind(made.weight, made.bias, In, Out, dot_general=made.dot_general)


def product(linear: Any, x: NamedArray, *, key=None) -> NamedArray:
    """linear(x), marked with the name that checkpointing policies keep."""
    return hax.tree_checkpoint_name(linear(x, key=key), PRODUCT)


def products(layers: Sequence[Any], x: NamedArray, keys: Sequence[Any]) -> list[NamedArray]:
    """[product(layer, x, key=key) ...], of layers that read the same input."""
    return [hax.tree_checkpoint_name(out, PRODUCT) for out in apply_all(layers, x, keys)]


def scaled(x: NamedArray, scale: float) -> NamedArray:
    """x * scale, rounded once to the dtype of `x`; Python's number would be rounded to it first."""
    return x if scale == 1.0 else (x.astype(jnp.float32) * scale).astype(x.dtype)


class Float32Accumulation(eqx.Module):
    """A product of low-precision factors that returns its float32 sums, as logits need.

    Its cotangent is rounded to the factors' dtype, so the backward product has low precision as well.
    """

    result_dtype: ClassVar[Any] = jnp.float32

    def __call__(self, lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, **kwargs):
        del preferred_element_type

        def product(lhs, rhs, dtype):
            return jax.lax.dot_general(lhs, rhs, dimension_numbers, precision, dtype, **kwargs)

        @jax.custom_vjp
        def float32_product(lhs, rhs):
            return product(lhs, rhs, jnp.float32)

        def forward(lhs, rhs):
            return float32_product(lhs, rhs), (lhs, rhs)

        def backward(factors, cotangent):
            _, pullback = jax.vjp(functools.partial(product, dtype=None), *factors)
            return pullback(cotangent.astype(factors[0].dtype))

        float32_product.defvjp(forward, backward)
        return float32_product(lhs, rhs)
