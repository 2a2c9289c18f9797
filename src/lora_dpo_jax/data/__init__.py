"""From raw rows to packed batches of examples."""

from typing import TYPE_CHECKING

from lora_dpo_jax.lazy import lazily

if TYPE_CHECKING:
    from lora_dpo_jax.data.batches import packed_batches, packed_rows
    from lora_dpo_jax.data.cache import TokenizedExamples, load_examples, tokenize_component
    from lora_dpo_jax.data.chat import ExampleTokenizer
    from lora_dpo_jax.data.config import ComponentConfig, FormatConfig, PreferenceDataConfig
    from lora_dpo_jax.data.examples import ExampleArrays, ExampleSizes, TokenizedExample
    from lora_dpo_jax.data.memory import MemoryExamples
    from lora_dpo_jax.data.order import ExampleOrder
    from lora_dpo_jax.data.packing import PreferenceBatch, pack
    from lora_dpo_jax.data.rows import Example
    from lora_dpo_jax.data.shapes import PackingConfig, PartShape, StepShapes, choose_shapes, fill_rows
    from lora_dpo_jax.data.sources import HubSource, UrlSource
    from lora_dpo_jax.data.table import ExampleSource, ExampleTable, split_by_prompt, whole_table

__getattr__ = lazily(
    __name__,
    {
        "batches": "packed_batches packed_rows",
        "cache": "TokenizedExamples load_examples tokenize_component",
        "chat": "ExampleTokenizer",
        "config": "ComponentConfig FormatConfig PreferenceDataConfig",
        "examples": "ExampleArrays ExampleSizes TokenizedExample",
        "memory": "MemoryExamples",
        "order": "ExampleOrder",
        "packing": "PreferenceBatch pack",
        "rows": "Example",
        "shapes": "PackingConfig PartShape StepShapes choose_shapes fill_rows",
        "sources": "HubSource UrlSource",
        "table": "ExampleSource ExampleTable split_by_prompt whole_table",
    },
)

__all__ = [
    "ComponentConfig",
    "Example",
    "ExampleArrays",
    "ExampleOrder",
    "ExampleSizes",
    "ExampleSource",
    "ExampleTable",
    "ExampleTokenizer",
    "FormatConfig",
    "HubSource",
    "MemoryExamples",
    "PackingConfig",
    "PartShape",
    "PreferenceBatch",
    "PreferenceDataConfig",
    "StepShapes",
    "TokenizedExample",
    "TokenizedExamples",
    "UrlSource",
    "choose_shapes",
    "fill_rows",
    "load_examples",
    "pack",
    "packed_batches",
    "packed_rows",
    "split_by_prompt",
    "tokenize_component",
    "whole_table",
]
