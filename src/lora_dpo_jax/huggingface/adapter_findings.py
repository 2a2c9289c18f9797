"""What is in an adapter's files that decides where it loads and acts: `servers.py` says what each server does then.

A finding is a function from the files to its reason as a text, or None. It looks at the settings and at the headers of
the tensors, and at the values only to see whether any product is zero.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lora_dpo_jax.huggingface.adapter_config import CONFIG, STEM, WRAPPER, adapter_folder, read_adapter_config
from lora_dpo_jax.huggingface.adapter_names import MAGNITUDE, PREFIX, matrix_copies
from lora_dpo_jax.huggingface.tensors import TensorFiles, abridged
from lora_dpo_jax.json_objects import read_json_object
from lora_dpo_jax.lora import ROWS, LoraConfig, matching_names

MOST_RANK = 512  # of vLLM
WRAPPED = ".base_layer"  # the module within a wrapper of PEFT
PARAMETERS_IN_VLLM = ("gpt_oss", "qwen3_5_moe")  # whose classes have is_3d_moe_weight
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}  # by SGLang
STARTS_OF_VLLM = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # texts of init_lora_weights that it takes


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as a server sees it, and what is known of the base."""

    config: Mapping[str, Any]  # adapter_config.json
    tensors: TensorFiles
    base: Mapping[str, Any] | None  # the base's config.json; None if it is not here

    @staticmethod
    def read(folder: Path, base: Path | None) -> "AdapterFiles":
        folder = adapter_folder(folder)
        config = read_json_object(folder / CONFIG).values
        return AdapterFiles(config, TensorFiles(folder, STEM), None if base is None else _config_of(base))

    @cached_property
    def pairs(self) -> dict[str, tuple[str, str]]:
        """The keys of A and B, by the path of the layer as the file has it."""
        found: dict[str, dict[str, str]] = {}
        for key in self.tensors.names:
            if parts := re.fullmatch(r"(.+)\.lora_([AB])(\.\w+)?\.weight", key):
                found.setdefault(parts[1].removeprefix(PREFIX), {})[parts[2]] = key
        return {path: (keys["A"], keys["B"]) for path, keys in found.items() if len(keys) == 2}

    def number(self, name: str) -> Any:
        """r or lora_alpha, with PEFT's default."""
        found = self.config.get(name)
        return 8 if found is None else found

    @cached_property
    def parameters(self) -> dict[str, str]:
        """The parameters among the layers, by their paths: PEFT wraps the module of a parameter once for each."""
        targets = self.config.get("target_parameters") or []
        found = {}
        for path in self.pairs:
            module = path
            while module.endswith(WRAPPED):
                module = module.removesuffix(WRAPPED)
            names = [f"{module}.{target.rpartition('.')[2]}" for target in targets]
            names = [name for name in dict.fromkeys(names) if any(f".{name}".endswith(f".{t}") for t in targets)]
            names.sort(key=lambda name: name.endswith(".gate_up_proj"))  # it is wrapped first
            if (depth := path.count(WRAPPED)) < len(names):
                found[path] = names[depth]
        return found

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Of a parameter, the rank of each expert, which only the settings have."""
        return {
            path: self._settings.for_layer(self.parameters[path]).r if path in self.parameters else shape[0]
            for path, shape in ((path, self.tensors.shape(A)) for path, (A, _) in self.pairs.items())
        }

    @cached_property
    def scalings(self) -> dict[str, float]:
        """The scaling of each layer, as PEFT has it."""
        return {path: self._settings.for_layer(self.parameters.get(path, path)).scaling for path in self.pairs}

    @property
    def _settings(self) -> LoraConfig:
        get = self.config.get
        return LoraConfig(
            r=self.number("r"),
            alpha=float(self.number("lora_alpha")),
            use_rslora=bool(get("use_rslora")),
            rank_pattern=get("rank_pattern") or {},
            alpha_pattern=get("alpha_pattern") or {},
        )

    @property
    def is_wrapped(self) -> bool:
        """Whether the base is a multimodal model, whose decoder is a part of it."""
        return self.base is not None and isinstance(self.base.get("text_config"), dict)

    @property
    def vocabulary(self) -> int | None:
        """The number of tokens of the base, if it is known."""
        base = self.base or {}
        return base.get("vocab_size", (base.get("text_config") or {}).get("vocab_size"))

    @property
    def decoder(self) -> str:
        """The path of the decoder in the class that is served."""
        return f"model.{WRAPPER}." if self.is_wrapped else "model."

    @property
    def others(self) -> list[str]:
        """The tensors that are neither A nor B of a layer."""
        known = {key for keys in self.pairs.values() for key in keys}
        return [key for key in self.tensors.names if key not in known]


def _config_of(folder: Path) -> Mapping[str, Any] | None:
    return read_json_object(folder / "config.json").values if (folder / "config.json").exists() else None


def zero(files: AdapterFiles) -> str | None:
    if any(MAGNITUDE in key or ROWS in key for key in files.others):
        return None
    if any(np.any(files.tensors.read(A)) and np.any(files.tensors.read(B)) for A, B in files.pairs.values()):
        return None
    return "B A is zero in every layer: it was never trained" if files.pairs else "there is no pair of A and B"


def other_class(files: AdapterFiles) -> str | None:
    layers = f"{files.decoder}layers."
    if not files.pairs or any(path.startswith(layers) or path == "lm_head" for path in files.pairs):
        return None
    base = "" if files.base is not None else "; a causal LM is assumed, as the base is not here"
    return f"layers are named {next(iter(files.pairs))}, and the class that is served has {layers}N...{base}"


def no_prefix(files: AdapterFiles) -> str | None:
    keys = [key for key in files.tensors.names if not key.startswith(PREFIX)]
    return f"{keys[0]} does not begin with {PREFIX}" if keys else None


def adapter_name(files: AdapterFiles) -> str | None:
    named = [key for key in files.tensors.names if re.search(r"\.lora_[AB]\.(?!weight$)\w+\.weight$", key)]
    return f"{named[0]} has the name of an adapter in it" if named else None


def other_adapter_name(files: AdapterFiles) -> str | None:
    return adapter_name(files) if not any(".default.weight" in key for key in files.tensors.names) else None


def untargeted(files: AdapterFiles) -> str | None:
    """PEFT makes adapters where the settings say, and leaves out tensors of other layers."""
    get = files.config.get
    targets = get("target_modules")
    if targets in (None, "all-linear") or not files.pairs or files.parameters:
        return None
    settings = LoraConfig(
        target_modules=targets,
        exclude_modules=get("exclude_modules"),
        layers_to_transform=None if isinstance(targets, str) else get("layers_to_transform"),
    )
    left = set(files.pairs) - set(matching_names([*files.pairs], settings))
    if len(left) < len(files.pairs):
        return None
    return f"target_modules={targets!r} names none of its layers, such as {next(iter(files.pairs))}"


def partly_untargeted(files: AdapterFiles) -> str | None:
    get = files.config.get
    targets = get("target_modules")
    if not isinstance(targets, list):
        return None
    settings = LoraConfig(target_modules=targets, exclude_modules=get("exclude_modules"))
    left = sorted(set(files.pairs) - set(matching_names([*files.pairs], settings)) - set(files.parameters))
    return f"target_modules leaves out {abridged(left[:3])}" if 0 < len(left) < len(files.pairs) else None


def parameters(files: AdapterFiles) -> str | None:
    return f"{abridged([*files.parameters.values()][:2])} is a parameter of all experts" if files.parameters else None


def parameters_of_matrices(files: AdapterFiles) -> str | None:
    """vLLM's class of a model takes adapters of parameters, or of each matrix of each expert."""
    kind = (files.base or {}).get("model_type")
    if not files.parameters or kind is None or kind in PARAMETERS_IN_VLLM:
        return None
    return (
        f"target_parameters={files.config['target_parameters']}: its class of {kind} takes an adapter of each matrix "
        "of each expert, as lora.target_modules makes them"
    )


def any_of(*options: str) -> Callable[[AdapterFiles], str | None]:
    """A rule about options that are set."""

    def finds(files: AdapterFiles) -> str | None:
        found = [f"{name}={files.config[name]!r}" for name in options if files.config.get(name)]
        return ", ".join(found) or None

    return finds


def bias(files: AdapterFiles) -> str | None:
    bias = files.config.get("bias", "none")
    return f"bias={bias!r}" if bias != "none" else None


def modules_to_save(files: AdapterFiles) -> str | None:
    others = [name for name in files.config.get("modules_to_save") or () if name not in ("classifier", "score")]
    return f"modules_to_save={others!r}" if others else None


def starts_with(*starts: str) -> Callable[[AdapterFiles], str | None]:
    def finds(files: AdapterFiles) -> str | None:
        init = files.config.get("init_lora_weights")
        return f"init_lora_weights={init!r}: it fits a changed base alone" if str(init).startswith(starts) else None

    return finds


def other_init(files: AdapterFiles) -> str | None:
    init = files.config.get("init_lora_weights")
    is_other = isinstance(init, str) and init.lower() not in STARTS_OF_VLLM
    return f"init_lora_weights={init!r} is none of {', '.join(STARTS_OF_VLLM)}" if is_other else None


def tensors_beside(files: AdapterFiles) -> str | None:
    others = [key for key in files.others if not key.endswith(".base_layer.weight")]
    return f"tensors that are neither lora_A nor lora_B: {abridged(others)}" if others else None


def unknown_tensors(files: AdapterFiles) -> str | None:
    """The same, but what vLLM leaves out or takes for LoRA of an embedding is no such tensor."""
    known = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight", ".lora_embedding_A", ".lora_embedding_B")
    others = [key for key in files.others if not key.endswith(known)]
    return f"tensors that are neither lora_A nor lora_B: {abridged(others)}" if others else None


def rank(files: AdapterFiles) -> str | None:
    named = (files.config.get("rank_pattern") or {}).values()
    largest = max(files.number("r"), *named, *files.ranks.values())
    return f"the largest rank is {largest}, above {MOST_RANK}" if largest > MOST_RANK else None


def null_numbers(files: AdapterFiles) -> str | None:
    nulls = [name for name in ("r", "lora_alpha") if name in files.config and files.config[name] is None]
    return f"{' and '.join(nulls)} is null" if nulls else None


def missing_settings(files: AdapterFiles) -> str | None:
    missing = [name for name in ("r", "lora_alpha", "target_modules") if name not in files.config]
    return f"adapter_config.json lacks {', '.join(missing)}" if missing else None


def no_list(files: AdapterFiles) -> str | None:
    """SGLang takes the names of modules from a list, and knows two words beside."""
    targets = files.config.get("target_modules")
    is_known = isinstance(targets, list) or targets in ("all", "all-linear")
    return None if is_known else f"target_modules={targets!r} is no list of names"


def unnamed(files: AdapterFiles) -> str | None:
    """SGLang has buffers for the modules that target_modules names, in any layer, and one for what it joins."""
    targets = files.config.get("target_modules")
    if not isinstance(targets, list):
        return None
    named = {_joined(target.rpartition(".")[2]) for target in targets}
    others = [path for path in files.pairs if path != "lm_head" and path not in files.parameters]
    others = [path for path in others if _joined(path.rpartition(".")[2]) not in named]
    return f"target_modules={targets!r} does not name the module of {others[0]}" if others else None


def _joined(module: str) -> str:
    return next((whole for whole, parts in JOINED.items() if module in parts), module)


def other_ranks(files: AdapterFiles) -> str | None:
    """SGLang gives every layer a buffer of the rank r."""
    other = {path: rank for path, rank in files.ranks.items() if rank != files.number("r")}
    if not other:
        return None
    path, rank = next(iter(other.items()))
    return f"r={files.number('r')}, and {path} has {rank}; peft_scaling: plain writes the same adapter at one rank"


def unjoined(files: AdapterFiles) -> str | None:
    """SGLang joins q, k and v, and gate and up, and asks for some of them wherever it finds another."""
    for needed, others in (("v_proj", ["q_proj"]), ("q_proj", ["k_proj", "v_proj"]), ("gate_proj", ["up_proj"])):
        for path in files.pairs:
            block, _, module = path.rpartition(".")
            if module in others and f"{block}.{needed}" not in files.pairs:
                return f"{path} has an adapter and {block}.{needed} has none; give it one (its B may be zero)"
    return None


def added_tokens(files: AdapterFiles) -> str | None:
    """Of the vocabulary of the base, if this is known."""
    path = files.tensors.folder / "added_tokens.json"
    if files.vocabulary is None or not path.exists():
        return None
    added = {token: number for token, number in read_json_object(path).values.items() if number >= files.vocabulary}
    return f"added_tokens.json has {next(iter(added))!r}, which the base has no row for" if added else None


def enlarged(files: AdapterFiles) -> str | None:
    copies = matrix_copies(files.others)
    larger = [key for key in copies if files.vocabulary is not None and files.tensors.shape(key)[0] > files.vocabulary]
    return f"{larger[0]} has more rows than the base, and is left out" if larger else None


def scaled_otherwise(scaling: Callable[[AdapterFiles, str], float]) -> Callable[[AdapterFiles], str | None]:
    """A rule about a server that scales a layer by `scaling(files, path)`, whatever PEFT does."""

    def finds(files: AdapterFiles) -> str | None:
        wrong = {path: scaling(files, path) / own for path, own in files.scalings.items()}
        wrong = {path: ratio for path, ratio in wrong.items() if not np.isclose(ratio, 1.0, rtol=1e-6)}
        if not wrong:
            return None
        path, ratio = next(iter(wrong.items()))
        return (
            f"{len(wrong)} layers are scaled otherwise, such as {path} by {ratio:.3g} times as much; "
            "peft_scaling: plain writes the same adapter for it"
        )

    return finds


def by_settings(files: AdapterFiles, path: str) -> float:
    del path
    return files.number("lora_alpha") / files.number("r")


def by_tensor(files: AdapterFiles, path: str) -> float:
    return files.number("lora_alpha") / files.ranks[path]


def tied_head(files: AdapterFiles) -> str | None:
    tied = files.base is not None and files.base.get("tie_word_embeddings")
    return "it adapts lm_head, which the base ties to its embedding" if tied and "lm_head" in files.pairs else None


def cannot_merge(files: AdapterFiles) -> str | None:
    try:
        read_adapter_config(files.tensors.folder)
    except (ValueError, OSError) as error:
        return str(error)
    return None
