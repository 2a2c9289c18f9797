"""Adapters as GGUF files for llama.cpp, with the content that its convert_lora_to_gguf.py (0b03ada) gives them.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight {r, in}     blk.0.attn_q.weight.lora_a
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight {out, r}    blk.0.attn_q.weight.lora_b

The experts of a layer are one tensor {expert, r, in} and one {expert, out, r}. llama.cpp scales each layer by
adapter.lora.alpha over the rank of its own tensor. What rsLoRA or a pattern make of the scaling is in that number, or
in B where layers differ. Needs the package `gguf`, of the extra of the same name.
"""

import importlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_dpo_jax.huggingface.adapters import LayerAdapter, layer_adapters
from lora_dpo_jax.huggingface.folders import export_folder
from lora_dpo_jax.json_objects import read_json_object
from lora_dpo_jax.lora import Adapter, LoraConfig, linear_layers
from lora_dpo_jax.models import CausalLM, DecoderConfig, family_in_llama_cpp

FILE = "adapter.gguf"
EXPERT = re.compile(r"(?P<block>.+\.experts)\.(?P<number>\d+)\.(?P<matrix>\w+)")
A, B = "lora_A.weight", "lora_B.weight"
NO_FORM = "has no form in a GGUF adapter; export a merged model (merged_hf_save_path) and convert that"


def check_gguf(config: LoraConfig, source: Path) -> None:
    """Raises an error unless adapters with these settings, on the base in `source`, can be written as GGUF."""
    _gguf()
    _family(source)
    for name in ("use_dora", "trainable_token_indices"):
        if value := getattr(config, name):
            raise ValueError(f"lora.{name}={value} {NO_FORM}")


def check_gguf_layers(model: CausalLM, source: Path) -> None:
    """Raises ValueError unless llama.cpp has a tensor for each layer with an adapter, before any of them is trained."""
    names = [name for layer, names in linear_layers(model) if isinstance(layer, Adapter) for name in names]
    _tensor_names([*dict.fromkeys(_expert(name)[0] for name in names)], model.config, _family(source)[0])


def save_gguf(
    model: CausalLM,
    folder: str | Path,
    *,
    source: Path,
    dtype: Any = np.float32,
    run: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the adapters as adapter.gguf in `folder`, a path or a URL (see `export_folder`).

    `source` is the folder of the base; its config.json is read. `dtype` is float32 or float16. Raises ValueError for
    adapters that are not plain LoRA, and for layers that llama.cpp adapts otherwise or not at all. Every process of a
    run must call this; only the first one writes.
    """
    adapters = layer_adapters(model)
    if jax.process_index() != 0:
        return
    if other := [adapter.name for adapter in adapters if adapter.tensors.keys() != {A, B}]:
        raise ValueError(f"the adapter of {other[0]} {NO_FORM}")
    family, reorders = _family(source)
    alpha = Counter(adapter.scaling * adapter.rank for adapter in adapters).most_common(1)[0][0]
    parts = _by_tensor(adapters)
    names = _tensor_names([*parts], model.config, family)
    gguf = _gguf()
    with export_folder(folder, run=run, overwrite=overwrite) as exported:
        writer = gguf.GGUFWriter(exported / FILE, family)  # adds general.architecture
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for name, adapters_here in zip(names, parts.values(), strict=True):
            lora_a, lora_b = _factors(adapters_here, alpha, model.config, reorders=reorders)
            writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(lora_a, dtype))
            writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(lora_b, dtype))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _by_tensor(adapters: Sequence[LayerAdapter]) -> dict[str, dict[int | None, LayerAdapter]]:
    """The adapters of each tensor of the base in GGUF: one, or those of the experts of a layer by their numbers."""
    found: dict[str, dict[int | None, LayerAdapter]] = {}
    for adapter in adapters:
        layer, number = _expert(adapter.name)
        found.setdefault(layer, {})[number] = adapter
    return found


def _expert(name: str) -> tuple[str, int | None]:
    """(the name of the matrices of all experts, the number of this one); (the name, None) if it is no expert's."""
    parts = EXPERT.fullmatch(name)
    return (f"{parts['block']}.{parts['matrix']}", int(parts["number"])) if parts else (name, None)


def _factors(
    adapters: dict[int | None, LayerAdapter], alpha: float, config: DecoderConfig, *, reorders: bool
) -> tuple[np.ndarray, np.ndarray]:
    """A {r, in} and B {out, r} of a tensor for llama.cpp's scaling alpha / r; of experts, with their axis first."""
    rank = max(adapter.rank for adapter in adapters.values())

    def factors(adapter: LayerAdapter) -> tuple[np.ndarray, np.ndarray]:
        own, more = adapter.scaling * rank, rank - adapter.rank  # experts share one rank
        lora_b = adapter.tensors[B] if own == alpha else adapter.tensors[B] * np.float32(own / alpha)
        lora_b = _neighbouring(lora_b, adapter, config) if reorders else lora_b
        return np.pad(adapter.tensors[A], [(0, more), (0, 0)]), np.pad(lora_b, [(0, 0), (0, more)])

    pairs = {number: factors(adapter) for number, adapter in adapters.items()}
    if None in pairs:
        return pairs[None]
    assert config.experts is not None
    zeros = tuple(map(np.zeros_like, next(iter(pairs.values()))))  # of experts without an adapter
    of_all = [pairs.get(number, zeros) for number in range(config.experts.num_experts)]
    return np.stack([a for a, _ in of_all]), np.stack([b for _, b in of_all])


def _neighbouring(lora_b: np.ndarray, adapter: LayerAdapter, config: DecoderConfig) -> np.ndarray:
    """B {out, r} of a query or key projection with the dimensions that rotate together next to each other."""
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(adapter.name.rpartition(".")[2])
    if heads is None:
        return lora_b
    halves = lora_b.reshape(heads, 2, -1, lora_b.shape[1])
    return halves.swapaxes(1, 2).reshape(lora_b.shape)


def _family(source: Path) -> tuple[str, bool]:
    """(llama.cpp's name of the family, whether it has queries and keys in another order)."""
    config = read_json_object(source / "config.json")
    family, reorders = family_in_llama_cpp(config.values)
    if not family:
        raise ValueError(f"{config.where}: model_type={config.values.get('model_type')!r} {NO_FORM}")
    return family, reorders


def _tensor_names(layers: Sequence[str], config: DecoderConfig, family: str) -> list[str]:
    gguf = _gguf()
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    known = gguf.get_tensor_name_map(arch, config.num_layers)
    names = {layer: known.get_name(layer.replace("model.language_model.", "model.") + ".weight", (".weight",))
             for layer in layers}  # fmt: skip
    if unknown := [layer for layer, name in names.items() if name is None]:
        raise ValueError(f"the adapter of {unknown[0]} {NO_FORM}, or name only other layers in lora.target_modules")
    return [*names.values()]


def _gguf() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ImportError(
            "gguf_save_path needs a package that is not installed. Run: pip install 'lora_dpo_jax[gguf]'"
        ) from error
