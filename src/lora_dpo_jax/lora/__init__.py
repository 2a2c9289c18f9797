"""Low-rank adapters (https://arxiv.org/abs/2106.09685) on the linear layers of any equinox / haliax model.

    before                          after loraize

    self_attn                       self_attn
      q_proj: Linear                  q_proj: LoraLinear
                                        wrapped: Linear       frozen, the same arrays
                                        lora_A   {layers, lora_rank, *In}     float32, random
                                        lora_B   {layers, *Out, lora_rank}    float32, zero

Nothing is flagged or mutated: the reference is another tree, `unwrap_lora(model)`, which shares the weights.
"""

from lora_dpo_jax.lora.adapter import Adapter, ByLayer, Factor, unwrapped
from lora_dpo_jax.lora.config import PEFT_SWITCHES, LoraConfig
from lora_dpo_jax.lora.dora_linear import DoraLinear
from lora_dpo_jax.lora.dropout import TokenKey, split_key
from lora_dpo_jax.lora.lora_linear import LOW_RANK, LoraLinear, apply_all
from lora_dpo_jax.lora.offset_lora import OffsetLora
from lora_dpo_jax.lora.surgery import (
    adapt,
    constant_filter,
    equals_reference,
    frozen_copy,
    loraize,
    merge_lora,
    output_filter,
    reference_model,
    trainable_filter,
    unwrap_lora,
    with_dropout,
)
from lora_dpo_jax.lora.targets import matching_names
from lora_dpo_jax.lora.tree import linear_layers, map_linear_layers, unadaptable_layers
from lora_dpo_jax.lora.variants import adapter_type, empty_adapter

__all__ = [
    "LOW_RANK",
    "PEFT_SWITCHES",
    "Adapter",
    "ByLayer",
    "DoraLinear",
    "Factor",
    "LoraConfig",
    "LoraLinear",
    "OffsetLora",
    "TokenKey",
    "adapt",
    "adapter_type",
    "apply_all",
    "constant_filter",
    "empty_adapter",
    "equals_reference",
    "frozen_copy",
    "linear_layers",
    "loraize",
    "map_linear_layers",
    "matching_names",
    "merge_lora",
    "output_filter",
    "reference_model",
    "split_key",
    "trainable_filter",
    "unadaptable_layers",
    "unwrap_lora",
    "unwrapped",
    "with_dropout",
]
