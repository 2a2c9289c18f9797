"""Which adapter a layer gets. A new variant of LoRA needs a class, a row of the table and a field of `LoraConfig`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import haliax.nn as hnn
import jax

from lora_dpo_jax.axes import EXPERT
from lora_dpo_jax.lora.adapter import Adapter, ByLayer, stack_axes
from lora_dpo_jax.lora.config import LoraConfig
from lora_dpo_jax.lora.dora_linear import DoraLinear
from lora_dpo_jax.lora.lora_linear import LoraLinear
from lora_dpo_jax.lora.offset_lora import OffsetLora

# For each class of layers: the adapter that the settings choose. A layer of any other class cannot be adapted.
ADAPTERS: dict[type, Callable[[LoraConfig], type[Adapter]]] = {
    hnn.Linear: lambda config: DoraLinear if config.use_dora else OffsetLora if config.starts_at_factors else LoraLinear
}


def is_adaptable(layer: Any) -> bool:
    return isinstance(layer, tuple(ADAPTERS))


def adapter_type(layer: Any, config: LoraConfig) -> type[Adapter]:
    """The class of the adapter that `config` makes for an adaptable layer."""
    return next(choose(config) for kind, choose in ADAPTERS.items() if isinstance(layer, kind))


def new_adapter(layer: Any, targets: Mapping[str, bool], config: LoraConfig, *, key) -> Adapter:
    """A new adapter of `layer`. `targets`: by the name of each layer of the stack, whether it is a target."""
    _check_experts(layer, next(iter(targets)), config)
    config, by_layer = _of_layers(layer, targets, config)
    return adapter_type(layer, config).init(layer, config, by_layer, key=key)


def empty_adapter(layer: Any, targets: Mapping[str, bool], config: LoraConfig) -> Adapter:
    """The same with ShapeDtypeStructs as factors, which `Adapter.with_factors` replaces by arrays."""
    config, by_layer = _of_layers(layer, targets, config)
    init = adapter_type(layer, config).init
    shapes = eqx.filter_eval_shape(init, layer, config, by_layer, key=jax.random.key(0))
    return dataclasses.replace(shapes, wrapped=layer, by_layer=by_layer)


def _check_experts(layer: Any, name: str, config: LoraConfig) -> None:
    """Raises ValueError if the layer is one of experts and `config` asks for more than plain LoRA."""
    has_other_adapter = config.a_init == "eva" or adapter_type(layer, config) is not LoraLinear
    if has_other_adapter and any(axis.name == EXPERT for axis in stack_axes(layer)):
        asked = "lora.use_dora=true" if config.use_dora else f"lora.a_init={config.a_init}"
        raise ValueError(
            f"{asked} is not there for experts, such as {name}. Leave it out, or leave the experts out by "
            "lora.exclude_modules"
        )


def _of_layers(layer: Any, targets: Mapping[str, bool], config: LoraConfig) -> tuple[LoraConfig, ByLayer | None]:
    settings = [config.for_layer(name) if is_target else None for name, is_target in targets.items()]
    by_layer = ByLayer.of(layer, settings)
    return (config, by_layer) if by_layer is not None or settings[0] is None else (settings[0], None)
