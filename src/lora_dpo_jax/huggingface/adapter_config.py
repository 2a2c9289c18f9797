"""PEFT's `adapter_config.json`: the settings of an adapter, read and written."""

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from lora_dpo_jax.huggingface.folders import is_url
from lora_dpo_jax.huggingface.tensors import TensorFiles, abridged
from lora_dpo_jax.json_objects import REQUIRED, JsonObject, is_number, is_texts, is_whole, read_json_object
from lora_dpo_jax.lora import EMBEDDING, HEAD, PEFT_SWITCHES, LoraConfig
from lora_dpo_jax.redaction import without_secrets

LOCAL_URLS = ("file://", "local://")
CONFIG, STEM = "adapter_config.json", "adapter_model"
WRAPPER = "language_model"  # the decoder of a multimodal model

# Values of init_lora_weights that take a part of the base's weight away, which can be computed from that weight.
CHANGED_BASES = ("pissa", "olora")
# Options that decide what an adapter computes.
USED = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", *PEFT_SWITCHES}
USED |= {
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "trainable_token_indices",
    "base_model_name_or_path",
    "target_parameters",
}
# Options that do not change what an adapter computes.
HARMLESS = {"auto_mapping", "inference_mode", "peft_version", "revision", "runtime_config"}
HARMLESS |= {"eva_config", "loftq_config", "megatron_core", "qalora_group_size", "ensure_weight_tying"}
# Values with which the other options change nothing. For options not named here, only null, false and empty do so.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "task_type": (None, "CAUSAL_LM"),
    "bias": ("none",),
    # Not corda, loftq, lora_ga or pissa_niter: these change the base by numbers that cannot be computed again here.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica", *CHANGED_BASES),
}
# Why an option is not supported.
REASONS = {
    "alora_invocation_tokens": "it acts only after its invocation tokens",
    "bias": "biases of the base were trained",
    "fan_in_fan_out": "its weights are transposed",
    "init_lora_weights": "it fits only a base that was changed when it was made; PEFT's save_pretrained writes it as "
    "plain LoRA with path_initial_model_for_weight_conversion",
    "layer_replication": "layers of the base are repeated",
    "lora_bias": "its adapters have biases",
    "modules_to_save": "whole layers were trained; PEFT's merge_and_unload makes a model of them",
}
ALL_LINEAR = "all-linear"
PEFT_DEFAULT_TARGETS = ["q_proj", "v_proj"]  # the same for every family that is supported here
TARGETS = "a list of names, or a regular expression that compiles"


def adapter_folder(folder: Path) -> Path:
    """The folder itself, or the one folder in it that holds an adapter, as trainers write policy/ or default/."""
    if (folder / CONFIG).exists():
        return folder
    within = list(folder.glob(f"*/{CONFIG}"))
    return within[0].parent if len(within) == 1 and not (folder / "config.json").exists() else folder


def read_adapter_config(folder: Path) -> LoraConfig:
    """The settings in `folder`/adapter_config.json; ValueError names those that are not supported."""
    peft = read_peft(folder)
    targets = _unwrapped(peft.taken("target_modules", None, _is_targets, TARGETS))
    layers = peft.taken("layers_to_transform", None, _is_layers, "the number of a layer, or a list of them")
    if layers is not None and isinstance(targets, str):
        raise peft.error("layers_to_transform", f"needs a list in target_modules; found {targets!r}")
    parameters = _unwrapped(peft.taken("target_parameters", None, is_texts, "a list of names"))
    if targets is None and not parameters:
        targets = PEFT_DEFAULT_TARGETS
    rank_pattern = _pattern_in(peft, "rank_pattern", lambda ranks, key: ranks.whole(key, least=1))
    alpha_pattern = _pattern_in(peft, "alpha_pattern", lambda alphas, key: float(alphas.number(key, above=0.0)))
    return LoraConfig(
        r=peft.whole("r", 8),
        alpha=float(peft.number("lora_alpha", 8, above=0.0)),
        dropout=float(peft.taken("lora_dropout", 0.0, lambda p: is_number(p) and 0 <= p < 1, "a number in [0, 1)")),
        target_modules=None if targets == ALL_LINEAR else targets or [],
        exclude_modules=_unwrapped(peft.taken("exclude_modules", None, _is_targets, TARGETS)),
        target_parameters=parameters or None,
        layers_to_transform=layers,
        layers_pattern=None if layers is None else peft.taken("layers_pattern", None, _is_targets, TARGETS),
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        trainable_token_indices=_token_indices(peft),
        a_init=start if (start := peft.values.get("init_lora_weights")) in CHANGED_BASES else "random",
        **{switch: peft.flag(switch, False) for switch in PEFT_SWITCHES},
    )


def read_base_model(folder: Path) -> tuple[str | None, str | None]:
    """(the base model that an adapter names, a folder or a hub id; its revision on the hub)."""
    peft = read_json_object(adapter_folder(folder) / CONFIG)
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


def peft_config(
    base_model: str, revision: str | None, config: LoraConfig, targets: list[str], layers: Sequence[str]
) -> dict[str, Any]:
    """The content of adapter_config.json. `layers` are the names of the layers that have an adapter."""
    ranks = {name: config.for_layer(name).r for name in layers}
    alphas = {name: _plain(config.for_layer(name).alpha) for name in layers}
    r, alpha = _usual(ranks, config.r), _usual(alphas, _plain(config.alpha))
    return {
        "alpha_pattern": _pattern(alphas, alpha),
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_bias": False,
        "lora_dropout": config.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": _pattern(ranks, r),
        "revision": revision,
        "target_modules": targets,
        # Readers of earlier versions do not know it.
        **({"target_parameters": config.target_parameters} if config.target_parameters else {}),
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": config.trainable_token_indices,
        **{switch: getattr(config, switch) for switch in PEFT_SWITCHES},
    }


def _plain(alpha: float) -> int | float:
    return int(alpha) if float(alpha).is_integer() else alpha


def _usual(values: Mapping[str, Any], preferred: Any) -> Any:
    """The preferred value if a layer has it, else the most frequent one."""
    return preferred if preferred in values.values() else Counter(values.values()).most_common(1)[0][0]


def _pattern(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """PEFT's pattern for the layers whose value is not the usual one, by last parts of paths or by whole paths."""
    by_part: dict[str, set[Any]] = {}
    for name, value in values.items():
        by_part.setdefault(name.rpartition(".")[2], set()).add(value)
    pattern = {part: of_part.pop() for part, of_part in by_part.items() if len(of_part) == 1 and usual not in of_part}
    whole = {name: value for name, value in values.items() if value != usual and name.rpartition(".")[2] not in pattern}
    return whole | pattern


def read_peft(folder: Path) -> JsonObject:
    """The content of adapter_config.json. Raises ValueError if our adapters cannot compute what it asks for."""
    folder = adapter_folder(folder)
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
            raise peft.error(key, f"is not supported{_because(key)}; needed: {needed}{_tensors_of_it(folder)}")
    return peft


def refused_modules(peft: JsonObject, tensors: list[str]) -> ValueError:
    """The error about modules_to_save, with the tensors that are not the base's."""
    stored = f"; not as in the base: {abridged(tensors)}" if tensors else ""
    return peft.error("modules_to_save", f"is not supported{_because('modules_to_save')}; needed: null{stored}")


def _because(key: str) -> str:
    return f": {REASONS[key]}" if key in REASONS else ""


def _tensors_of_it(folder: Path) -> str:
    """The end of a message: the tensors that plain LoRA does not have."""
    try:
        names = TensorFiles(folder, STEM).names
    except (ValueError, OSError):  # another error, for another message
        return ""
    others = [name for name in names if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    return f"; it holds {abridged(others)}" if others else ""


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


def _token_indices(peft: JsonObject) -> list[int] | dict[str, list[int]] | None:
    """trainable_token_indices, with the names that this package has for matrices of tokens."""
    needed = f"a list of token ids, or such lists for {EMBEDDING} and {HEAD}"
    found = peft.taken("trainable_token_indices", None, lambda x: isinstance(x, dict) or _is_ids(x), needed)
    if not isinstance(found, dict):
        return found or None
    rows = {name.rpartition(".")[2]: ids for name, ids in found.items()}
    if len(rows) < len(found) or not set(rows) <= {EMBEDDING, HEAD} or not all(map(_is_ids, rows.values())):
        raise peft.error("trainable_token_indices", f"must be {needed}")
    return {name: ids for name, ids in rows.items() if ids} or None


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(is_whole(token, 0) for token in value) and len(set(value)) == len(value)


def _pattern_in(peft: JsonObject, name: str, value: Callable[[JsonObject, str], Any]) -> dict[str, Any]:
    """rank_pattern or alpha_pattern; ValueError if a key is no regular expression, or a value is wrong."""
    pattern = peft.object(name, None)
    if pattern is None:
        return {}
    for key in pattern.values:
        if not _is_targets(f"({key})"):
            raise pattern.error(key, "is the value of a key that is no regular expression")
    return {_unwrapped(key): value(pattern, key) for key in pattern.values}


def _unwrapped(names: Any) -> Any:
    """Targets, or a key of a pattern, without the part of paths that a multimodal wrapper puts before the decoder's."""
    if isinstance(names, list):
        return [_unwrapped(name) for name in names]
    return re.sub(rf"\b{WRAPPER}\\?\.", "", names) if isinstance(names, str) else names
