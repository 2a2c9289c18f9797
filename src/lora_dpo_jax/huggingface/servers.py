"""Whether an adapter would load and act in PEFT, vLLM, SGLang, llama.cpp, and merged: by rules of each, from its files.

A rule has the version and the source that it was read from. It looks at the settings and at the headers of the tensors,
and at the values only to see whether any product is zero.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lora_dpo_jax.huggingface.adapter_config import CONFIG, STEM, WRAPPER, adapter_folder, read_adapter_config
from lora_dpo_jax.huggingface.adapter_names import MAGNITUDE, PREFIX, matrix_copies
from lora_dpo_jax.huggingface.tensors import TensorFiles, abridged
from lora_dpo_jax.json_objects import read_json_object
from lora_dpo_jax.lora import LoraConfig, matching_names

Outcome = Literal["acts", "acts differently", "loads and does nothing", "does not load"]
WORST: tuple[Outcome, ...] = ("acts", "acts differently", "loads and does nothing", "does not load")
MOST_RANK = 512  # of vLLM
WRAPPED = ".base_layer"  # the module within a wrapper of PEFT
PARAMETERS_IN_VLLM = ("gpt_oss", "qwen3_5_moe")  # whose classes have is_3d_moe_weight


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
    def decoder(self) -> str:
        """The path of the decoder in the class that is served."""
        return f"model.{WRAPPER}." if self.is_wrapped else "model."

    @property
    def others(self) -> list[str]:
        """The tensors that are neither A nor B of a layer."""
        known = {key for keys in self.pairs.values() for key in keys}
        return [key for key in self.tensors.names if key not in known]


@dataclass(frozen=True)
class Rule:
    """What a server does with some adapters."""

    server: str
    source: str
    outcome: Outcome
    finds: Callable[[AdapterFiles], str | None]  # why the rule applies to an adapter; None if it does not


@dataclass(frozen=True)
class Verdict:
    """What a server does with an adapter: the worst that a rule says, with the reasons and sources of all."""

    server: str
    outcome: Outcome
    reasons: tuple[str, ...]


def verdicts(files: AdapterFiles) -> list[Verdict]:
    """One for each server."""
    found = []
    for server in SERVERS:
        mine = [rule for rule in RULES if rule.server in (server, EVERYWHERE)]
        broken = [(rule, why) for rule in mine if (why := rule.finds(files)) is not None]
        outcomes: list[Outcome] = [rule.outcome for rule, _ in broken]
        worst = WORST[max(map(WORST.index, outcomes), default=0)]
        found.append(Verdict(server, worst, tuple(f"{rule.outcome}: {why} [{rule.source}]" for rule, why in broken)))
    return found


def _config_of(folder: Path) -> Mapping[str, Any] | None:
    return read_json_object(folder / "config.json").values if (folder / "config.json").exists() else None


def _zero(files: AdapterFiles) -> str | None:
    if any(MAGNITUDE in key for key in files.others):
        return None
    if any(np.any(files.tensors.read(A)) and np.any(files.tensors.read(B)) for A, B in files.pairs.values()):
        return None
    return "B A is zero in every layer: it was never trained" if files.pairs else "there is no pair of A and B"


def _other_class(files: AdapterFiles) -> str | None:
    layers = f"{files.decoder}layers."
    if not files.pairs or any(path.startswith(layers) or path == "lm_head" for path in files.pairs):
        return None
    base = "" if files.base is not None else "; a causal LM is assumed, as the base is not here"
    return f"layers are named {next(iter(files.pairs))}, and the class that is served has {layers}N...{base}"


def _no_prefix(files: AdapterFiles) -> str | None:
    keys = [key for key in files.tensors.names if not key.startswith(PREFIX)]
    return f"{keys[0]} does not begin with {PREFIX}" if keys else None


def _adapter_name(files: AdapterFiles) -> str | None:
    named = [key for key in files.tensors.names if re.search(r"\.lora_[AB]\.(?!weight$)\w+\.weight$", key)]
    return f"{named[0]} has the name of an adapter in it" if named else None


def _other_adapter_name(files: AdapterFiles) -> str | None:
    return _adapter_name(files) if not any(".default.weight" in key for key in files.tensors.names) else None


def _untargeted(files: AdapterFiles) -> str | None:
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


def _partly_untargeted(files: AdapterFiles) -> str | None:
    get = files.config.get
    targets = get("target_modules")
    if not isinstance(targets, list):
        return None
    settings = LoraConfig(target_modules=targets, exclude_modules=get("exclude_modules"))
    left = sorted(set(files.pairs) - set(matching_names([*files.pairs], settings)) - set(files.parameters))
    return f"target_modules leaves out {abridged(left[:3])}" if 0 < len(left) < len(files.pairs) else None


def _parameters(files: AdapterFiles) -> str | None:
    return f"{abridged([*files.parameters.values()][:2])} is a parameter of all experts" if files.parameters else None


def _parameters_of_matrices(files: AdapterFiles) -> str | None:
    """vLLM's class of a model takes adapters of parameters, or of each matrix of each expert."""
    kind = (files.base or {}).get("model_type")
    if not files.parameters or kind is None or kind in PARAMETERS_IN_VLLM:
        return None
    return (
        f"target_parameters={files.config['target_parameters']}: its class of {kind} takes an adapter of each matrix "
        "of each expert, as lora.target_modules makes them"
    )


def _set(*options: str) -> Callable[[AdapterFiles], str | None]:
    """A rule about options that are set."""

    def finds(files: AdapterFiles) -> str | None:
        found = [f"{name}={files.config[name]!r}" for name in options if files.config.get(name)]
        return ", ".join(found) or None

    return finds


def _bias(files: AdapterFiles) -> str | None:
    bias = files.config.get("bias", "none")
    return f"bias={bias!r}" if bias not in ("none", None) else None


def _init(*starts: str) -> Callable[[AdapterFiles], str | None]:
    def finds(files: AdapterFiles) -> str | None:
        init = files.config.get("init_lora_weights")
        return f"init_lora_weights={init!r}: it fits a changed base alone" if str(init).startswith(starts) else None

    return finds


def _tensors_beside(files: AdapterFiles) -> str | None:
    others = [key for key in files.others if not key.endswith(".base_layer.weight")]
    return f"tensors that are neither lora_A nor lora_B: {abridged(others)}" if others else None


def _unknown_tensors(files: AdapterFiles) -> str | None:
    """The same, but whole embeddings and heads are left out."""
    others = [key for key in files.others if key not in matrix_copies(files.others)]
    return f"tensors that are neither lora_A nor lora_B: {abridged(others)}" if others else None


def _rank(files: AdapterFiles) -> str | None:
    largest = max(files.ranks.values(), default=0)
    return f"the largest rank is {largest}, above {MOST_RANK}" if largest > MOST_RANK else None


def _null_numbers(files: AdapterFiles) -> str | None:
    nulls = [name for name in ("r", "lora_alpha") if name in files.config and files.config[name] is None]
    return f"{' and '.join(nulls)} is null" if nulls else None


def _missing_settings(files: AdapterFiles) -> str | None:
    missing = [name for name in ("r", "lora_alpha", "target_modules") if files.config.get(name) is None]
    return f"adapter_config.json lacks {', '.join(missing)}" if missing else None


def _scaled_otherwise(scaling: Callable[[AdapterFiles, str], float]) -> Callable[[AdapterFiles], str | None]:
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


def _by_settings(files: AdapterFiles, path: str) -> float:
    del path
    return files.number("lora_alpha") / files.number("r")


def _by_tensor(files: AdapterFiles, path: str) -> float:
    return files.number("lora_alpha") / files.ranks[path]


def _tied_head(files: AdapterFiles) -> str | None:
    tied = files.base is not None and files.base.get("tie_word_embeddings")
    return "it adapts lm_head, which the base ties to its embedding" if tied and "lm_head" in files.pairs else None


def _cannot_merge(files: AdapterFiles) -> str | None:
    try:
        read_adapter_config(files.tensors.folder)
    except (ValueError, OSError) as error:
        return str(error)
    return None


EVERYWHERE = "every server"
PEFT, VLLM, SGLANG = "PEFT 0.21.2", "vLLM 0.33", "SGLang 0.5.23"
LLAMA, MERGED = "llama.cpp", "merged, in transformers"
SERVERS = (PEFT, VLLM, SGLANG, LLAMA, MERGED)
_NAMES = "vllm issues 39369, 48019, 48022, 34186, 49354"
_HELPER = "vllm/lora/peft_helper.py"
_LLAMA = "convert_lora_to_gguf.py of 0b03ada"
RULES = (
    Rule(EVERYWHERE, "B A", "loads and does nothing", _zero),
    Rule(EVERYWHERE, "lora_alpha / r", "does not load", _null_numbers),
    Rule(PEFT, "peft/utils/save_and_load.py: keys of no module are a warning", "loads and does nothing", _other_class),
    Rule(PEFT, "peft/utils/save_and_load.py: the prefix is expected", "loads and does nothing", _no_prefix),
    Rule(
        PEFT,
        "peft/utils/save_and_load.py: the name must be the one that it is loaded as",
        "loads and does nothing",
        _other_adapter_name,
    ),
    Rule(PEFT, "peft/tuners/tuners_utils.py: check_target_module_exists", "loads and does nothing", _untargeted),
    Rule(PEFT, "peft/tuners/tuners_utils.py: check_target_module_exists", "acts differently", _partly_untargeted),
    Rule(VLLM, _NAMES, "loads and does nothing", _other_class),
    Rule(VLLM, "vllm/lora/utils.py: parse_fine_tuned_lora_name", "does not load", _adapter_name),
    Rule(VLLM, "vllm/lora/utils.py: parse_fine_tuned_lora_name", "does not load", _unknown_tensors),
    Rule(VLLM, _HELPER, "does not load", _missing_settings),
    Rule(
        VLLM,
        _HELPER,
        "does not load",
        _set("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora"),
    ),
    Rule(VLLM, _HELPER, "does not load", _set("modules_to_save")),
    Rule(VLLM, _HELPER, "does not load", _bias),
    Rule(VLLM, _HELPER, "does not load", _init("pissa", "olora", "corda", "loftq")),
    Rule(VLLM, "vllm/config/lora.py: max_lora_rank", "does not load", _rank),
    Rule(VLLM, "vllm/lora/model_manager.py: is_3d_moe_weight", "acts differently", _parameters_of_matrices),
    Rule(SGLANG, "sglang/srt/lora/utils.py: get_target_module_name", "does not load", _parameters),
    Rule(SGLANG, "sglang/srt/lora/lora.py:71", "acts differently", _scaled_otherwise(_by_settings)),
    Rule(SGLANG, "sglang/srt/lora: no lora_magnitude_vector", "acts differently", _set("use_dora")),
    Rule(SGLANG, "the base is not changed", "acts differently", _init("pissa", "olora", "corda", "loftq")),
    Rule(LLAMA, _LLAMA, "does not load", _adapter_name),
    Rule(LLAMA, _LLAMA, "does not load", _tensors_beside),
    Rule(LLAMA, _LLAMA, "does not load", _tied_head),
    Rule(LLAMA, f"{_LLAMA}: no tensor of that name", "does not load", _parameters),
    Rule(LLAMA, "llama.cpp: alpha / rank of the tensor", "acts differently", _scaled_otherwise(_by_tensor)),
    Rule(LLAMA, "the base is not changed", "acts differently", _init("pissa", "olora", "corda", "loftq")),
    Rule(MERGED, "lora_dpo_jax.huggingface.adapter_config", "does not load", _cannot_merge),
    Rule(MERGED, "lora_dpo_jax.huggingface.adapters", "does not load", _tied_head),
)


def rank_note(files: AdapterFiles) -> str | None:
    """What vLLM must be started with."""
    largest = max(files.ranks.values(), default=0)
    return f"start vLLM with --max-lora-rank {largest} or more: its default is 16" if largest > 16 else None


def base_folder(files_folder: Path) -> Path | None:
    """The base that an adapter names, if it is a folder here."""
    try:
        name = json.loads((adapter_folder(files_folder) / CONFIG).read_text()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    return Path(name) if isinstance(name, str) and Path(name).is_dir() else None
