"""One haliax decoder for every supported architecture; see `architectures.py` for the table of families."""

from typing import TYPE_CHECKING

from lora_dpo_jax.lazy import lazily

if TYPE_CHECKING:
    from lora_dpo_jax.models.architectures import family_in_llama_cpp
    from lora_dpo_jax.models.attention import AttentionMask, CachedMask, PackedMask
    from lora_dpo_jax.models.compute import ComputeConfig
    from lora_dpo_jax.models.config import DecoderConfig
    from lora_dpo_jax.models.config_json import config_from_hf
    from lora_dpo_jax.models.decoder import CausalLM
    from lora_dpo_jax.models.head import Head
    from lora_dpo_jax.models.kv_cache import KeyValueCache
    from lora_dpo_jax.models.rope import RopeConfig

__getattr__ = lazily(
    __name__,
    {
        "architectures": "family_in_llama_cpp",
        "attention": "AttentionMask CachedMask PackedMask",
        "compute": "ComputeConfig",
        "config": "DecoderConfig",
        "config_json": "config_from_hf",
        "decoder": "CausalLM",
        "head": "Head",
        "kv_cache": "KeyValueCache",
        "rope": "RopeConfig",
    },
)

__all__ = [
    "AttentionMask",
    "CachedMask",
    "CausalLM",
    "ComputeConfig",
    "DecoderConfig",
    "Head",
    "KeyValueCache",
    "PackedMask",
    "RopeConfig",
    "config_from_hf",
    "family_in_llama_cpp",
]
