"""The floating-point operations that a step needs, for model FLOPs utilization (MFU)."""

import haliax as hax
import jax
import jax.numpy as jnp

from lora_dpo_jax.data.packing import PreferenceBatch
from lora_dpo_jax.lora import Adapter, linear_layers, unwrapped
from lora_dpo_jax.models import CausalLM


def useful_flops(model: CausalLM, batch: PreferenceBatch, *, with_reference: bool) -> jax.Array:
    """Floating-point operations that the batch's tokens need, a shared prompt counted once; float32 scalar.

    Frozen weights count forward, and backward to their inputs (as much again). The factors of the adapters also get
    gradients. Attention counts the keys that each token sees, the head only predicting positions. The reference, if it
    is computed in the step, adds a forward pass. Padding and recomputation do not count.
    """
    config = model.config
    weights = adapters = 0
    for layer, _ in linear_layers(model.model.layers):
        weight = unwrapped(layer).weight
        # A token passes through some of the experts alone.
        of_experts = config.experts is not None and config.experts.Expert in weight.axes
        share = config.experts.per_token / config.experts.num_experts if config.experts and of_experts else 1.0
        weights += share * weight.size
        adapters += share * layer.flops_per_token if isinstance(layer, Adapter) else 0
    passes = 3.0 if with_reference else 2.0
    is_token = batch.segment_ids > 0
    tokens = hax.sum(is_token).scalar().astype(jnp.float32)
    targets = hax.sum(batch.target_response >= 0).scalar().astype(jnp.float32)
    # A token sees itself and the tokens before it in its own sequence.
    seen = hax.sum(hax.where(is_token, batch.position_ids + 1, 0).astype(jnp.float32)).scalar()
    products = tokens * (2.0 * weights * passes + 3.0 * adapters)
    # Scores and sums of values; their gradients cost twice as much as they do.
    attention = seen * 4.0 * config.num_layers * config.num_heads * config.head_dim * (passes + 1.0)
    head = targets * 2.0 * config.hidden_size * config.vocab_size * passes
    return products + attention + head
