"""The table of supported families: how each one's `config.json` becomes a `DecoderConfig`.

Tensors need no table: every family here names them alike, and our modules carry those names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_dpo_jax.models.config import DecoderConfig
from lora_dpo_jax.models.mlp import ACTIVATIONS
from lora_dpo_jax.models.rope import RopeConfig


@dataclass(frozen=True)
class Architecture:
    """What a `model_type` fixes in code, and what transformers assumes where its `config.json` is silent."""

    biases: Literal["as configured", "qkv", "none"]
    window: Literal["never", "every layer", "late layers"]
    qk_norm: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("as configured", "never", defaults={"vocab_size": 32000}),
    "mistral": Architecture("none", "every layer", defaults={"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": Architecture("qkv", "late layers", defaults={"sliding_window": 4096, "max_window_layers": 28}),
    "qwen3": Architecture(
        "as configured",
        "late layers",
        qk_norm=True,
        defaults={"sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
    ),
}

REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
USED = {
    *REQUIRED,
    "model_type",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
}
# Keys that change no logit: initialization, generation, labels, training-time dropout (which TRL turns off as well),
# and how tensor parallelism once split the pretraining.
HARMLESS = {
    "architectures",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "is_llama_config",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "rope_interleaved",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "use_cache",
}
ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Reads a parsed `config.json`; raises ValueError for a family or a feature that is not supported."""
    model_type = hf.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ValueError(f"config.json: model_type={model_type!r} is not supported; known: {sorted(ARCHITECTURES)}")
    architecture = ARCHITECTURES[model_type]
    _refuse_unknown_keys(hf)
    settings = {**architecture.defaults, **{k: v for k, v in hf.items() if v is not None}}
    if missing := [key for key in REQUIRED if key not in settings]:
        raise ValueError(f"config.json: missing {missing}")

    num_heads, hidden_size = settings["num_attention_heads"], settings["hidden_size"]
    max_positions = settings.get("max_position_embeddings", 2048)
    configured_bias = settings.get("attention_bias", False) if architecture.biases == "as configured" else False
    return DecoderConfig(
        vocab_size=settings["vocab_size"],
        hidden_size=hidden_size,
        intermediate_size=settings["intermediate_size"],
        num_layers=settings["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=settings.get("num_key_value_heads", num_heads),
        head_dim=settings.get("head_dim", hidden_size // num_heads),
        max_position_embeddings=max_positions,
        rope=_rope(settings, max_positions),
        rms_norm_eps=settings.get("rms_norm_eps", 1e-6),
        activation=_activation(settings.get("hidden_act", "silu")),
        tie_word_embeddings=settings.get("tie_word_embeddings", False),
        qkv_bias=configured_bias or architecture.biases == "qkv",
        attention_out_bias=configured_bias,
        mlp_bias=model_type == "llama" and settings.get("mlp_bias", False),
        qk_norm=architecture.qk_norm,
        sliding_windows=_windows(architecture, settings, hf),
    )


def _refuse_unknown_keys(hf: Mapping[str, Any]) -> None:
    unknown = {key: value for key, value in hf.items() if key not in USED | HARMLESS and not key.startswith("_")}
    # A feature that is switched off is no feature.
    unknown = {key: value for key, value in unknown.items() if value not in (None, False, [], {})}
    if unknown:
        raise ValueError(f"config.json: not supported, so the model would be computed wrongly: {unknown}")


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(f"config.json: hidden_act={name!r} is not supported; known: {sorted(ACTIVATIONS)}")
    return name


def _windows(architecture: Architecture, settings: Mapping[str, Any], hf: Mapping[str, Any]):
    layers, window = settings["num_hidden_layers"], settings.get("sliding_window")
    if architecture.window == "every layer":
        # Only an absent key means the default; an explicit null means full attention.
        window = window if hf.get("sliding_window", window) is not None else None
        return (window,) * layers if window is not None else None
    if architecture.window == "never" or not settings.get("use_sliding_window", False):
        return None
    late = ["full_attention" if i < settings["max_window_layers"] else "sliding_attention" for i in range(layers)]
    layer_types = settings.get("layer_types", late)
    if unknown := set(layer_types) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"config.json: layer_types holds {sorted(unknown)}, which is not supported")
    windows = tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    return windows if any(windows) else None


def _rope(settings: Mapping[str, Any], max_positions: int) -> RopeConfig:
    # transformers 5 writes `rope_parameters`; before, there were `rope_theta` and `rope_scaling`.
    given = {"rope_theta": settings.get("rope_theta", 10000.0)}
    given |= settings.get("rope_scaling") or {}
    given |= settings.get("rope_parameters") or {}
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    if kind not in ROPE_KEYS:
        raise ValueError(f"config.json: rope_type={kind!r} is not supported; known: {sorted(ROPE_KEYS)}")
    theta = given.pop("rope_theta")
    given = {key: value for key, value in given.items() if value is not None}
    if unknown := set(given) - ROPE_KEYS[kind] - {"original_max_position_embeddings"}:
        raise ValueError(f"config.json: rope type {kind!r} has settings that are not supported: {sorted(unknown)}")
    if missing := ROPE_KEYS[kind] - {"original_max_position_embeddings"} - set(given):
        raise ValueError(f"config.json: rope type {kind!r} needs {sorted(missing)}")
    # `dynamic` counts from max_position_embeddings even where an original length is given (transformers does).
    original = max_positions if kind == "dynamic" else given.get("original_max_position_embeddings", max_positions)
    scaling = {key: given[key] for key in ROPE_KEYS[kind] & given.keys()}
    return RopeConfig(theta=theta, type=kind, **{**scaling, "original_max_position_embeddings": original})
