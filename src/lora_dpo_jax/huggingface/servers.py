"""Whether an adapter would load and act in PEFT, vLLM, SGLang, llama.cpp, and merged: by rules of each, from its files.

A rule has the version and the source that it was read from, and what an adapter must have in its files for the rule to
apply: see `adapter_findings.py`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_dpo_jax.huggingface import adapter_findings as find
from lora_dpo_jax.huggingface.adapter_config import CONFIG, adapter_folder
from lora_dpo_jax.huggingface.adapter_findings import AdapterFiles

Outcome = Literal["acts", "acts differently", "loads and does nothing", "does not load"]
WORST: tuple[Outcome, ...] = ("acts", "acts differently", "loads and does nothing", "does not load")


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


EVERYWHERE = "every server"
PEFT, VLLM, SGLANG = "PEFT 0.21.2", "vLLM 0.33", "SGLang 0.5.23"
LLAMA, MERGED = "llama.cpp", "merged, in transformers"
SERVERS = (PEFT, VLLM, SGLANG, LLAMA, MERGED)
_NAMES = "vllm issues 39369, 48019, 48022, 34186, 49354"
_HELPER = "vllm/lora/peft_helper.py"
_BUFFERS = "sglang/srt/lora/mem_pool.py: load_lora_weight_to_buffer"
_LEFT_OUT = "sglang/srt/lora/lora.py: _process_weight"
_LLAMA = "convert_lora_to_gguf.py of 0b03ada"
RULES = (
    Rule(EVERYWHERE, "B A", "loads and does nothing", find.zero),
    Rule(EVERYWHERE, "lora_alpha / r", "does not load", find.null_numbers),
    Rule(
        PEFT,
        "peft/utils/save_and_load.py: keys of no module are a warning",
        "loads and does nothing",
        find.other_class,
    ),
    Rule(PEFT, "peft/utils/save_and_load.py: the prefix is expected", "loads and does nothing", find.no_prefix),
    Rule(
        PEFT,
        "peft/utils/save_and_load.py: the name must be the one that it is loaded as",
        "loads and does nothing",
        find.other_adapter_name,
    ),
    Rule(PEFT, "peft/tuners/tuners_utils.py: check_target_module_exists", "loads and does nothing", find.untargeted),
    Rule(PEFT, "peft/tuners/tuners_utils.py: check_target_module_exists", "acts differently", find.partly_untargeted),
    Rule(VLLM, _NAMES, "loads and does nothing", find.other_class),
    Rule(VLLM, "vllm/lora/utils.py: parse_fine_tuned_lora_name", "does not load", find.adapter_name),
    Rule(VLLM, "vllm/lora/utils.py: parse_fine_tuned_lora_name", "does not load", find.unknown_tensors),
    Rule(VLLM, _HELPER, "does not load", find.missing_settings),
    Rule(
        VLLM,
        _HELPER,
        "does not load",
        find.any_of(
            "use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora"
        ),
    ),
    Rule(VLLM, _HELPER, "does not load", find.modules_to_save),
    Rule(VLLM, _HELPER, "does not load", find.bias),
    Rule(VLLM, _HELPER, "does not load", find.other_init),
    Rule(VLLM, "vllm/config/lora.py: max_lora_rank", "does not load", find.rank),
    Rule(VLLM, "vllm/lora/model_manager.py: is_3d_moe_weight", "acts differently", find.parameters_of_matrices),
    Rule(SGLANG, "sglang/srt/lora/utils.py: get_target_module_name", "does not load", find.parameters),
    Rule(SGLANG, "sglang/srt/lora/lora_config.py", "does not load", find.missing_settings),
    Rule(SGLANG, "sglang/srt/lora/utils.py: get_normalized_target_modules", "does not load", find.no_list),
    Rule(SGLANG, "sglang/srt/lora/lora_manager.py: validate_new_adapter", "does not load", find.any_of("use_dora")),
    Rule(SGLANG, "sglang/srt/lora/lora_manager.py: validate_new_adapter", "does not load", find.added_tokens),
    Rule(
        SGLANG,
        "sglang/srt/lora/lora.py: normalize_qkv_proj, normalize_gate_up_proj",
        "does not load",
        find.unjoined,
    ),
    Rule(SGLANG, _BUFFERS, "does not load", find.unnamed),
    Rule(SGLANG, _BUFFERS, "does not load", find.other_ranks),
    Rule(
        SGLANG,
        "sglang/srt/lora/lora.py: LoRAAdapter.scaling",
        "acts differently",
        find.scaled_otherwise(find.by_settings),
    ),
    Rule(SGLANG, _LEFT_OUT, "acts differently", find.any_of("trainable_token_indices", "modules_to_save")),
    Rule(SGLANG, _LEFT_OUT, "acts differently", find.enlarged),
    Rule(
        SGLANG,
        "sglang/srt/lora/lora_config.py: read by none",
        "acts differently",
        find.any_of("lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora"),
    ),
    Rule(SGLANG, "the base is not changed", "acts differently", find.starts_with("pissa", "olora", "corda", "loftq")),
    Rule(LLAMA, _LLAMA, "does not load", find.adapter_name),
    Rule(LLAMA, _LLAMA, "does not load", find.tensors_beside),
    Rule(LLAMA, _LLAMA, "does not load", find.tied_head),
    Rule(LLAMA, f"{_LLAMA}: no tensor of that name", "does not load", find.parameters),
    Rule(
        LLAMA,
        "llama.cpp: alpha / rank of the tensor",
        "acts differently",
        find.scaled_otherwise(find.by_tensor),
    ),
    Rule(LLAMA, "the base is not changed", "acts differently", find.starts_with("pissa", "olora", "corda", "loftq")),
    Rule(MERGED, "lora_dpo_jax.huggingface.adapter_config", "does not load", find.cannot_merge),
    Rule(MERGED, "lora_dpo_jax.huggingface.adapters", "does not load", find.tied_head),
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
