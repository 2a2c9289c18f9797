"""Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, both ways.

A tensor is called `base_model.model.<path of the layer>.lora_A.weight`, {r, in}, or `.lora_B.weight`, {out, r}.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import haliax as hax
import haliax.nn as hnn
import jax
import jax.numpy as jnp
import numpy as np
from haliax import Axis, NamedArray

from lora_dpo_jax.huggingface.folders import export_folder
from lora_dpo_jax.huggingface.tensors import TensorFiles, abridged, sharded_array, write_tensors
from lora_dpo_jax.lora import RANK, LoraConfig, LoraLinear, linear_layers, map_linear_layers, matching_names
from lora_dpo_jax.models import CausalLM
from lora_dpo_jax.parameters import axes_of
from lora_dpo_jax.sharding import on_host

CONFIG, STEM = "adapter_config.json", "adapter_model"
# PEFT stores the whole frozen head beside the adapter of a head.
HEAD_COPY = "base_model.model.lm_head.base_layer.weight"

# What an adapter computes follows from these...
USED = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules"}
USED |= {"layers_to_transform", "base_model_name_or_path"}
# ...and not from these.
HARMLESS = {"auto_mapping", "inference_mode", "peft_version", "revision", "runtime_config"}
HARMLESS |= {"layers_pattern", "loftq_config", "megatron_core", "qalora_group_size", "ensure_weight_tying"}
# Values under which the other options change nothing; for those not named here, only null, false and empty.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "task_type": (None, "CAUSAL_LM"),
    "bias": ("none",),
    # Not pissa, olora, corda, loftq or lora_ga: these change the base, and the adapter fits only the changed one.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),
}
ALL_LINEAR = "all-linear"
PEFT_DEFAULT_TARGETS = ["q_proj", "v_proj"]  # of every family that is supported here


@dataclass(frozen=True)
class LayerAdapter:
    """The adapter of one linear layer, on the host: float32 lora_A {r, in} and lora_B {out, r}."""

    name: str  # the dotted path of the layer
    lora_A: np.ndarray
    lora_B: np.ndarray
    scaling: float

    def delta(self) -> np.ndarray:
        """What is added to the layer's weight, float32 {out, in}."""
        return (self.lora_B @ self.lora_A) * np.float32(self.scaling)


def save_adapter(
    model: CausalLM, folder: str | Path, *, base_model: str, config: LoraConfig, dtype: Any = np.float32
) -> None:
    """Writes the adapters for `peft.PeftModel.from_pretrained`, to a path or a URL.

    `base_model` is the folder or hub id that readers take the base from; `config` is that of the adapters, of which
    the target modules are not used: those of the model are. Every process of a run must call this; the first writes.
    """
    adapters = layer_adapters(model)
    _refuse_another_config(adapters, config)
    if jax.process_index() != 0:
        return
    targets = explicit_targets([adapter.name for adapter in adapters], _layer_names(model))
    tensors = {}
    for adapter in adapters:
        tensors[_key(adapter.name, "lora_A")] = adapter.lora_A.astype(dtype)
        tensors[_key(adapter.name, "lora_B")] = adapter.lora_B.astype(dtype)
    with export_folder(folder) as exported:
        write_tensors(exported / f"{STEM}.safetensors", tensors)
        (exported / "README.md").write_text(_model_card(base_model, config, targets))
        (exported / CONFIG).write_text(json.dumps(_peft_config(base_model, config, targets), indent=2) + "\n")


def load_adapter(model: CausalLM, folder: Path, *, mapping: Any = None) -> CausalLM:
    """The plain `model` with the adapters in `folder`, float32 whatever the file's dtype.

    `mapping` (axis name to mesh axis) says how they are sharded. Raises ValueError naming the folder and the tensor or
    the setting where the adapter does not fit the model, or computes something else than `LoraLinear` does.
    """
    config, tensors = read_adapter_config(folder), TensorFiles(folder, STEM)
    targets = _targets(model, tensors, config, _read_json(folder).get("layers_to_transform"))
    if HEAD_COPY in tensors.names:
        _refuse_another_head(tensors, model)

    def adapt(linear: Any, names: list[str]) -> Any:
        chosen = [name in targets for name in names]
        return _read_layer(tensors, linear, names, chosen, config, mapping) if any(chosen) else linear

    return map_linear_layers(adapt, model)


def read_adapter_config(folder: Path) -> LoraConfig:
    """The settings in `folder`/adapter_config.json; ValueError names those that are not supported."""
    peft = _read_json(folder)
    targets = peft.get("target_modules")
    return LoraConfig(
        r=peft.get("r", 8),
        alpha=float(peft.get("lora_alpha", 8)),
        dropout=peft.get("lora_dropout", 0.0),
        use_rslora=peft.get("use_rslora", False),
        target_modules=None if targets == ALL_LINEAR else PEFT_DEFAULT_TARGETS if targets is None else targets,
        exclude_modules=peft.get("exclude_modules"),
    )


def layer_adapters(model: CausalLM) -> list[LayerAdapter]:
    """Copies the adapters of a model to the host; under several processes, all must call this."""
    found = []
    for linear, names in linear_layers(model):
        if not isinstance(linear, LoraLinear):
            continue
        active = [True] * len(names) if linear.active is None else list(on_host(linear.active.array) != 0)
        In, Out = axes_of(linear.wrapped.In), axes_of(linear.wrapped.Out)
        r = linear.lora_A.resolve_axis(RANK).size
        lora_A = on_host(linear.lora_A.rearrange((..., RANK, *In)).array).astype(np.float32).reshape(len(names), r, -1)
        lora_B = on_host(linear.lora_B.rearrange((..., *Out, RANK)).array).astype(np.float32).reshape(len(names), -1, r)
        layers = zip(names, lora_A, lora_B, active, strict=True)
        found += [LayerAdapter(name, A, B, linear.scaling) for name, A, B, is_active in layers if is_active]
    return found


def explicit_targets(targets: list[str], names: list[str]) -> list[str]:
    """The shortest list that matches `targets` and nothing else among `names`: q_proj, ..., or else full paths."""
    suffixes = sorted({name.rpartition(".")[2] for name in targets})
    if set(matching_names(names, LoraConfig(target_modules=suffixes))) == set(targets):
        return suffixes
    return targets


def _layer_names(model: CausalLM) -> list[str]:
    return [name for _, names in linear_layers(model) for name in names]


def _key(layer: str, factor: str) -> str:
    return f"base_model.model.{layer}.{factor}.weight"


def _refuse_another_config(adapters: list[LayerAdapter], config: LoraConfig) -> None:
    if not adapters:
        raise ValueError("the model has no adapters to save")
    for adapter in adapters:
        r = adapter.lora_A.shape[0]
        if (r, adapter.scaling) != (config.r, config.scaling):
            raise ValueError(
                f"{adapter.name} has r={r} and scaling={adapter.scaling}, but lora.r={config.r}, lora.alpha="
                f"{config.alpha} and lora.use_rslora={config.use_rslora} make r={config.r}, scaling={config.scaling}"
            )


def _peft_config(base_model: str, config: LoraConfig, targets: list[str]) -> dict[str, Any]:
    alpha = config.alpha
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_bias": False,
        "lora_dropout": config.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config.r,
        "rank_pattern": {},
        "revision": None,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": config.use_rslora,
    }


def _model_card(base_model: str, config: LoraConfig, targets: list[str]) -> str:
    return f"""---
base_model: {json.dumps(base_model)}
library_name: peft
pipeline_tag: text-generation
tags: [dpo, lora]
---

LoRA adapter for `{base_model}`, trained by Direct Preference Optimization with `lora_dpo_jax`.

- rank {config.r}, alpha {config.alpha:g}{", rank-stabilized scaling" if config.use_rslora else ""}
- targets: {abridged(targets)}
"""


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    peft = json.loads(path.read_text())
    if peft.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type={peft.get('peft_type')!r} is not supported; needed: 'LORA'")
    for key, value in peft.items():
        if key in USED | HARMLESS or value in (None, False, [], {}):
            continue
        neutral = NEUTRAL.get(key, ())
        if value not in neutral:
            needed = f"one of {list(neutral)}" if neutral else "null, false or empty"
            raise ValueError(f"{path}: {key}={value!r} is not supported; needed: {needed}")
    return peft


def _targets(
    model: CausalLM, tensors: TensorFiles, config: LoraConfig, only_layers: int | list[int] | None
) -> set[str]:
    """The layers that the settings ask for, after checking that the file holds their factors and nothing else."""
    if model.lm_head is None and any(key.startswith("base_model.model.lm_head.") for key in tensors.names):
        raise ValueError(
            f"{tensors.folder}: adapts lm_head, which this model ties to the input embedding; that is not supported"
        )
    targets = set(matching_names(_layer_names(model), config))
    if only_layers is not None:
        numbers = [only_layers] if isinstance(only_layers, int) else only_layers
        targets = {name for name in targets if any(f".layers.{number}." in name for number in numbers)}
    needed = [_key(name, factor) for name in sorted(targets) for factor in ("lora_A", "lora_B")]
    asked = f"{CONFIG}'s target_modules={config.target_modules!r} names {abridged(sorted(targets)) or 'none'}"
    if missing := [key for key in needed if key not in tensors.names]:
        raise ValueError(f"{tensors.folder}: tensors are missing: {abridged(missing)}; {asked}")
    needed += [HEAD_COPY] if "lm_head" in targets else []
    surplus = [key for key in tensors.names if key not in needed]
    if surplus or not targets:
        raise ValueError(f"{tensors.folder}: holds tensors that have no place: {abridged(surplus) or 'none'}; {asked}")
    return targets


def _read_layer(
    tensors: TensorFiles, linear: Any, names: list[str], chosen: list[bool], config: LoraConfig, mapping: Any
) -> LoraLinear:
    if isinstance(linear, LoraLinear):
        raise ValueError(f"{names[0]} has an adapter already; merge_lora it, or start from the plain model")
    In, Out = axes_of(linear.In), axes_of(linear.Out)
    stack = tuple(axis for axis in linear.weight.axes if axis not in In + Out)
    Rank = Axis(RANK, config.r)

    def read(factor: str, *sides: tuple[Axis, ...]) -> NamedArray:
        views = [_factor(tensors, _key(name, factor), sides) if chosen[i] else None for i, name in enumerate(names)]
        axes = stack + tuple(axis for side in sides for axis in side)
        return hax.named(sharded_array(views, sides, axes, mapping, np.float32), axes)

    active = None if all(chosen) else hax.named(jnp.array(chosen, dtype=jnp.float32), stack)
    lora_A, lora_B = read("lora_A", (Rank,), In), read("lora_B", Out, (Rank,))
    return LoraLinear(linear, lora_A, lora_B, config.scaling, config.dropout, active)


def _factor(tensors: TensorFiles, key: str, sides: Sequence[tuple[Axis, ...]]) -> Any:
    """A lazy tensor."""
    shape = tuple(math.prod(axis.size for axis in side) for side in sides)
    if tensors.shape(key) != shape:
        raise ValueError(
            f"{tensors.folder}: tensor {key} has shape {tensors.shape(key)}; the model and {CONFIG}'s r need {shape}"
        )
    return tensors.view(key)


def _refuse_another_head(tensors: TensorFiles, model: CausalLM) -> None:
    """ValueError unless the head that PEFT stored is the model's, to the lower of the two precisions."""
    head = model.lm_head
    assert isinstance(head, hnn.Linear)  # an adapter of a tied head has been refused
    theirs = tensors.read(HEAD_COPY)
    ours = head.weight.array
    rounded = theirs.astype(ours.dtype).astype(theirs.dtype)
    if rounded.shape != ours.shape or not bool((ours.astype(rounded.dtype) == rounded).all()):
        raise ValueError(
            f"{tensors.folder}: {HEAD_COPY} is not the model's lm_head, so the adapter was trained on another base"
        )
