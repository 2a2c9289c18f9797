"""Attention over packed rows and over a key-value cache."""

from lora_dpo_jax.models.attention.attend import IMPLEMENTATIONS, PLATFORMS, attend
from lora_dpo_jax.models.attention.masks import AttentionMask, CachedMask, PackedMask, as_keys
from lora_dpo_jax.models.attention.score_rule import ScoreRule

__all__ = [
    "IMPLEMENTATIONS",
    "PLATFORMS",
    "AttentionMask",
    "CachedMask",
    "PackedMask",
    "ScoreRule",
    "as_keys",
    "attend",
]
