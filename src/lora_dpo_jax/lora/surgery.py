"""Functions from one tree to another: they add, remove or merge adapters, or mark them as trainable.

The reference of a run is such a tree too. It shares the weights with the policy.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from haliax import NamedArray

from lora_dpo_jax.lora.adapter import Adapter, unwrapped
from lora_dpo_jax.lora.config import LoraConfig
from lora_dpo_jax.lora.targets import check_targets, matching_layers
from lora_dpo_jax.lora.token_rows import check_token_rows, with_token_rows
from lora_dpo_jax.lora.tree import layer_names, linear_layers, map_linear_layers, unadaptable_layers
from lora_dpo_jax.lora.variants import new_adapter

M = TypeVar("M")

OUTPUT_FACTORS = frozenset({"lora_B", "lora_magnitude_vector"})


def loraize(model: M, config: LoraConfig, *, key) -> M:
    """The model with new adapters on the targets of `config`. Factors are float32; the weights are shared.

    Raises ValueError if nothing matches, or if a target cannot be adapted.
    """
    layers = [names for _, names in linear_layers(model)]
    names = layer_names(model)
    tied = getattr(model, "lm_head", "absent") is None
    check_targets(names, unadaptable_layers(model), config, tied=tied)
    check_token_rows(config, tied=tied)
    # One key for each layer of the tree, target or not: a layer's factors do not depend on the other targets.
    count = sum(len(of_layer) for of_layer in layers)
    keys = {of_layer[0]: key for of_layer, key in zip(layers, jax.random.split(key, count), strict=False)}

    def make(layer: Any, targets: dict[str, bool]) -> Adapter:
        return new_adapter(layer, targets, config, key=keys[next(iter(targets))])

    return with_token_rows(adapt(model, matching_layers(names, config), make), config)


def adapt(model: M, targets: Collection[str], make: Callable[[Any, dict[str, bool]], Adapter]) -> M:
    """The model with `make(layer, {name: whether it is a target})` for each linear layer that has a target.

    Raises ValueError if such a layer has an adapter already.
    """
    wanted = set(targets)

    def replace(layer: Any, names: list[str]) -> Any:
        chosen = {name: name in wanted for name in names}
        if not any(chosen.values()):
            return layer
        if isinstance(layer, Adapter):
            raise ValueError(f"{names[0]} has an adapter already; merge_lora it, or start from the plain model")
        return make(layer, chosen)

    return map_linear_layers(replace, model)


def unwrap_lora(model: M) -> M:
    """The reference: the model without its adapters, under `stop_gradient`. Shares the weights."""
    return jax.lax.stop_gradient(map_linear_layers(lambda layer, _: unwrapped(layer), model))


def merge_lora(model: M) -> M:
    """The model without adapters whose weights give the same output as the adapted model."""
    return _map_adapters(lambda adapter: adapter.merged(), model)


def for_inference(model: M) -> M:
    """The model with its adapters as inference needs them: those of equal targets and ranks share compiled programs."""
    return _map_adapters(lambda adapter: adapter.for_inference(), model)


def with_dropout(model: M, rate: float) -> M:
    """The model with dropout `rate` in all its adapters."""
    return _map_adapters(lambda adapter: adapter.with_dropout(rate), model)


def trainable_filter(model: M) -> M:
    """A tree of bools, true at the factors of adapters: for `equinox.partition`."""
    return _marked(model, lambda adapter: [factor.array.array for factor in adapter.factors.values()])


def constant_filter(model: M) -> M:
    """The same, true at the frozen arrays of adapters, which steps do not change."""
    return _marked(model, lambda adapter: [array.array for array in adapter.constants.values()])


def output_filter(tree: M) -> M:
    """A tree of bools, true at the factors with the axes of a layer's outputs: those to which LoRA+ gives another rate.

    They are told by the names of their fields, so `tree` may be any tree of factors.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(str(getattr(entry, "name", getattr(entry, "key", ""))) in OUTPUT_FACTORS for entry in path),
        tree,
    )


def map_factors(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """A tree with `function(array, sides, *those of rest)` in place of each NamedArray of `tree`, a tree of factors.

    `sides` are the names of the axes of one matrix of PEFT's tensor, (rows, columns), or of one vector, (rows,). All
    other axes of the array are those of stacks. The sides of an array of no adapter are (all its axes,).
    """

    def sides_of(node: Any) -> Any:
        factors = node.factors.values() if isinstance(node, Adapter) else ()
        known = {
            id(factor.array): tuple(
                tuple(name for name in side if name not in factor.gathered) for side in factor.side_names
            )
            for factor in factors
        }
        return jax.tree.map(lambda array: known.get(id(array), (tuple(array.axis_names),)), node, is_leaf=_is_named)

    def apply(array: NamedArray, sides: tuple[tuple[str, ...], ...], *others: Any) -> Any:
        return array if array.array is None else function(array, sides, *others)

    sides = jax.tree.map(sides_of, tree, is_leaf=lambda node: isinstance(node, Adapter) or _is_named(node))
    return jax.tree.map(apply, tree, sides, *rest, is_leaf=_is_named)


def _is_named(node: Any) -> bool:
    return isinstance(node, NamedArray)


def _marked(model: M, arrays: Callable[[Adapter], list[Any]]) -> M:
    def mark(node: Any) -> Any:
        marks = jax.tree.map(lambda _: False, node)
        if isinstance(node, Adapter) and (count := len(arrays(node))):
            return eqx.tree_at(arrays, marks, [True] * count)
        return marks

    return jax.tree.map(mark, model, is_leaf=lambda node: isinstance(node, Adapter))


def frozen_copy(model: M) -> M:
    """A copy of the model's adapters, for use as the reference of a run that trains them further."""
    return jax.tree.map(jnp.copy, eqx.filter(model, trainable_filter(model)))


def reference_model(model: M, adapters: Any) -> M:
    """The reference of the policy `model`, or of a part of it. It shares the weights and gets no gradient.

    It is the base without adapters, or with the frozen `adapters` (a tree like `model`, or only its leaves).
    """
    if adapters is None:
        return unwrap_lora(model)
    mine, weights = eqx.partition(model, trainable_filter(model))
    frozen = jax.tree.unflatten(jax.tree.structure(mine), jax.tree.leaves(adapters))
    return jax.lax.stop_gradient(eqx.combine(frozen, weights))


@eqx.filter_jit
def equals_reference(model: Any, adapters: Any, *, training: bool = False) -> jax.Array:
    """Whether the policy `model` equals `reference_model(model, adapters)`, by their arrays: a bool without axes.

    If the reference has no adapters, the two are equal if the policy's adapters add nothing. Otherwise they are equal
    if their adapters are, except in `training` with dropout. `model` may be a tree of adapters without weights.
    """
    mine = [layer for layer, _ in linear_layers(model) if isinstance(layer, Adapter)]
    if adapters is None:
        return functools.reduce(jnp.logical_and, [adapter.adds_nothing() for adapter in mine], jnp.ones((), bool))
    trainable = eqx.filter(model, trainable_filter(model))
    drops = training and any(adapter.dropout > 0.0 for adapter in mine)
    if drops or jax.tree.structure(trainable) != jax.tree.structure(adapters):
        return jnp.zeros((), bool)
    same = jax.tree.leaves(jax.tree.map(jnp.array_equal, trainable, adapters))
    return functools.reduce(jnp.logical_and, same, jnp.ones((), bool))


def _map_adapters(fn: Callable[[Adapter], Any], model: M) -> M:
    return map_linear_layers(lambda layer, _: fn(layer) if isinstance(layer, Adapter) else layer, model)
