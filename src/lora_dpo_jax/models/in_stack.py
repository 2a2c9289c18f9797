"""Weights of experts that a loop over layers does not slice: kernels read a layer's part of the stack in place.

XLA copies what is sliced for a kernel. A layer's experts are most of its weights, and each pass would copy all of them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import haliax.nn as hnn
import jax
import jax.numpy as jnp
from haliax import NamedArray
from jax import Array

from lora_dpo_jax.axes import EXPERT, LAYERS
from lora_dpo_jax.models.grouped_products import reads_stacks
from lora_dpo_jax.models.linear import Linear


class InStack(eqx.Module):
    """One layer's part of an array that holds all layers."""

    stack: NamedArray  # {layers, ...}
    layer: Array  # int32 []

    def sliced(self) -> NamedArray:
        return self.stack[LAYERS, self.layer]


def without_experts(stacked: hnn.Stacked[Any]) -> tuple[hnn.Stacked[Any], Callable[[Any], Any]]:
    """The layers with their numbers in the place of the weights of experts; what puts `InStack` there in each layer.

    The layers as they are, where no kernel reads in place.
    """
    where = [number for number, linear in enumerate(_linears(stacked.stacked)) if _is_of_experts(linear)]
    if not where or not reads_stacks():
        return stacked, lambda layers: layers

    def weights(layers: Any) -> list[Any]:
        linears = _linears(layers)
        return [linears[number].weight for number in where]

    stacks = weights(stacked.stacked)
    numbers = NamedArray(jnp.arange(stacked.Block.size, dtype=jnp.int32), (LAYERS,))

    def restored(layers: Any) -> Any:
        found = [InStack(stack, number.array) for stack, number in zip(stacks, weights(layers), strict=True)]
        return eqx.tree_at(weights, layers, found)

    numbered = eqx.tree_at(weights, stacked.stacked, [numbers] * len(where))
    return dataclasses.replace(stacked, stacked=numbered), restored


def _linears(tree: Any) -> list[Linear]:
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Linear))
    return [node for node in nodes if isinstance(node, Linear)]


def _is_of_experts(linear: Linear) -> bool:
    return isinstance(linear.weight, NamedArray) and EXPERT in linear.weight.axis_names
