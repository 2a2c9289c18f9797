"""One layer of a decoder: attention and a feed-forward part. Modules are named as in Hugging Face."""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import equinox as eqx
import haliax.nn as hnn
import jax
import jax.numpy as jnp
from haliax import NamedArray

from lora_dpo_jax.lora import split_key
from lora_dpo_jax.models.attention import AttentionMask, ScoreRule, as_keys, attend
from lora_dpo_jax.models.compute import ComputeConfig
from lora_dpo_jax.models.config import DecoderConfig
from lora_dpo_jax.models.kv_cache import KeyValueCache
from lora_dpo_jax.models.linear import linear, product, rms_norm
from lora_dpo_jax.models.mlp import Mlp
from lora_dpo_jax.models.rope import rotate

# By name, float32 {row}: values that layers pass to the objective besides hidden states, such as how evenly a router
# distributes tokens. A decoder passes the sum over its layers.
Auxiliary = Mapping[str, NamedArray]


class TokenContext(eqx.Module):
    """The properties of tokens that every layer needs besides their hidden states.

    Rotary angles {row, position, half_head}, the attention mask and, in generation, the cache slot of the first token.
    """

    cos: NamedArray
    sin: NamedArray
    mask: AttentionMask
    slot: jnp.ndarray | None = None


class Attention(eqx.Module):
    """Grouped-query attention."""

    config: DecoderConfig = eqx.field(static=True)
    compute: ComputeConfig = eqx.field(static=True)
    rule: ScoreRule
    q_proj: hnn.Linear
    k_proj: hnn.Linear
    v_proj: hnn.Linear
    o_proj: hnn.Linear
    q_norm: hnn.RmsNorm | None
    k_norm: hnn.RmsNorm | None

    @staticmethod
    def init(config: DecoderConfig, compute: ComputeConfig, window: int | None, *, key) -> "Attention":
        Embed, HeadSize = config.Embed, config.HeadSize
        Q, KV = (config.KVHeads, config.QHeadsPerGroup, HeadSize), (config.KVHeads, HeadSize)
        keys = jax.random.split(key, 4)
        norm = rms_norm(HeadSize, config.rms_norm_eps) if config.qk_norm else None
        o_proj = linear(Q, Embed, key=keys[3], use_bias=config.attention_out_bias)
        # o_proj has the axis order that a TPU computes with. For any other, XLA would copy the weights of all layers.
        return Attention(
            config,
            compute,
            ScoreRule(HeadSize.size**-0.5, window=window),
            q_proj=linear(Embed, Q, key=keys[0], use_bias=config.qkv_bias),
            k_proj=linear(Embed, KV, key=keys[1], use_bias=config.qkv_bias),
            v_proj=linear(Embed, KV, key=keys[2], use_bias=config.qkv_bias),
            o_proj=dataclasses.replace(o_proj, weight=o_proj.weight.rearrange((*Q[:-1], Embed, HeadSize))),
            q_norm=norm,
            k_norm=norm,
        )

    def __call__(self, x: NamedArray, tokens: TokenContext, cache: KeyValueCache | None, *, key=None):
        """x {row, position, embed} -> (the same axes, the cache with these tokens' keys and values)."""
        HeadSize = self.config.HeadSize
        k_q, k_k, k_v, k_o = split_key(key, 4)
        q, k, v = (product(p, x, key=k) for p, k in ((self.q_proj, k_q), (self.k_proj, k_k), (self.v_proj, k_v)))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = rotate(q, tokens.cos, tokens.sin, HeadSize)
        k, v = as_keys(rotate(k, tokens.cos, tokens.sin, HeadSize)), as_keys(v)
        if cache is not None and tokens.slot is not None:
            cache = cache.write(k, v, tokens.slot)
            k, v = cache.k, cache.v
        attended = attend(q, k, v, tokens.mask, self.rule, HeadSize, self.compute.attention)
        return product(self.o_proj, attended, key=k_o), cache


class FeedForward(Protocol):
    """The part of a layer after attention: an `Mlp`, or experts."""

    def __call__(self, x: NamedArray, *, key=None) -> tuple[NamedArray, Auxiliary]:
        """x {row, position, embed} -> the same axes, and values that an objective may add to its loss."""
        ...


class LayerOutput(eqx.Module):
    """The output of one layer."""

    x: NamedArray  # {row, position, embed}
    cache: KeyValueCache | None
    auxiliary: Auxiliary


class DecoderLayer(eqx.Module):
    """x + attention(norm(x)), then + mlp(norm(.))."""

    input_layernorm: hnn.RmsNorm
    self_attn: Attention
    post_attention_layernorm: hnn.RmsNorm
    mlp: FeedForward

    @staticmethod
    def init(config: DecoderConfig, compute: ComputeConfig, window: int | None, *, key) -> "DecoderLayer":
        """Only `window` (tokens) may differ from layer to layer."""
        k_attention, k_mlp = jax.random.split(key)
        norm = rms_norm(config.Embed, config.rms_norm_eps)
        attention = Attention.init(config, compute, window, key=k_attention)
        return DecoderLayer(norm, attention, norm, Mlp.init(config, key=k_mlp))

    def __call__(
        self, x: NamedArray, tokens: TokenContext, cache: KeyValueCache | None = None, *, key=None
    ) -> LayerOutput:
        k_attention, k_mlp = split_key(key, 2)
        attended, cache = self.self_attn(self.input_layernorm(x), tokens, cache, key=k_attention)
        x = x + attended
        transformed, auxiliary = self.mlp(self.post_attention_layernorm(x), key=k_mlp)
        return LayerOutput(x + transformed, cache, auxiliary)
