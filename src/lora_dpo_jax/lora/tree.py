"""The linear layers in a model's tree, by their names in Hugging Face's files."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax

from lora_dpo_jax.lora.adapter import Adapter, named_axes, unwrapped
from lora_dpo_jax.lora.variants import is_adaptable
from lora_dpo_jax.tensor_names import gathered_axes, tensor_names

M = TypeVar("M")

# Attributes for inputs and outputs of linear layers: in haliax, in equinox, and in convolutions of equinox.
SIDES = (("In", "Out"), ("in_features", "out_features"), ("in_channels", "out_channels"))


def linear_layers(model: Any) -> Iterator[tuple[Any, list[str]]]:
    """Every Linear and every adapter with its dotted names: one name, or one per layer if it is stacked."""
    found: list[tuple[Any, list[str]]] = []

    def remember(layer, names):
        found.append((layer, names))
        return layer

    map_linear_layers(remember, model)
    return iter(found)


class LayerNames(NamedTuple):
    """The dotted names of all linear layers of a model: of its modules, and of gathered matrices, PEFT's parameters."""

    modules: list[str]
    parameters: list[str]


def layer_names(model: Any) -> LayerNames:
    found = LayerNames([], [])
    for layer, names in linear_layers(model):
        (found.parameters if gathered_axes(unwrapped(layer)) else found.modules).extend(names)
    return found


def map_linear_layers(fn: Callable[[Any, list[str]], Any], model: M) -> M:
    """Replaces each Linear and each adapter by `fn(layer, names)`."""

    def is_layer(node: Any) -> bool:
        return isinstance(node, Adapter) or is_adaptable(node)

    def visit(path: tuple, node: Any) -> Any:
        return fn(node, tensor_names(path, model)) if is_layer(node) else node

    return jax.tree_util.tree_map_with_path(visit, model, is_leaf=is_layer)


def unadaptable_layers(model: Any) -> dict[str, str]:
    """The linear layers that cannot have an adapter: the name and the reason of each.

    A module counts as linear if it has a weight and a pair of SIDES. No adapter supports modules that are no Linear,
    such as `haliax.nn.MoELinear`. A Linear is also reported if its weight has axes without layer numbers: its adapter
    would then have no names in a file.
    """
    found: dict[str, str] = {}

    def visit(path: tuple, node: Any) -> None:
        layer = unwrapped(node)
        if not _is_linear(layer):
            return
        names = tensor_names(path, model)
        kind = f"{type(layer).__module__}.{type(layer).__name__}"
        if not is_adaptable(layer):
            found.update(dict.fromkeys(names, f"no adapter knows {kind}"))
        elif len(names) != math.prod(axis.size for axis in named_axes(layer)):
            axes = ", ".join(axis.name for axis in named_axes(layer))
            reason = f"{kind} has axes {{{axes}}} but {len(names)} names (see parameters.Numbered)"
            found.update(dict.fromkeys(names, reason))

    jax.tree_util.tree_map_with_path(visit, model, is_leaf=lambda node: isinstance(node, Adapter) or _is_linear(node))
    return found


def _is_linear(node: Any) -> bool:
    if is_adaptable(node):
        return True
    has_weight = isinstance(node, eqx.Module) and getattr(node, "weight", None) is not None
    return has_weight and any(hasattr(node, a) and hasattr(node, b) for a, b in SIDES)
