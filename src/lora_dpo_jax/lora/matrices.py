"""What an adapter computes once from the frozen weight of its layer."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
from haliax import NamedArray

from lora_dpo_jax.lora.adapter import stack_axes
from lora_dpo_jax.tensor_names import axes_of


@eqx.filter_jit
def of_matrices(fn: Callable[..., Any], layer: Any, *arrays: jax.Array, **settings: Any) -> Any:
    """fn(weight float32 [out, in], its part of each array) for each layer of the stack, whose axes the results have.

    It takes one layer after the other, so that no more than one weight is in memory in float32. `arrays` have the
    axes of the stack first, too. `settings` are passed on.
    """
    stack = stack_axes(layer)
    depth, sizes = len(stack), [axis.size for axis in stack]
    leaves, structure = jax.tree.flatten(layer.weight, is_leaf=lambda node: isinstance(node, NamedArray))
    out, in_ = (tuple(axes_of(side)) for side in (layer.Out, layer.In))

    def of_layer(slices: tuple[list[jax.Array], list[jax.Array]]) -> Any:
        parts, own = slices
        named = [hax.named(part, leaf.axes[depth:]) for part, leaf in zip(parts, leaves, strict=True)]
        weight = jax.tree.unflatten(structure, named).astype(jnp.float32).rearrange((*out, *in_)).array
        return fn(weight.reshape(math.prod(axis.size for axis in out), -1), *own, **settings)

    def flat(array: jax.Array) -> jax.Array:
        return array.reshape(math.prod(sizes), *array.shape[depth:])

    slices = [flat(leaf.array) for leaf in leaves], [flat(array) for array in arrays]
    found = jax.lax.map(of_layer, slices)
    return jax.tree.map(lambda array: array.reshape(*sizes, *array.shape[1:]), found)
