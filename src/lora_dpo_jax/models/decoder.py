"""The decoder: embeddings, a stack of blocks, a final norm and a head. Modules are named as in Hugging Face."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
import jax.numpy as jnp
from haliax import Axis, NamedArray
from haliax.axis import AxisSpec
from haliax.nn.scan import ScanCheckpointPolicy

from lora_dpo_jax.lora import LOW_RANK, TokenKey, reference_model, split_key
from lora_dpo_jax.models.attention import KEY_POSITION, AttentionMask, as_keys, attend
from lora_dpo_jax.models.config import DecoderConfig
from lora_dpo_jax.models.packed_blocks import ATTENDED
from lora_dpo_jax.models.quantization import QuantizedWeight, quantized_product
from lora_dpo_jax.models.rope import rotary_angles, rotate

ACTIVATIONS: dict[str, Callable] = {
    "silu": hnn.silu,
    "gelu": lambda x: hnn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: hnn.gelu(x, approximate=True),
    "relu": hnn.relu,
}


class KeepActivations(ScanCheckpointPolicy):
    """Keeps all that the backward pass needs, but no copy of the weights, which haliax's names would make of them."""

    def checkpoint(self, carry_name: str, input_name: str, callable: Callable) -> Callable:
        policy = jax.checkpoint_policies.save_anything_except_these_names(input_name)
        return eqx.filter_checkpoint(callable, policy=policy, prevent_cse=False)


PRODUCT = "product"  # what checkpointing policies call the output of a linear layer

# What the backward pass finds in memory, and what it costs to find the rest.
CHECKPOINT_POLICIES: dict[str, ScanCheckpointPolicy] = {
    "none": KeepActivations(),  # keeps everything: most memory
    # Keeps the outputs of linear layers and of attention: norms, rotations and activations are computed again.
    "products": ScanCheckpointPolicy(save_block_internals=[PRODUCT, LOW_RANK, ATTENDED]),
    "full": ScanCheckpointPolicy(simple=True),  # keeps each layer's input: one more forward pass
    "nested": ScanCheckpointPolicy(nested=True),  # keeps about sqrt(layers) inputs: two more forward passes
}


class Linear(hnn.Linear):
    """Without haliax's scaling by one, of which the backward pass would keep a copy as large as the weight.

    The weight is a NamedArray or a QuantizedWeight, which a product dequantizes.
    """

    weight: Any

    def __call__(self, inputs: NamedArray, *, key=None) -> NamedArray:
        del key
        if isinstance(self.weight, QuantizedWeight):
            product = quantized_product(inputs, self.weight)
        else:
            product = inputs.dot(self.weight, axis=self.In, dot_general=self.dot_general)
        out = hax.auto_sharded(product)
        return out if self.bias is None else hax.auto_sharded(out + self.bias)


def linear(In: AxisSpec, Out: AxisSpec, *, key, use_bias: bool, dot_general: Any = None) -> Linear:
    made = hnn.Linear.init(In, Out, key=key, use_bias=use_bias, dot_general=dot_general)
    return Linear(made.weight, made.bias, In, Out, dot_general=made.dot_general)


def product(linear: Any, x: NamedArray, *, key=None) -> NamedArray:
    """linear(x), under the name by which a checkpointing policy keeps it."""
    return hax.tree_checkpoint_name(linear(x, key=key), PRODUCT)


class KeyValueCache(eqx.Module):
    """Keys and values seen so far, {layers, row, key_position, kv_head, head_size}."""

    k: NamedArray
    v: NamedArray

    @staticmethod
    def empty(config: DecoderConfig, Row: Axis, slots: int, dtype) -> "KeyValueCache":
        axes = (config.Layers, Row, Axis(KEY_POSITION, slots), config.KVHeads, config.HeadSize)
        return KeyValueCache(hax.zeros(axes, dtype=dtype), hax.zeros(axes, dtype=dtype))

    def write(self, k: NamedArray, v: NamedArray, slot: jnp.ndarray) -> "KeyValueCache":
        """Puts keys and values {row, key_position, ...} at cache slots `slot`, `slot + 1`, ..."""
        start: Any = {KEY_POSITION: hax.named(slot, ())}
        return KeyValueCache(
            self.k.updated_slice(start, k.astype(self.k.dtype)),
            self.v.updated_slice(start, v.astype(self.v.dtype)),
        )


class Tokens(eqx.Module):
    """What every layer needs to know of the tokens passing through: angles {row, position, half_head}, who sees whom,
    and, while generating, the cache slot of the first token."""

    cos: NamedArray
    sin: NamedArray
    mask: AttentionMask
    slot: jnp.ndarray | None = None


class Attention(eqx.Module):
    """Grouped-query attention."""

    config: DecoderConfig = eqx.field(static=True)
    q_proj: hnn.Linear
    k_proj: hnn.Linear
    v_proj: hnn.Linear
    o_proj: hnn.Linear
    q_norm: hnn.RmsNorm | None
    k_norm: hnn.RmsNorm | None

    @staticmethod
    def init(config: DecoderConfig, *, key) -> "Attention":
        Embed, HeadSize = config.Embed, config.HeadSize
        Q, KV = (config.KVHeads, config.QHeadsPerGroup, HeadSize), (config.KVHeads, HeadSize)
        keys = jax.random.split(key, 4)
        norm = rms_norm(HeadSize, config) if config.qk_norm else None
        o_proj = linear(Q, Embed, key=keys[3], use_bias=config.attention_out_bias)
        # o_proj in the order that a TPU computes with: of any other, XLA would make a copy of all layers' weights.
        return Attention(
            config,
            q_proj=linear(Embed, Q, key=keys[0], use_bias=config.qkv_bias),
            k_proj=linear(Embed, KV, key=keys[1], use_bias=config.qkv_bias),
            v_proj=linear(Embed, KV, key=keys[2], use_bias=config.qkv_bias),
            o_proj=dataclasses.replace(o_proj, weight=o_proj.weight.rearrange((*Q[:-1], Embed, HeadSize))),
            q_norm=norm,
            k_norm=norm,
        )

    def __call__(self, x: NamedArray, tokens: Tokens, window, cache: KeyValueCache | None, *, key=None):
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
        attended = attend(q, k, v, tokens.mask, window, HeadSize, self.config.attention)
        return product(self.o_proj, attended, key=k_o), cache


class Mlp(eqx.Module):
    """down(activation(gate(x)) * up(x))."""

    activation: str = eqx.field(static=True)
    gate_proj: hnn.Linear
    up_proj: hnn.Linear
    down_proj: hnn.Linear

    @staticmethod
    def init(config: DecoderConfig, *, key) -> "Mlp":
        Embed, Inner, bias = config.Embed, config.Mlp, config.mlp_bias
        keys = jax.random.split(key, 3)
        return Mlp(
            config.activation,
            gate_proj=linear(Embed, Inner, key=keys[0], use_bias=bias),
            up_proj=linear(Embed, Inner, key=keys[1], use_bias=bias),
            down_proj=linear(Inner, Embed, key=keys[2], use_bias=bias),
        )

    def __call__(self, x: NamedArray, *, key=None) -> NamedArray:
        k_gate, k_up, k_down = split_key(key, 3)
        gate = ACTIVATIONS[self.activation](product(self.gate_proj, x, key=k_gate))
        return product(self.down_proj, gate * product(self.up_proj, x, key=k_up), key=k_down)


class DecoderLayer(eqx.Module):
    """x + attention(norm(x)), then + mlp(norm(.))."""

    input_layernorm: hnn.RmsNorm
    self_attn: Attention
    post_attention_layernorm: hnn.RmsNorm
    mlp: Mlp

    @staticmethod
    def init(config: DecoderConfig, *, key) -> "DecoderLayer":
        k_attention, k_mlp = jax.random.split(key)
        norm = rms_norm(config.Embed, config)
        return DecoderLayer(norm, Attention.init(config, key=k_attention), norm, Mlp.init(config, key=k_mlp))

    def __call__(self, x: NamedArray, tokens: Tokens, window, cache: KeyValueCache | None = None, *, key=None):
        k_attention, k_mlp = split_key(key, 2)
        attended, cache = self.self_attn(self.input_layernorm(x), tokens, window, cache, key=k_attention)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x), key=k_mlp), cache


class Decoder(eqx.Module):
    """Token ids to normalized hidden states."""

    config: DecoderConfig = eqx.field(static=True)
    embed_tokens: hnn.Embedding
    layers: hnn.Stacked[DecoderLayer]
    norm: hnn.RmsNorm

    @staticmethod
    def init(config: DecoderConfig, *, key) -> "Decoder":
        k_embed, k_layers = jax.random.split(key)
        policy = CHECKPOINT_POLICIES[config.gradient_checkpointing]
        stack = hnn.Stacked.init(config.Layers, DecoderLayer, gradient_checkpointing=policy)
        return Decoder(
            config,
            embed_tokens=hnn.Embedding.init(config.Vocab, config.Embed, key=k_embed),
            layers=stack(config, key=jax.random.split(k_layers, config.num_layers)),
            norm=rms_norm(config.Embed, config),
        )

    def __call__(
        self,
        token_ids: NamedArray,
        position_ids: NamedArray,
        mask: AttentionMask,
        *,
        cache: KeyValueCache | None = None,
        slot: jnp.ndarray | None = None,
        key=None,
    ) -> tuple[NamedArray, KeyValueCache | None]:
        """Ids and rotary positions {row, position} -> hidden states {row, position, embed} and the grown cache."""
        tokens, keys = self._tokens(position_ids, mask, slot), self._layer_keys(key)
        x = self.embed_tokens(token_ids)
        layers: Any = self.layers  # haliax's types leave out the further arguments of a folded function
        if cache is None:

            def forward(layer: DecoderLayer, x, tokens, window, key):
                return layer(x, tokens, window, key=key)[0]

            x = layers.fold_via(forward)(x, tokens, self._windows(), keys)
        else:

            def decode(layer: DecoderLayer, x, cache, tokens, window, key):
                return layer(x, tokens, window, cache, key=key)

            x, cache = layers.scan_via(decode)(x, cache, tokens, self._windows(), keys)
        return self.norm(x), cache

    def with_reference(
        self, adapters: Any, token_ids: NamedArray, position_ids: NamedArray, mask: AttentionMask, *, key=None
    ) -> tuple[NamedArray, NamedArray]:
        """Hidden states of this decoder and of `reference_model(self, adapters)`, layer by layer side by side."""

        def forward(layer: DecoderLayer, streams, tokens, window, key, adapters):
            x, reference = streams
            return layer(x, tokens, window, key=key)[0], reference_model(layer, adapters)(reference, tokens, window)[0]

        x = self.embed_tokens(token_ids)
        # As leaves, which the loop over layers can slice; a tree with holes for the weights it cannot.
        adapters = None if adapters is None else tuple(jax.tree.leaves(adapters))
        layers: Any = self.layers
        tokens, keys = self._tokens(position_ids, mask), self._layer_keys(key)
        x, reference = layers.fold_via(forward)((x, x), tokens, self._windows(), keys, adapters)
        return self.norm(x), self.norm(reference)

    def _tokens(self, position_ids: NamedArray, mask: AttentionMask, slot: jnp.ndarray | None = None) -> Tokens:
        cos, sin = rotary_angles(self.config.rope, position_ids, self.config.HeadSize)
        return Tokens(cos, sin, mask, slot)

    def _layer_keys(self, key: TokenKey | None) -> TokenKey | None:
        """A key for each layer, which the loop over layers takes one by one."""
        return None if key is None else TokenKey(jax.random.split(key.key, self.config.num_layers), key.token)

    def _windows(self) -> NamedArray | None:
        """int32 {layers}, a layer with full attention having a window that nothing exceeds; None if all are full."""
        windows = self.config.sliding_windows
        if windows is None:
            return None
        everything = jnp.iinfo(jnp.int32).max
        return hax.named(jnp.array([w or everything for w in windows], dtype=jnp.int32), self.config.Layers)


class CausalLM(eqx.Module):
    """A decoder with a language-model head; `lm_head` is None where the head is the embedding matrix."""

    model: Decoder
    lm_head: hnn.Linear | None

    @property
    def config(self) -> DecoderConfig:
        return self.model.config

    @property
    def head(self) -> hnn.Linear:
        """Maps hidden states {..., embed} to float32 logits {..., vocab}."""
        if self.lm_head is not None:
            return self.lm_head
        weight = self.model.embed_tokens.weight
        dot_general: Any = Float32Accumulation()
        return Linear(weight, None, self.config.Embed, self.config.Vocab, dot_general=dot_general)

    @staticmethod
    def init(config: DecoderConfig, *, key) -> "CausalLM":
        k_model, k_head = jax.random.split(key)
        head = None
        if not config.tie_word_embeddings:
            dot_general: Any = Float32Accumulation()
            head = linear(config.Embed, config.Vocab, key=k_head, use_bias=False, dot_general=dot_general)
        return CausalLM(Decoder.init(config, key=k_model), head)

    def __call__(self, token_ids: NamedArray, position_ids: NamedArray, mask: AttentionMask, *, key=None) -> NamedArray:
        """Float32 logits {row, position, vocab}: for tests and generation; training never builds this array."""
        hidden, _ = self.model(token_ids, position_ids, mask, key=key)
        return self.head(hidden)


class Float32Accumulation(eqx.Module):
    """A product of low-precision factors that keeps its float32 sums, as logits need.

    Its cotangent is rounded to the factors' dtype, so the backward product is a low-precision one as well.
    """

    def __call__(self, lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, **kwargs):
        del preferred_element_type

        def product(lhs, rhs, dtype):
            return jax.lax.dot_general(lhs, rhs, dimension_numbers, precision, dtype, **kwargs)

        @jax.custom_vjp
        def float32_product(lhs, rhs):
            return product(lhs, rhs, jnp.float32)

        def forward(lhs, rhs):
            return float32_product(lhs, rhs), (lhs, rhs)

        def backward(factors, cotangent):
            _, pullback = jax.vjp(functools.partial(product, dtype=None), *factors)
            return pullback(cotangent.astype(factors[0].dtype))

        float32_product.defvjp(forward, backward)
        return float32_product(lhs, rhs)


def rms_norm(axis: Axis, config: DecoderConfig) -> hnn.RmsNorm:
    """Computed in float32 whatever the dtype of its input."""
    return hnn.RmsNorm.init(axis, eps=config.rms_norm_eps, use_bias=False, dtype=jnp.float32)
