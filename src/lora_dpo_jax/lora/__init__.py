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
from lora_dpo_jax.lora.config import EMBEDDING, HEAD, PEFT_SWITCHES, LoraConfig
from lora_dpo_jax.lora.dora_linear import DoraLinear
from lora_dpo_jax.lora.dropout import TokenKey, split_key
from lora_dpo_jax.lora.lora_linear import LOW_RANK, LoraLinear, apply_all
from lora_dpo_jax.lora.offset_lora import OffsetLora
from lora_dpo_jax.lora.surgery import (
    adapt,
    constant_filter,
    equals_reference,
    for_inference,
    frozen_copy,
    loraize,
    map_factors,
    merge_lora,
    output_filter,
    reference_model,
    trainable_filter,
    unwrap_lora,
    with_dropout,
)
from lora_dpo_jax.lora.targets import matching_layers, matching_names, matching_parameters
from lora_dpo_jax.lora.token_rows import ROWS, EmbeddingRows, TokenRows, check_token_rows, with_token_rows
from lora_dpo_jax.lora.tree import LayerNames, layer_names, linear_layers, map_linear_layers, unadaptable_layers
from lora_dpo_jax.lora.variants import adapter_type, empty_adapter

__all__ = [
    "EMBEDDING",
    "HEAD",
    "LOW_RANK",
    "PEFT_SWITCHES",
    "ROWS",
    "Adapter",
    "ByLayer",
    "DoraLinear",
    "EmbeddingRows",
    "Factor",
    "LayerNames",
    "LoraConfig",
    "LoraLinear",
    "OffsetLora",
    "TokenKey",
    "TokenRows",
    "adapt",
    "adapter_type",
    "apply_all",
    "check_token_rows",
    "constant_filter",
    "empty_adapter",
    "equals_reference",
    "for_inference",
    "frozen_copy",
    "layer_names",
    "linear_layers",
    "loraize",
    "map_factors",
    "map_linear_layers",
    "matching_layers",
    "matching_names",
    "matching_parameters",
    "merge_lora",
    "output_filter",
    "reference_model",
    "split_key",
    "trainable_filter",
    "unadaptable_layers",
    "unwrap_lora",
    "unwrapped",
    "with_dropout",
    "with_token_rows",
]
