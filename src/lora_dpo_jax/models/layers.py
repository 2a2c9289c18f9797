"""One layer of a decoder: attention and a feed-forward part. Modules are named as in Hugging Face, except norms."""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
import jax.numpy as jnp
from haliax import NamedArray

from lora_dpo_jax.axes import KV_HEAD, Q_HEADS_PER_GROUP
from lora_dpo_jax.lora import split_key
from lora_dpo_jax.models.attention import AttentionMask, ScoreRule, as_keys, attend
from lora_dpo_jax.models.compute import ComputeConfig
from lora_dpo_jax.models.config import DecoderConfig, LayerKind
from lora_dpo_jax.models.experts import Experts
from lora_dpo_jax.models.kv_cache import KeyValueCache, PackedKeys
from lora_dpo_jax.models.linear import linear, product, products, scaled
from lora_dpo_jax.models.mlp import Mlp
from lora_dpo_jax.models.norms import norm
from lora_dpo_jax.models.rope import RotaryAngles
from lora_dpo_jax.platforms import platform

# By name, float32 {row, ...}: values that layers pass to the objective besides hidden states, such as how evenly a
# router distributes tokens. A decoder passes the sum over its layers.
Auxiliary = Mapping[str, NamedArray]


class TokenContext(eqx.Module):
    """The properties of tokens that every layer needs besides their hidden states.

    Rotary angles for each of the decoder's `ropes`, the attention mask and, in generation, the cache slot of the first
    token, or that layers return the keys and values of the tokens.
    """

    angles: tuple[RotaryAngles, ...]
    mask: AttentionMask
    slot: jnp.ndarray | None = None
    keeps_keys: bool = eqx.field(static=True, default=False)


class Sinks(eqx.Module):
    """The sinks of attention: see `ScoreRule`."""

    weight: NamedArray  # {kv_head, q_heads_per_group}

    @property
    def tensor_sides(self) -> tuple[tuple[str, ...], ...]:
        """See `tensor_names.Sided`."""
        return ((KV_HEAD, Q_HEADS_PER_GROUP),)


class Attention(eqx.Module):
    """Grouped-query attention. One matrix holds either all of q, k and v, or each of them."""

    config: DecoderConfig = eqx.field(static=True)
    compute: ComputeConfig = eqx.field(static=True)
    kind: LayerKind = eqx.field(static=True)
    rule: ScoreRule
    q_proj: hnn.Linear | None
    k_proj: hnn.Linear | None
    v_proj: hnn.Linear | None
    qkv_proj: hnn.Linear | None
    o_proj: hnn.Linear
    q_norm: hnn.RmsNorm | None
    k_norm: hnn.RmsNorm | None
    sinks: Sinks | None

    @staticmethod
    def init(config: DecoderConfig, compute: ComputeConfig, kind: LayerKind, *, key) -> "Attention":
        Embed, HeadSize = config.Embed, config.HeadSize
        Q, KV = (config.KVHeads, config.QHeadsPerGroup, HeadSize), (config.KVHeads, HeadSize)
        keys = jax.random.split(key, 4)
        scale = HeadSize.size**-0.5 if config.attention_scale is None else config.attention_scale
        o_proj = linear(Q, Embed, key=keys[3], use_bias=config.attention_out_bias)

        def projection(Out, key, fused=False):
            return linear(Embed, Out, key=key, use_bias=config.qkv_bias) if fused == config.fused_qkv else None

        def norm_of(Projection):
            axes = {"head": HeadSize, "projection": Projection, None: None}[config.qk_norm]
            return None if axes is None else norm(config.norm, axes, config.norm_eps)

        # o_proj has the axis order that a TPU computes with. For any other, XLA would copy the weights of all layers.
        # For this one, XLA would copy each layer's weights on a GPU.
        if platform() != "gpu":
            o_proj = dataclasses.replace(o_proj, weight=o_proj.weight.rearrange((*Q[:-1], Embed, HeadSize)))
        return Attention(
            config,
            compute,
            kind,
            ScoreRule(scale, softcap=config.attention_softcap, window=kind.window),
            q_proj=projection(Q, keys[0]),
            k_proj=projection(KV, keys[1]),
            v_proj=projection(KV, keys[2]),
            qkv_proj=projection((config.QKVHeads, HeadSize), keys[0], fused=True),
            o_proj=o_proj,
            q_norm=norm_of(Q),
            k_norm=norm_of(KV),
            sinks=Sinks(hax.zeros(Q[:-1])) if config.attention_sinks else None,
        )

    def __call__(self, x: NamedArray, tokens: TokenContext, cache: KeyValueCache | None, *, key=None):
        """x {row, position, embed} -> (the same axes, the cache with these tokens' keys and values, or these alone)."""
        HeadSize = self.config.HeadSize
        k_q, k_k, k_v, k_o = split_key(key, 4)
        q, k, v = self._projected(x, k_q, k_k, k_v)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.kind.rope is not None:
            angles = tokens.angles[self.config.ropes.index(self.kind.rope)]
            q, k = angles.rotate_queries(q, HeadSize), angles.rotate(k, HeadSize)
        k, v = as_keys(k), as_keys(v)
        if cache is not None and tokens.slot is not None:
            cache = cache.write(k, v, tokens.slot)
            k, v = cache.k, cache.v
        kept = PackedKeys(k, v) if tokens.keeps_keys else cache
        rule = self.rule
        if self.sinks is not None:
            rule = dataclasses.replace(rule, sinks=self.sinks.weight.astype(jnp.float32))
        attended = attend(q, k, v, tokens.mask, rule, HeadSize, self.compute.attention)
        return product(self.o_proj, attended, key=k_o), kept

    def _projected(self, x: NamedArray, k_q, k_k, k_v) -> tuple[NamedArray, NamedArray, NamedArray]:
        """Queries {..., kv_head, q_heads_per_group, head_size}, keys and values {..., kv_head, head_size}."""
        if self.qkv_proj is None:
            q, k, v = products((self.q_proj, self.k_proj, self.v_proj), x, (k_q, k_k, k_v))
            return q, k, v
        config, Heads = self.config, self.config.QKVHeads
        heads = product(self.qkv_proj, x, key=k_q)
        after_q, after_k = config.num_heads, config.num_heads + config.num_kv_heads
        q = heads[Heads, :after_q].unflatten_axis(Heads.name, (config.KVHeads, config.QHeadsPerGroup))
        rest = heads[Heads, after_q:after_k], heads[Heads, after_k:]
        k, v = (part.rename({Heads.name: config.KVHeads.name}) for part in rest)
        return q, k, v


class FeedForward(Protocol):
    """The part of a layer after attention: an `Mlp`, or experts."""

    def __call__(self, x: NamedArray, segments: NamedArray, *, key=None) -> tuple[NamedArray, Auxiliary]:
        """x {row, position, embed} -> the same axes, and values that an objective may add to its loss.

        `segments` int32 {row, position}: see `AttentionMask.segments`.
        """
        ...


class LayerOutput(eqx.Module):
    """The output of one layer."""

    x: NamedArray  # {row, position, embed}
    cache: KeyValueCache | PackedKeys | None
    auxiliary: Auxiliary


class DecoderLayer(eqx.Module):
    """x + attention(x), then + mlp(.), each between its norms; or x + attention(norm(x)) + mlp(norm(x)) if parallel."""

    before_attention: hnn.RmsNorm | None
    self_attn: Attention
    after_attention: hnn.RmsNorm | None
    before_mlp: hnn.RmsNorm | None
    mlp: FeedForward
    after_mlp: hnn.RmsNorm | None
    config: DecoderConfig = eqx.field(static=True)

    @staticmethod
    def init(config: DecoderConfig, compute: ComputeConfig, kind: LayerKind, *, key) -> "DecoderLayer":
        k_attention, k_mlp = jax.random.split(key)
        norms = {
            place: None if name is None else norm(config.norm, config.Embed, config.norm_eps)
            for place, name in dataclasses.asdict(config.norms).items()
        }
        attention = Attention.init(config, compute, kind, key=k_attention)
        mlp = Experts.init(config, key=k_mlp) if kind.has_experts else Mlp.init(config, key=k_mlp)
        return DecoderLayer(self_attn=attention, mlp=mlp, config=config, **norms)

    @property
    def tensor_parts(self) -> Mapping[str, str]:
        """See `tensor_names.Renamed`."""
        names = {place: name for place, name in dataclasses.asdict(self.config.norms).items() if name is not None}
        return names | {"mlp": self.mlp.gate.config.module_name} if isinstance(self.mlp, Experts) else names

    def __call__(
        self, x: NamedArray, tokens: TokenContext, cache: KeyValueCache | None = None, *, key=None
    ) -> LayerOutput:
        k_attention, k_mlp = split_key(key, 2)
        scale = self.config.residual_scale
        read = _normalized(self.before_attention, x)
        attended, kept = self.self_attn(read, tokens, cache, key=k_attention)
        after_attention = x + scaled(_normalized(self.after_attention, attended), scale)
        if not self.config.parallel:
            read = _normalized(self.before_mlp, after_attention)
        transformed, auxiliary = self.mlp(read, tokens.mask.segments(), key=k_mlp)
        x = after_attention + scaled(_normalized(self.after_mlp, transformed), scale)
        return LayerOutput(x, kept, auxiliary)


def _normalized(norm: hnn.RmsNorm | None, x: NamedArray) -> NamedArray:
    return x if norm is None else norm(x)
