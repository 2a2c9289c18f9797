"""From raw preference rows to packed batches."""

from lora_dpo_jax.data.batches import (
    PairSource,
    PairTable,
    packed_batches,
    packed_rows,
    split_by_prompt,
    whole_table,
)
from lora_dpo_jax.data.cache import TokenizedPairs, load_pairs, tokenize_component
from lora_dpo_jax.data.chat import PairTokenizer, TokenizedPair
from lora_dpo_jax.data.config import ComponentConfig, FormatConfig, PreferenceDataConfig
from lora_dpo_jax.data.memory import MemoryPairs
from lora_dpo_jax.data.order import PairOrder
from lora_dpo_jax.data.packing import PreferenceBatch, pack
from lora_dpo_jax.data.rows import PreferencePair
from lora_dpo_jax.data.shapes import Layout, PairLayout, RunLayout, plan_layout, plan_rows
from lora_dpo_jax.data.sources import HubSource, UrlSource

__all__ = [
    "ComponentConfig",
    "FormatConfig",
    "HubSource",
    "Layout",
    "MemoryPairs",
    "PairLayout",
    "PairOrder",
    "PairSource",
    "PairTable",
    "PairTokenizer",
    "PreferenceBatch",
    "PreferenceDataConfig",
    "PreferencePair",
    "RunLayout",
    "TokenizedPair",
    "TokenizedPairs",
    "UrlSource",
    "load_pairs",
    "pack",
    "packed_batches",
    "packed_rows",
    "plan_layout",
    "plan_rows",
    "split_by_prompt",
    "tokenize_component",
    "whole_table",
]
