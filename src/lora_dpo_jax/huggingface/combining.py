"""Several adapters of one base as one, with a weight for each: PEFT's add_weighted_adapter, from files to files."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_dpo_jax.huggingface.adapter_config import (
    CONFIG,
    STEM,
    adapter_folder,
    peft_config,
    read_adapter_config,
    read_base_model,
)
from lora_dpo_jax.huggingface.adapter_names import key_of, layers_of, written_names
from lora_dpo_jax.huggingface.card import CARD, model_card
from lora_dpo_jax.huggingface.folders import export_folder
from lora_dpo_jax.huggingface.tensors import TensorFiles, write_tensors
from lora_dpo_jax.lora import LoraConfig

COMBINATIONS = ("cat", "linear")


@dataclass(frozen=True)
class Factors:
    """A and B of one layer, float32, with the scaling of their product."""

    A: np.ndarray  # {r, in}
    B: np.ndarray  # {out, r}
    scaling: float


def combine_adapters(
    folders: Sequence[Path],
    weights: Sequence[float],
    target: str | Path,
    *,
    combination: str = "cat",
    overwrite: bool = False,
) -> None:
    """Writes the adapter that adds weights[i] times what the adapter in folders[i] adds.

    cat is exact, at the sum of the ranks. linear adds the factors themselves, at the same rank, which all must share: a
    rough approximation, as in PEFT. Raises ValueError if the adapters cannot be combined.
    """
    folders = [adapter_folder(folder) for folder in folders]
    if len(folders) != len(weights) or not folders:
        raise ValueError(f"{len(weights)} weights for {len(folders)} adapters: each adapter needs one")
    configs = [read_adapter_config(folder) for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        _check(folder, config)
    adapters = [_factors(folder, config) for folder, config in zip(folders, configs, strict=True)]
    base, revision = _base_of(folders)
    ranks = [max(factors.A.shape[0] for factors in adapter.values()) for adapter in adapters]
    if combination == "linear" and len(set(ranks)) > 1:
        raise ValueError(f"combination=linear adds factors of one rank, and the adapters have {ranks}; set cat")
    rank = sum(ranks) if combination == "cat" else ranks[0]
    layers = list(dict.fromkeys(layer for adapter in adapters for layer in adapter))
    combine = {"cat": _concatenated, "linear": _added}[combination]
    tensors = {}
    for layer in layers:
        parts = [
            (adapter[layer], weight) for adapter, weight in zip(adapters, weights, strict=True) if layer in adapter
        ]
        A, B = combine(parts)
        tensors[key_of(layer, "lora_A.weight")] = np.pad(A, [(0, rank - len(A)), (0, 0)])
        tensors[key_of(layer, "lora_B.weight")] = np.pad(B, [(0, 0), (0, rank - B.shape[1])])
    config = LoraConfig(r=rank, alpha=float(rank), target_modules=layers)  # the scaling is 1
    with export_folder(target, overwrite=overwrite) as exported:
        write_tensors(exported / f"{STEM}.safetensors", tensors)
        shares = ", ".join(f"{weight:g}" for weight in weights)
        notes = {"combination": f"{combination} of {len(folders)} adapters with the weights {shares}"}
        card = model_card(base or "an unnamed base", config, layers, notes, revision=revision)
        (exported / CARD).write_text(card, encoding="utf-8")
        settings = peft_config(base or "", revision, config, layers, layers) | {"base_model_name_or_path": base}
        (exported / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def _check(folder: Path, config: LoraConfig) -> None:
    if config.use_dora:
        raise ValueError(
            f"{folder}: use_dora=True: magnitudes of DoRA cannot be added; merge the adapter into its base"
        )
    if config.trainable_token_indices is not None:
        raise ValueError(
            f"{folder}: trainable_token_indices={config.trainable_token_indices}: rows of the embedding cannot be "
            "added; merge the adapter into its base"
        )
    if config.target_parameters:
        raise ValueError(
            f"{folder}: target_parameters={config.target_parameters}: adapters of parameters are not combined, nor are "
            "they by PEFT; merge the adapter into its base"
        )
    if config.starts_at_factors:
        raise ValueError(
            f"{folder}: init_lora_weights={config.a_init}: it fits a changed base alone; PEFT's save_pretrained writes "
            "it as plain LoRA with path_initial_model_for_weight_conversion"
        )


def _factors(folder: Path, config: LoraConfig) -> dict[str, Factors]:
    """The factors of each layer, by its path."""
    tensors = TensorFiles(folder, STEM)
    layers = layers_of(tensors.names)
    tensors = tensors.renamed(written_names(tensors.names, layers))
    needed = {key_of(layer, factor): layer for layer in layers for factor in ("lora_A.weight", "lora_B.weight")}
    if wrong := sorted(set(needed) ^ set(tensors.names)):
        raise ValueError(f"{folder}: {wrong[0]} is no factor of LoRA, or one without the other")
    found = {}
    for layer in layers:
        A, B = (tensors.read(key_of(layer, f"lora_{side}.weight")).astype(np.float32) for side in "AB")
        found[layer] = Factors(A, B, config.for_layer(layer).scaling)
    return found


def _base_of(folders: Sequence[Path]) -> tuple[str | None, str | None]:
    bases = [read_base_model(folder) for folder in folders]
    if len(set(bases)) > 1:
        raise ValueError(f"the adapters were made for different bases: {sorted({str(name) for name, _ in bases})}")
    return bases[0]


def _concatenated(parts: Sequence[tuple[Factors, float]]) -> tuple[np.ndarray, np.ndarray]:
    A = [np.float32(weight * factors.scaling) * factors.A for factors, weight in parts]
    return np.concatenate(A), np.concatenate([factors.B for factors, _ in parts], axis=1)


def _added(parts: Sequence[tuple[Factors, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Each factor gets the root of the weight, and A its sign."""
    A: Any = 0
    B: Any = 0
    for factors, weight in parts:
        total = weight * factors.scaling
        root = math.sqrt(abs(total))
        A = A + np.float32(math.copysign(root, total)) * factors.A
        B = B + np.float32(root) * factors.B
    return A, B
