"""Reads and writes adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

A tensor is called `base_model.model.<path of the layer>.<factor>`: `lora_A.weight`, {r, in}, or `lora_B.weight`,
{out, r}. Each kind of `Adapter` defines its factors.
"""

import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import haliax as hax
import haliax.nn as hnn
import jax
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from haliax import NamedArray

from lora_dpo_jax.huggingface.folders import export_folder, is_url
from lora_dpo_jax.huggingface.tensors import TensorFiles, abridged, sharded_array, write_tensors
from lora_dpo_jax.huggingface.tokenizers import save_tokenizer
from lora_dpo_jax.json_objects import REQUIRED, JsonObject, is_number, is_texts, is_whole, read_json_object
from lora_dpo_jax.lora import (
    PEFT_SWITCHES,
    Adapter,
    Factor,
    LoraConfig,
    adapt,
    adapter_type,
    empty_adapter,
    linear_layers,
    map_linear_layers,
    matching_names,
    unadaptable_layers,
)
from lora_dpo_jax.models import CausalLM
from lora_dpo_jax.printable import printable
from lora_dpo_jax.redaction import without_secrets
from lora_dpo_jax.sharding import on_host

logger = logging.getLogger(__name__)

LOCAL_URLS = ("file://", "local://")
CONFIG, STEM = "adapter_config.json", "adapter_model"
# PEFT stores the whole frozen head beside the adapter of a head.
HEAD_COPY = "base_model.model.lm_head.base_layer.weight"

# Options that decide what an adapter computes.
USED = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", *PEFT_SWITCHES}
USED |= {"layers_to_transform", "base_model_name_or_path"}
# Options that do not change what an adapter computes.
HARMLESS = {"auto_mapping", "inference_mode", "peft_version", "revision", "runtime_config"}
HARMLESS |= {"layers_pattern", "loftq_config", "megatron_core", "qalora_group_size", "ensure_weight_tying"}
# Values with which the other options change nothing. For options not named here, only null, false and empty do so.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "task_type": (None, "CAUSAL_LM"),
    "bias": ("none",),
    # Not pissa, olora, corda, loftq or lora_ga: these change the base, and the adapter fits only the changed base.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),
}
ALL_LINEAR = "all-linear"
PEFT_DEFAULT_TARGETS = ["q_proj", "v_proj"]  # the same for every family that is supported here
TARGETS = "a list of names, or a regular expression that compiles"


@dataclass(frozen=True)
class LayerAdapter:
    """The adapter of one layer, on the host. `adapter` may hold a stack of layers."""

    name: str  # the dotted path of the layer
    adapter: Adapter
    tensors: dict[str, np.ndarray]  # float32, by PEFT's names

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(out, in)"""
        wrapped = self.adapter.wrapped
        return hax.axis_size(wrapped.Out), hax.axis_size(wrapped.In)

    def merge(self, weight: np.ndarray) -> np.ndarray:
        """The layer's weight {out, in} with the adapter merged in, both float32."""
        return self.adapter.merge(weight, self.tensors)


def save_adapter(
    model: CausalLM,
    folder: str | Path,
    *,
    base_model: str,
    config: LoraConfig,
    revision: str | None = None,
    tokenizer: Any = None,
    dtype: Any = np.float32,
    run: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the adapters for `peft.PeftModel.from_pretrained`, to a path or a URL (see `export_folder`).

    `base_model` is the folder, URL or hub id from which readers load the base, `revision` its revision on the hub.
    `tokenizer`, if given, is saved beside the adapters with its chat template. `config` is the config of the adapters;
    but the target modules are those of the model. Every process of a run must call this; only the first one writes.
    """
    adapters = layer_adapters(model)
    _check_config(adapters, config)
    if jax.process_index() != 0:
        return
    # PEFT may be able to adapt layers that we cannot adapt.
    names = [*_layer_names(model), *unadaptable_layers(model)]
    if model.config.has_wrapper:  # its images' layers may have the same names at the end
        names += [f"model.vision_tower.{name.rpartition('.')[2]}" for name in names]
    targets = explicit_targets([adapter.name for adapter in adapters], names)
    tensors = {
        _key(adapter.name, factor): tensor.astype(dtype)
        for adapter in adapters
        for factor, tensor in adapter.tensors.items()
    }
    base = base_from_anywhere(base_model)
    with export_folder(folder, run=run, overwrite=overwrite) as exported:
        write_tensors(exported / f"{STEM}.safetensors", tensors)
        if tokenizer is not None:
            save_tokenizer(tokenizer, exported)
        (exported / "README.md").write_text(_model_card(printable(base), config, targets), encoding="utf-8")
        (exported / CONFIG).write_text(json.dumps(_peft_config(base, revision, config, targets), indent=2) + "\n")


def load_adapter(model: CausalLM, folder: Path, *, mapping: Any = None, base_model: str | None = None) -> CausalLM:
    """The plain `model` with the adapters in `folder`, float32 whatever the file's dtype.

    `mapping` (axis name to mesh axis) gives their sharding; `base_model` is the model's name in messages. Raises
    ValueError with the folder and the tensor or setting if the adapter does not fit the model, or computes something
    that our adapters cannot.
    """
    peft, config, tensors = _read(folder), read_adapter_config(folder), TensorFiles(folder, STEM)
    made_for = peft.text("base_model_name_or_path", None)
    try:
        if model.lm_head is None and any(key.startswith("base_model.model.lm_head.") for key in tensors.names):
            raise MisfitError(
                f"{folder}: adapts lm_head, which this model ties to the input embedding; that is not supported"
            )
        only_layers = peft.values.get("layers_to_transform")
        targets = _targets(model, config, only_layers)
        empty = adapt(model, targets, lambda layer, _, chosen: empty_adapter(layer, chosen, config))
        _check_tensors(tensors, empty, targets, config, only_layers)
        if HEAD_COPY in tensors.names:
            _check_head(tensors, model)

        def fill(layer: Any, names: list[str]) -> Any:
            return _filled(tensors, layer, names, targets, mapping) if isinstance(layer, Adapter) else layer

        adapted = map_linear_layers(fill, empty)
    except MisfitError as error:
        given = f"a model of {model.config.num_layers} layers, hidden_size {model.config.hidden_size}"
        given = f"{base_model!r}, {given}" if base_model else given
        raise ValueError(f"{error}. It was made for base_model_name_or_path={made_for!r}; given is {given}") from error
    if made_for and base_model and PurePosixPath(made_for).name != PurePosixPath(base_model).name:
        logger.warning("%s: made for %r and put on %r, which it fits by its shapes", folder, made_for, base_model)
    return adapted


class MisfitError(ValueError):
    """An adapter does not fit the model."""


def read_adapter_config(folder: Path) -> LoraConfig:
    """The settings in `folder`/adapter_config.json; ValueError names those that are not supported."""
    peft = _read(folder)
    targets = peft.taken("target_modules", None, _is_targets, TARGETS)
    return LoraConfig(
        r=peft.whole("r", 8),
        alpha=float(peft.number("lora_alpha", 8, above=0.0)),
        dropout=float(peft.taken("lora_dropout", 0.0, lambda p: is_number(p) and 0 <= p < 1, "a number in [0, 1)")),
        target_modules=None if targets == ALL_LINEAR else PEFT_DEFAULT_TARGETS if targets is None else targets,
        exclude_modules=peft.taken("exclude_modules", None, _is_targets, TARGETS),
        **{switch: peft.flag(switch, False) for switch in PEFT_SWITCHES},
    )


def read_base_model(folder: Path) -> tuple[str | None, str | None]:
    """(the base model that an adapter names, a folder or a hub id; its revision on the hub)."""
    peft = read_json_object(folder / CONFIG)
    return peft.text("base_model_name_or_path", None), peft.text("revision", None)


def base_from_anywhere(base_model: str) -> str:
    """A name of the base for any working directory: a hub id, an absolute path, or a URL without secrets.

    PEFT and servers resolve a path from their own working directory. Only this package reads URLs.
    """
    if base_model.startswith(LOCAL_URLS):
        base_model = LocalFileSystem._strip_protocol(base_model)
    if is_url(base_model):
        return without_secrets(base_model)
    folder = Path(os.path.expanduser(base_model))
    return str(folder.absolute()) if folder.is_dir() else base_model


def layer_adapters(model: CausalLM) -> list[LayerAdapter]:
    """Copies the adapters of a model to the host. With several processes, all must call this."""
    found = []
    for adapter, names in linear_layers(model):
        if not isinstance(adapter, Adapter):
            continue
        active = np.ones(len(names)) if adapter.active is None else on_host(adapter.active.array).reshape(-1)
        tensors = {name: _tensors_on_host(factor, len(names)) for name, factor in adapter.factors.items()}
        found += [
            LayerAdapter(name, adapter, {factor: of_layers[i] for factor, of_layers in tensors.items()})
            for i, name in enumerate(names)
            if active[i]
        ]
    return found


def explicit_targets(targets: list[str], names: list[str]) -> list[str]:
    """The shortest list that matches `targets` and nothing else among `names`: q_proj, ..., or else full paths."""
    suffixes = sorted({name.rpartition(".")[2] for name in targets})
    if set(matching_names(names, LoraConfig(target_modules=suffixes))) == set(targets):
        return suffixes
    return targets


def _layer_names(model: CausalLM) -> list[str]:
    return [name for _, names in linear_layers(model) for name in names]


def _tensors_on_host(factor: Factor, count: int) -> np.ndarray:
    """float32 [layer, *tensor_shape]"""
    return on_host(factor.in_order().array).astype(np.float32).reshape(count, *factor.tensor_shape)


def _key(layer: str, factor: str) -> str:
    return f"base_model.model.{layer}.{factor}"


def _check_config(adapters: list[LayerAdapter], config: LoraConfig) -> None:
    if not adapters:
        raise ValueError("the model has no adapters to save")
    switches = " and ".join(f"lora.{switch}={getattr(config, switch)}" for switch in PEFT_SWITCHES)
    for name, adapter in ((layer.name, layer.adapter) for layer in adapters):
        found = type(adapter), adapter.rank, adapter.scaling
        asked = adapter_type(adapter.wrapped, config), config.r, config.scaling
        if found != asked:
            (has, r, scaling), (makes, *_) = found, asked
            raise ValueError(
                f"{name} has a {has.__name__} with r={r} and scaling={scaling}, but lora.r={config.r}, lora.alpha="
                f"{config.alpha} and {switches} make a {makes.__name__} with r={config.r}, scaling={config.scaling}"
            )


def _peft_config(base_model: str, revision: str | None, config: LoraConfig, targets: list[str]) -> dict[str, Any]:
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
        "revision": revision,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        **{switch: getattr(config, switch) for switch in PEFT_SWITCHES},
    }


def _model_card(base_model: str, config: LoraConfig, targets: list[str]) -> str:
    # The hub rejects cards whose base is not one of its ids.
    is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base_model)
    base = f"base_model: {json.dumps(base_model)}\n" if is_hub_id else ""
    return f"""---
{base}library_name: peft
pipeline_tag: text-generation
tags: [dpo, lora]
---

LoRA adapter for `{base_model}`, trained by Direct Preference Optimization with `lora_dpo_jax`.

- rank {config.r}, alpha {config.alpha:g}{", rank-stabilized scaling" if config.use_rslora else ""}
- targets: {abridged(targets)}
"""


def _read(folder: Path) -> JsonObject:
    """The content of adapter_config.json. Raises ValueError if our adapters cannot compute what it asks for."""
    path = folder / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing{_where_else(folder)}")
    peft = read_json_object(path)
    peft.taken("peft_type", REQUIRED, lambda kind: kind == "LORA", "'LORA'; no other kind is supported")
    for key, value in peft.values.items():
        if key in USED | HARMLESS or value in (None, False, [], {}):
            continue
        neutral = NEUTRAL.get(key, ())
        if value not in neutral:
            needed = f"one of {list(neutral)}" if neutral else "null, false or empty"
            raise peft.error(key, f"is not supported; needed: {needed}")
    peft.taken("layers_to_transform", None, _is_layers, "the number of a layer, or a list of them")
    return peft


def _where_else(folder: Path) -> str:
    """The end of a message: where the adapter may be, if a parent folder or a model's folder was given."""
    if within := sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}")):
        return f"; its subfolders {abridged(within)} hold adapters: give the path of one"
    return "; the folder holds a model: give it as initialize_from_hf" if (folder / "config.json").exists() else ""


def _is_targets(value: Any) -> bool:
    if not isinstance(value, str):
        return is_texts(value)
    try:
        return re.compile(value) is not None
    except (re.error, OverflowError, RecursionError):
        return False


def _is_layers(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return all(is_whole(number, 0) for number in numbers)


def _targets(model: CausalLM, config: LoraConfig, only_layers: int | list[int] | None) -> set[str]:
    """The names of the layers that the settings select."""
    targets = set(matching_names(_layer_names(model), config))
    if only_layers in (None, []):
        return targets
    numbers = [only_layers] if isinstance(only_layers, int) else only_layers
    return {name for name in targets if any(f".layers.{number}." in name for number in numbers)}


def _check_tensors(
    tensors: TensorFiles, empty: CausalLM, targets: set[str], config: LoraConfig, only_layers: int | list[int] | None
) -> None:
    """Raises MisfitError unless the file holds the factors of the targets, as in `empty`, and nothing else."""
    factors = {
        name: [*layer.factors] for layer, names in linear_layers(empty) if isinstance(layer, Adapter) for name in names
    }
    needed = [_key(name, factor) for name in sorted(targets) for factor in factors[name]]
    settings = {"target_modules": config.target_modules, "exclude_modules": config.exclude_modules}
    settings |= {"layers_to_transform": only_layers}
    chosen = ", ".join(f"{key}={value!r}" for key, value in settings.items() if value is not None)
    asked = f"{CONFIG}'s {chosen or 'target_modules=null'} names {abridged(sorted(targets)) or 'none'}"
    if missing := [key for key in needed if key not in tensors.names]:
        raise MisfitError(f"{tensors.folder}: tensors are missing: {abridged(missing)}; {asked}")
    needed += [HEAD_COPY] if "lm_head" in targets else []
    surplus = [key for key in tensors.names if key not in needed]
    if surplus or not targets:
        raise MisfitError(f"{tensors.folder}: holds tensors that have no place: {abridged(surplus) or 'none'}; {asked}")


def _filled(tensors: TensorFiles, empty: Adapter, names: list[str], targets: set[str], mapping: Any) -> Adapter:
    """The adapter of a layer, or of a stack, with the factors that the file has for its targets."""

    def read(key: str, factor: Factor) -> NamedArray:
        shape, axes = factor.tensor_shape, factor.array.axes
        views = [_tensor(tensors, _key(name, key), shape) if name in targets else None for name in names]
        return hax.named(sharded_array(views, factor.sides, axes, mapping, np.float32), axes)

    return empty.with_factors({key: read(key, factor) for key, factor in empty.factors.items()})


def _tensor(tensors: TensorFiles, key: str, shape: tuple[int, ...]) -> Any:
    """A lazy tensor."""
    info = tensors.info(key)
    if info.shape != shape:
        raise MisfitError(
            f"{tensors.folder}: tensor {key} has shape {info.shape}; the model and {CONFIG}'s r need {shape}"
        )
    if not info.is_float:
        raise ValueError(f"{tensors.folder}: tensor {key} holds {info.dtype}; needed: floating-point numbers")
    return tensors.view(key)


def _check_head(tensors: TensorFiles, model: CausalLM) -> None:
    """Raises MisfitError unless the head that PEFT stored equals the model's, at the lower of the two precisions."""
    head = model.lm_head
    assert isinstance(head, hnn.Linear)  # an adapter of a tied head was rejected before
    theirs = tensors.read(HEAD_COPY)
    ours = head.weight.array
    rounded = theirs.astype(ours.dtype).astype(theirs.dtype)
    if rounded.shape != ours.shape or not bool((ours.astype(rounded.dtype) == rounded).all()):
        raise MisfitError(
            f"{tensors.folder}: {HEAD_COPY} is not the model's lm_head, so the adapter was trained on another base"
        )
