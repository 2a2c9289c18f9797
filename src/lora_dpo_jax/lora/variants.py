"""Which adapter a layer gets. A new variant of LoRA needs a class, a row of the table and a field of `LoraConfig`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
import jax.numpy as jnp
import numpy as np
from haliax import NamedArray

from lora_dpo_jax.lora.adapter import Adapter, stack_axes
from lora_dpo_jax.lora.config import LoraConfig
from lora_dpo_jax.lora.lora_linear import LoraLinear

# For each class of layers: the adapter that the settings choose. A layer of any other class cannot be adapted.
ADAPTERS: dict[type, Callable[[LoraConfig], type[Adapter]]] = {hnn.Linear: lambda config: LoraLinear}


def is_adaptable(layer: Any) -> bool:
    return isinstance(layer, tuple(ADAPTERS))


def adapter_type(layer: Any, config: LoraConfig) -> type[Adapter]:
    """The class of the adapter that `config` makes for an adaptable layer."""
    return next(choose(config) for kind, choose in ADAPTERS.items() if isinstance(layer, kind))


def new_adapter(layer: Any, chosen: Sequence[bool], config: LoraConfig, *, key) -> Adapter:
    """A new adapter of `layer`. `chosen`: whether each layer of the stack, in the order of names, is a target."""
    return adapter_type(layer, config).init(layer, config, _active(layer, chosen), key=key)


def empty_adapter(layer: Any, chosen: Sequence[bool], config: LoraConfig) -> Adapter:
    """The same with ShapeDtypeStructs as factors, which `Adapter.with_factors` replaces by arrays."""
    active = _active(layer, chosen)
    init = adapter_type(layer, config).init
    shapes = eqx.filter_eval_shape(init, layer, config, active, key=jax.random.key(0))
    return dataclasses.replace(shapes, wrapped=layer, active=active)


def _active(layer: Any, chosen: Sequence[bool]) -> NamedArray | None:
    if all(chosen):
        return None
    stack = stack_axes(layer)
    shape = [axis.size for axis in stack]
    return hax.named(jnp.array(np.reshape(chosen, shape), dtype=jnp.float32), stack)
