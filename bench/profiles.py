"""What is measured: model shapes as `config.json` has them, and how long prompts and responses are."""

from dataclasses import dataclass
from typing import Any

_LLAMA: dict[str, Any] = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    hidden_act="silu",
    rms_norm_eps=1e-5,
    attention_bias=False,
    mlp_bias=False,
    initializer_range=0.02,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


def _llama3_rope(factor: float) -> dict[str, Any]:
    return dict(
        rope_type="llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )


# The keys that decide a model's arrays and how it is computed.
SHAPES: dict[str, dict[str, Any]] = {
    # For trying the commands out, and for tests.
    "tiny": _LLAMA
    | dict(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rope_theta=10000.0,
        tie_word_embeddings=False,
    ),
    # 22 million parameters, three quarters of them in embedding and head.
    "22m": _LLAMA
    | dict(
        vocab_size=32000,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        rope_theta=10000.0,
        tie_word_embeddings=False,
    ),
    # SmolLM2-135M.
    "135m": _LLAMA
    | dict(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    ),
    # Llama-3.2-1B.
    "1b": _LLAMA
    | dict(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling=_llama3_rope(32.0),
        tie_word_embeddings=True,
    ),
    # Llama-3.1-8B.
    "8b": _LLAMA
    | dict(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling=_llama3_rope(8.0),
        tie_word_embeddings=False,
    ),
}
_GEMMA: dict[str, Any] = dict(hidden_activation="gelu_pytorch_tanh", sliding_window=512)
# Other families' fields. Mixtral's experts are half as wide, and two of them compute a token.
_FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": _GEMMA | dict(model_type="gemma2", attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
    "gemma3": _GEMMA | dict(model_type="gemma3_text"),
    "olmo2": dict(model_type="olmo2"),
    "olmo3": dict(model_type="olmo3", sliding_window=512),
    "mixtral": dict(model_type="mixtral", num_local_experts=8, num_experts_per_tok=2, sliding_window=None),
}


def _of_family(shape: dict[str, Any], family: str) -> dict[str, Any]:
    """As large as a Llama's shape, computed as another family is."""
    heads = shape["num_attention_heads"]
    own = _FAMILIES[family] | dict(head_dim=shape.get("head_dim", shape["hidden_size"] // heads))
    if family == "mixtral":
        own["intermediate_size"] = shape["intermediate_size"] // own["num_experts_per_tok"]
    if "gemma" in family:
        own["query_pre_attn_scalar"] = own["head_dim"]
    return {name: value for name, value in shape.items() if name != "rope_scaling"} | own


SHAPES |= {f"{size}-{family}": _of_family(SHAPES[size], family) for size in ("22m", "1b") for family in _FAMILIES}
# From here on a model is made in the devices' memory and never written to a disk.
LARGE_SHAPES = ("1b", "8b", *(name for name in SHAPES if name.startswith("1b-")))


@dataclass(frozen=True)
class Length:
    """Log-normal, in tokens."""

    median: float
    sigma: float


@dataclass(frozen=True)
class LengthProfile:
    """Lengths of prompts and responses; the latter are at least 4 tokens and end at the cap."""

    prompt: Length
    chosen: Length
    rejected: Length
    shortest_prompt: int
    longest_prompt: int
    cap: int  # tokens of prompt + one response


# `ultrafeedback` and `hh` take their medians from the README of the repository frankxwang/dpo-prefix-sharing
# (https://arxiv.org/abs/2410.20305): overall 409 and 186 tokens, prefix to completion 0.42 and 2.15, overall read as
# prompt + completion. The spread, and that rejected responses are as long as chosen ones, are assumptions.
# The other two are like them, halved to a cap of 512 tokens, for measuring on a CPU.
PROFILES: dict[str, LengthProfile] = {
    "uf512": LengthProfile(Length(60, 0.95), Length(140, 0.70), Length(115, 0.75), 8, 256, cap=512),
    "hh512": LengthProfile(Length(80, 0.75), Length(40, 0.75), Length(38, 0.80), 8, 256, cap=512),
    "ultrafeedback": LengthProfile(Length(121, 0.95), Length(288, 0.75), Length(288, 0.75), 4, 512, cap=1024),
    "hh": LengthProfile(Length(127, 0.75), Length(59, 0.75), Length(59, 0.75), 4, 256, cap=512),
}
