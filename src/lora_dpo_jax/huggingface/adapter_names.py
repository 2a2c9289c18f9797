"""The names of an adapter's tensors, which differ with the class that PEFT wrapped.

base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight                  a causal LM: the form that is written
base_model.model.layers.0.self_attn.q_proj.lora_A.weight                        a bare AutoModel
base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight   the decoder of a multimodal model
base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight          with the name of the adapter
base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight            a parameter, here experts.gate_up_proj
base_model.model.model.layers.0.mlp.experts.lora_A.weight                       another one, experts.down_proj

PEFT wraps the module of a parameter, and each further parameter of it wraps the wrapper.
"""

import re
from collections.abc import Iterable

from lora_dpo_jax.huggingface.adapter_config import WRAPPER
from lora_dpo_jax.lora import ROWS

PREFIX = "base_model.model."
_FACTOR = re.compile(
    rf"(?P<layer>.+)\.(?P<factor>lora_\w+?|{re.escape(ROWS)})(\.(?!weight$|bias$)\w+)?(?P<kind>\.weight|\.bias)?"
)
# PEFT stores the frozen matrix beside an adapter of it, and both of them where modules_to_save replaces it.
_COPY = re.compile(
    r"(?P<layer>.+?)((\.token_adapter)?\.base_layer|\.original_module|\.modules_to_save(\.\w+)?)?\.weight"
)
MAGNITUDE = "lora_magnitude_vector"  # of DoRA: PEFT writes it without .weight


def key_of(layer: str, factor: str) -> str:
    """The name that is written."""
    return f"{PREFIX}{layer}.{factor}"


def adapter_paths(modules: Iterable[str], parameters: Iterable[str]) -> dict[str, str]:
    """The path in a file of each module, and of each target among parameters, which are in the order of the model."""
    by_module: dict[str, list[str]] = {}
    for parameter in parameters:
        by_module.setdefault(parameter.rpartition(".")[0], []).append(parameter)
    wrapped = {
        parameter: module + ".base_layer" * (len(targets) - number)
        for module, targets in by_module.items()
        for number, parameter in enumerate(targets, start=1)
    }
    return {name: name for name in modules} | wrapped


def written_names(keys: Iterable[str], paths: Iterable[str]) -> dict[str, str]:
    """By each key of a file: the name that would be written for it. A key that means no factor at `paths` stays.

    Raises ValueError if two keys mean the same factor.
    """
    by_core = {_core(path): path for path in paths}
    found: dict[str, str] = {}
    for key in keys:
        name = key
        if (parts := _FACTOR.fullmatch(key)) and (path := by_core.get(_core(parts["layer"]))):
            kind = "" if parts["factor"] == MAGNITUDE else parts["kind"] or ""
            name = key_of(path, parts["factor"] + kind)
        if name in found.values():
            raise ValueError(f"both {next(k for k, n in found.items() if n == name)} and {key} are {name}")
        found[key] = name
    return found


def layers_of(keys: Iterable[str]) -> list[str]:
    """The layers that the keys of a file are of, by their paths in a causal LM."""
    cores = dict.fromkeys(_core(parts["layer"]) for key in keys if (parts := _FACTOR.fullmatch(key)))
    return [core if core == "lm_head" else f"model.{core}" for core in cores]


def matrix_copies(keys: Iterable[str]) -> dict[str, str]:
    """By key: "embed_tokens" or "lm_head", of those keys that are whole copies of these matrices of the base."""
    cores = {key: _core(found["layer"]) for key in keys if (found := _COPY.fullmatch(key))}
    return {key: core for key, core in cores.items() if core in ("embed_tokens", "lm_head")}


def _core(path: str) -> str:
    """A dotted path without the parts that depend on the class."""
    parts = [part for part in path.removeprefix(PREFIX).split(".") if part != WRAPPER]
    return ".".join(parts[1:] if parts[0] == "model" else parts)
