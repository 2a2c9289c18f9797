"""The table of supported model families: what the code of each fixes, and which keys of `config.json` set the rest.

`config_json.py` reads the file by this table. Tensors need no table: our modules have the names of the tensors, and the
fields `norms`, `fused_qkv` and `fused_gate_up` say where families differ.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_dpo_jax.json_objects import JsonObject
from lora_dpo_jax.models.config import ExpertsConfig, LayerNorms
from lora_dpo_jax.models.gates import ACTIVATIONS, ClampedGate


@dataclass(frozen=True)
class Key:
    """A key of `config.json`, and the field of `DecoderConfig` that it sets."""

    field: str
    check: Callable[[JsonObject, str], Any]  # raises ValueError that names the key
    convert: Callable[[Any], Any] = lambda value: value


def _positive(given: JsonObject, key: str) -> Any:
    return given.number(key, 1.0, above=0.0)


def _positive_or_null(given: JsonObject, key: str) -> Any:
    return given.number(key, None, above=0.0)


def _not_negative(given: JsonObject, key: str) -> Any:
    return given.number(key, 0.0, least=0.0)


def _activation(given: JsonObject, key: str) -> Any:
    return given.taken(key, "silu", lambda name: name in [*ACTIVATIONS], f"one of {sorted(ACTIVATIONS)}")


KEYS = {
    "rms_norm_eps": Key("norm_eps", _not_negative),
    "layer_norm_eps": Key("norm_eps", _not_negative),
    "hidden_act": Key("activation", _activation),
    "hidden_activation": Key("activation", _activation),
    "mlp_bias": Key("mlp_bias", lambda given, key: given.flag(key, False)),
    "attn_logit_softcapping": Key("attention_softcap", _positive_or_null),
    "final_logit_softcapping": Key("logit_softcap", _positive_or_null),
    "query_pre_attn_scalar": Key("attention_scale", _positive, lambda scalar: scalar**-0.5),
    "attention_multiplier": Key("attention_scale", _positive),
    "embedding_multiplier": Key("embedding_scale", _positive),
    "residual_multiplier": Key("residual_scale", _positive),
    "logits_scaling": Key("logit_scale", _positive, lambda scaling: 1.0 / scaling),
    "logit_scale": Key("logit_scale", _positive),
}


@dataclass(frozen=True)
class Architecture:
    """A family of models."""

    features: Mapping[str, Any] = field(default_factory=dict)  # fields of DecoderConfig that the family's code fixes
    keys: tuple[str, ...] = ()  # of KEYS, besides rms_norm_eps and hidden_act
    # More keys that the family's config class or our reader of it uses.
    other_keys: tuple[str, ...] = ()
    # Keys in the family's files that no code reads, with the only value that describes what the code computes.
    constants: Mapping[str, Any] = field(default_factory=dict)
    biases: Literal["as configured", "qkv as configured", "qkv", "none"] = "as configured"  # of attention
    windows: Literal["none", "every layer", "by layer type"] = "none"
    rope: Literal["every layer", "by layer type", "layers with windows", "no_rope_layers"] = "every layer"
    has_partial_rope: bool = False  # partial_rotary_factor counts
    has_interleaved_rope: bool = False  # rotates neighbouring dimensions, not those half a head apart
    has_query_scale: bool = False  # llama_4_scaling_beta counts
    experts: Callable[[Any], ExpertsConfig] | None = None  # from transformers' config object
    needs_whole_heads: bool = False  # hidden_size must be a multiple of num_attention_heads
    scales_embeddings: bool = False  # by the square root of hidden_size
    llama_cpp: str = ""  # the name of the family in GGUF files
    llama_cpp_rotates_neighbours: bool = False  # llama.cpp does, and this family's files do not: q and k are reordered
    # Values of quantization_config's quant_method whose tensors are read.
    quant_methods: tuple[str, ...] = ()


# Norms that differ from those of Llama.
_AFTER = LayerNorms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
_AROUND = LayerNorms(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)
_AROUND_OF_GLM = LayerNorms(
    "input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"
)
_OLMO = {"qk_norm": "projection", "norm": "rms_float32", "norms": _AFTER}
_GEMMA = {"norm": "rms_plus_one", "norms": _AROUND}
_GEMMA_KEYS = ("hidden_activation", "query_pre_attn_scalar", "final_logit_softcapping")

_EXPERTS = ("num_local_experts", "num_experts", "num_experts_per_tok", "norm_topk_prob", "router_aux_loss_coef")
_LAYERS_OF_EXPERTS = ("moe_intermediate_size", "decoder_sparse_step", "mlp_only_layers")

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        keys=("mlp_bias",), needs_whole_heads=True, llama_cpp="llama", llama_cpp_rotates_neighbours=True
    ),
    "mistral": Architecture(biases="none", windows="every layer", llama_cpp="llama", llama_cpp_rotates_neighbours=True),
    "ministral3": Architecture(
        biases="none",
        windows="every layer",
        has_query_scale=True,
        llama_cpp="mistral3",
        llama_cpp_rotates_neighbours=True,
    ),
    "qwen2": Architecture(biases="qkv", windows="by layer type", llama_cpp="qwen2"),
    "qwen3": Architecture({"qk_norm": "head"}, windows="by layer type", llama_cpp="qwen3"),
    "smollm3": Architecture(
        keys=("mlp_bias",),
        other_keys=("no_rope_layers", "no_rope_layer_interval"),
        windows="by layer type",
        rope="no_rope_layers",
        llama_cpp="smollm3",
        llama_cpp_rotates_neighbours=True,
    ),
    "olmo2": Architecture(_OLMO, llama_cpp="olmo2"),
    "olmo3": Architecture(_OLMO, windows="by layer type", rope="by layer type", llama_cpp="olmo2"),
    "gemma2": Architecture(
        _GEMMA,
        (*_GEMMA_KEYS, "attn_logit_softcapping"),
        windows="by layer type",
        needs_whole_heads=True,
        scales_embeddings=True,
        llama_cpp="gemma2",
    ),
    "gemma3_text": Architecture(
        _GEMMA | {"qk_norm": "head"},
        _GEMMA_KEYS,
        other_keys=("rope_local_base_freq", "sliding_window_pattern"),
        windows="by layer type",
        rope="by layer type",
        needs_whole_heads=True,
        scales_embeddings=True,
        llama_cpp="gemma3",
    ),
    "granite": Architecture(
        keys=("mlp_bias", "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
        llama_cpp="granite",
        llama_cpp_rotates_neighbours=True,
    ),
    "glm4": Architecture(
        {"norms": _AROUND_OF_GLM, "fused_gate_up": True},
        biases="qkv as configured",
        has_partial_rope=True,
        has_interleaved_rope=True,
        llama_cpp="glm4",
    ),
    "cohere2": Architecture(
        {"norm": "layer", "norms": LayerNorms(before_mlp=None), "parallel": True},
        ("layer_norm_eps", "logit_scale"),
        other_keys=("sliding_window_pattern",),
        constants={
            "order_of_interleaved_layers": "local_attn_first",
            "position_embedding_type": "rope_gptj",
            "rotary_pct": 1.0,
            "use_embedding_sharing": True,
            "use_gated_activation": True,
            "use_parallel_block": True,
        },
        windows="by layer type",
        rope="layers with windows",
        has_interleaved_rope=True,
        llama_cpp="cohere2",
    ),
    "phi3": Architecture(
        {"fused_qkv": True, "fused_gate_up": True},
        biases="none",
        windows="every layer",
        has_partial_rope=True,
        llama_cpp="phi3",
    ),
    "mixtral": Architecture(
        other_keys=_EXPERTS,
        biases="none",
        windows="every layer",
        experts=lambda theirs: ExpertsConfig(
            theirs.num_local_experts,
            theirs.num_experts_per_tok,
            theirs.intermediate_size,
            normalizes=True,
            block_name="block_sparse_moe",
            matrix_names=("w1", "w3", "w2"),
        ),
        llama_cpp="llama",
        llama_cpp_rotates_neighbours=True,
    ),
    "qwen3_moe": Architecture(
        {"qk_norm": "head"},
        other_keys=(*_EXPERTS, *_LAYERS_OF_EXPERTS),
        windows="every layer",
        experts=lambda theirs: ExpertsConfig(
            theirs.num_experts, theirs.num_experts_per_tok, theirs.moe_intermediate_size, theirs.norm_topk_prob
        ),
        llama_cpp="qwen3moe",
    ),
    "olmoe": Architecture(
        {"qk_norm": "projection"},
        other_keys=_EXPERTS,
        experts=lambda theirs: ExpertsConfig(
            theirs.num_experts, theirs.num_experts_per_tok, theirs.intermediate_size, theirs.norm_topk_prob
        ),
        llama_cpp="olmoe",
    ),
    "gpt_oss": Architecture(
        {"norm": "rms_float32", "attention_sinks": True},
        other_keys=(*_EXPERTS, "swiglu_alpha", "swiglu_limit"),
        windows="by layer type",
        experts=lambda theirs: ExpertsConfig(
            theirs.num_local_experts,
            theirs.num_experts_per_tok,
            theirs.intermediate_size,
            normalizes=True,
            gathered=True,
            has_biases=True,
            is_interleaved=True,
            is_transposed=True,
            clamped_gate=ClampedGate(theirs.swiglu_alpha, theirs.swiglu_limit),
            router_name="router",
        ),
        quant_methods=("mxfp4",),
        llama_cpp="gpt-oss",
    ),
}


@dataclass(frozen=True)
class Wrapper:
    """A model of text and images (`...ForConditionalGeneration`), whose text model is tuned alone."""

    text_type: str  # the `model_type` of `text_config` if the file leaves it out
    keys: tuple[str, ...]  # of `config.json`, about images
    llama_cpp: str = ""  # the name of the text model in GGUF files


WRAPPERS = {
    "gemma3": Wrapper(
        "gemma3_text",
        ("boi_token_index", "eoi_token_index", "image_token_index", "mm_tokens_per_image"),
        llama_cpp="gemma3",
    ),
    "mistral3": Wrapper(
        "mistral",
        (
            "image_token_index",
            "multimodal_projector_bias",
            "projector_hidden_act",
            "spatial_merge_size",
            "vision_feature_layer",
        ),
        llama_cpp="mistral3",
    ),
}


def family_in_llama_cpp(hf: Mapping[str, Any]) -> tuple[str, bool]:
    """The name of a family in GGUF files, and whether llama.cpp reorders its queries and keys; "" if it has no name.

    `hf` is the content of `config.json`.
    """
    outer = WRAPPERS.get(hf.get("model_type", ""))
    inner = hf if outer is None else hf.get("text_config") or {}
    family = ARCHITECTURES.get(inner.get("model_type") or (outer.text_type if outer else ""), Architecture())
    return (outer.llama_cpp if outer else family.llama_cpp), family.llama_cpp_rotates_neighbours
