"""The decoder: embeddings, layers, a final norm and a head. Modules are named as in Hugging Face."""

import functools
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
import jax.numpy as jnp
import numpy as np
from haliax import Axis, NamedArray

from lora_dpo_jax.axes import LAYERS
from lora_dpo_jax.lora import EmbeddingRows, TokenKey, reference_model, unwrapped
from lora_dpo_jax.models.attention import AttentionMask
from lora_dpo_jax.models.compute import DEFAULT_COMPUTE, ComputeConfig
from lora_dpo_jax.models.config import DecoderConfig
from lora_dpo_jax.models.head import Head
from lora_dpo_jax.models.kv_cache import KeyValueCache
from lora_dpo_jax.models.layers import Auxiliary, DecoderLayer, TokenContext
from lora_dpo_jax.models.linear import Float32Accumulation, Linear, inputs_first, linear
from lora_dpo_jax.models.norms import norm
from lora_dpo_jax.models.quantization import QuantizedWeight
from lora_dpo_jax.models.rope import rotary_angles
from lora_dpo_jax.models.stack import LayerStack, arranged
from lora_dpo_jax.platforms import platform

Cache = Any  # KeyValueCaches, or PackedKeys, in the structure of `own` in LayerStack.scan


class DecoderOutput(eqx.Module):
    """The output of one pass through the layers."""

    hidden: NamedArray  # {row, position, embed}, normalized
    auxiliary: Auxiliary
    cache: Cache = None


class Decoder(eqx.Module):
    """Maps token ids to normalized hidden states."""

    config: DecoderConfig = eqx.field(static=True)
    embed_tokens: Any  # an Embedding, or EmbeddingRows
    layers: LayerStack
    norm: hnn.RmsNorm

    @staticmethod
    def init(config: DecoderConfig, compute: ComputeConfig = DEFAULT_COMPUTE, *, key) -> "Decoder":
        k_embed, k_layers = jax.random.split(key)
        make_layer = functools.partial(DecoderLayer.init, config, compute)
        return Decoder(
            config,
            embed_tokens=hnn.Embedding.init(config.Vocab, config.Embed, key=k_embed),
            layers=LayerStack.init(make_layer, config.layers, compute, key=k_layers),
            norm=norm(config.norm, config.Embed, config.norm_eps),
        )

    def __call__(
        self,
        token_ids: NamedArray,
        position_ids: NamedArray,
        mask: AttentionMask,
        *,
        cache: Cache = None,
        slot: jnp.ndarray | None = None,
        keeps_keys: bool = False,
        key: TokenKey | None = None,
    ) -> DecoderOutput:
        """Ids and rotary positions are {row, position}. With a cache, `slot` is the cache slot of the first token.

        With `keeps_keys` instead, the output's cache is the `PackedKeys` of these tokens.
        """

        def forward(layer: DecoderLayer, x, tokens, key, cache):
            output = layer(x, tokens, cache, key=key)
            return output.x, (output.cache, output.auxiliary)

        tokens = self._context(position_ids, mask, slot, keeps_keys)
        x, outputs = self.layers.scan(forward, self.embed(token_ids), tokens, keys=key, own=cache)
        caches, auxiliary = _unzipped(outputs)
        return DecoderOutput(self.norm(x), _summed(auxiliary), caches if keeps_keys or cache is not None else None)

    def with_reference(
        self,
        adapters: Any,
        token_ids: NamedArray,
        position_ids: NamedArray,
        mask: AttentionMask,
        *,
        key: TokenKey | None = None,
    ) -> tuple[DecoderOutput, NamedArray]:
        """This decoder's output, and the hidden states of `reference_model(self, adapters)`.

        Each layer computes both before the next layer begins.
        """

        def forward(layer: DecoderLayer, streams, tokens, key, adapters):
            x, reference = streams
            output = layer(x, tokens, key=key)
            return (output.x, reference_model(layer, adapters)(reference, tokens).x), output.auxiliary

        x = self.embed(token_ids)
        reference = x
        if isinstance(self.embed_tokens, EmbeddingRows):
            frozen = None if adapters is None else adapters.embed_tokens
            reference = self._scaled(reference_model(self.embed_tokens, frozen)(token_ids))
        own = None
        if adapters is not None:
            # As leaves: a scan can slice these, but not a tree with None in place of the weights.
            own = adapters.layers.of_layers(lambda _, layer: tuple(jax.tree.leaves(layer)))
        tokens = self._context(position_ids, mask)
        (x, reference), auxiliary = self.layers.scan(forward, (x, reference), tokens, keys=key, own=own)
        return DecoderOutput(self.norm(x), _summed(auxiliary)), self.norm(reference)

    def embed(self, token_ids: NamedArray) -> NamedArray:
        """{row, position} -> {row, position, embed}"""
        return self._scaled(self.embed_tokens(token_ids))

    def _scaled(self, embeddings: NamedArray) -> NamedArray:
        # The scale is rounded to the dtype of the embeddings, as Gemma's is in transformers.
        return embeddings * self.config.embedding_scale

    @property
    def cache_dtype(self) -> Any:
        return unwrapped(self.embed_tokens).weight.dtype

    def empty_cache(self, Row: Axis, slots: int) -> Cache:
        def empty(stack: tuple[Axis, ...], _: Any) -> KeyValueCache:
            return KeyValueCache.empty(self.config, stack, Row, slots, self.cache_dtype)

        return self.layers.of_layers(empty)

    def _context(
        self,
        position_ids: NamedArray,
        mask: AttentionMask,
        slot: jnp.ndarray | None = None,
        keeps_keys: bool = False,
    ) -> TokenContext:
        ropes = self.config.ropes
        lengths = mask.sequence_lengths() if any(rope.depends_on_length for rope in ropes) else None
        angles = tuple(rotary_angles(rope, position_ids, lengths, self.config.HeadSize) for rope in ropes)
        return TokenContext(angles, mask, slot, keeps_keys)


class CausalLM(eqx.Module):
    """A decoder with a language-model head; `lm_head` is None if the embedding matrix is the head."""

    model: Decoder
    lm_head: hnn.Linear | None

    @property
    def config(self) -> DecoderConfig:
        return self.model.config

    @property
    def tensor_parts(self) -> Mapping[str, str]:
        """See `tensor_names.Renamed`: names are those of the modules in transformers 5, and so PEFT's."""
        return {"model": "model.language_model"} if self.config.has_wrapper else {}

    @property
    def head(self) -> Head:
        layer = self.lm_head
        if layer is None:
            embedding, dot_general = self.model.embed_tokens, Float32Accumulation()
            weight = unwrapped(embedding).weight
            layer = Linear(weight, None, self.config.Embed, self.config.Vocab, dot_general=dot_general)  # pyright: ignore
            layer = embedding.head(layer) if isinstance(embedding, EmbeddingRows) else layer
        return Head(layer, self.config.logit_scale, self.config.logit_softcap)

    def for_decoding(self) -> "CausalLM":
        """The same model, arranged for products with few tokens.

        On one CPU this copies the weights: a product with few tokens is faster with the inputs first, and a loop over
        layers would copy each weight in each turn. Elsewhere, and if weights are quantized, it is this model.
        """
        arrays = (leaf for leaf in jax.tree.leaves(self) if isinstance(leaf, jax.Array))
        is_split = any(len(array.sharding.device_set) > 1 for array in arrays)
        is_quantized = any(isinstance(leaf, QuantizedWeight) for leaf in jax.tree.leaves(self, is_leaf=_is_quantized))
        if platform() != "cpu" or is_split or is_quantized:
            return self
        head = self.lm_head
        if head is None and not isinstance(self.model.embed_tokens, EmbeddingRows):
            head = self.head.linear
        # In NumPy's memory, where a slice or another order of axes is a view, and no program is compiled.
        views = jax.tree.map(lambda leaf: np.asarray(leaf) if eqx.is_array(leaf) else leaf, CausalLM(self.model, head))
        views = eqx.tree_at(lambda model: model.model.layers, views, views.model.layers.unrolled())
        arranged = jax.tree.map(inputs_first, views, is_leaf=lambda node: isinstance(node, Linear))
        return jax.tree.map(lambda leaf: jax.device_put(leaf) if eqx.is_array(leaf) else leaf, arranged)

    @staticmethod
    def init(config: DecoderConfig, compute: ComputeConfig = DEFAULT_COMPUTE, *, key) -> "CausalLM":
        k_model, k_head = jax.random.split(key)
        head = None
        if not config.tie_word_embeddings:
            dot_general: Any = Float32Accumulation()
            head = linear(config.Embed, config.Vocab, key=k_head, use_bias=False, dot_general=dot_general)
        return CausalLM(Decoder.init(config, compute, key=k_model), head)

    def __call__(self, token_ids: NamedArray, position_ids: NamedArray, mask: AttentionMask, *, key=None) -> NamedArray:
        """Float32 logits {row, position, vocab}, for tests: training and generation never build this array."""
        return self.head(self.model(token_ids, position_ids, mask, key=key).hidden)


def admitted(cache: Cache, new: Cache, source: NamedArray, is_new: NamedArray) -> Cache:
    """`KeyValueCache.admit` for all layers: `cache` is that of a model `for_decoding`, `new` that of the model."""
    return tuple(
        tuple(old.admit(keys, source, is_new) for old, keys in zip(*of_segment, strict=True))
        for of_segment in zip(cache, arranged(new, cache), strict=True)
    )


def _is_quantized(node: Any) -> bool:
    return isinstance(node, QuantizedWeight)


def _unzipped(outputs: list) -> tuple[Any, Any]:
    """Separates the two members of the pairs of each layer of each segment's period."""
    return tuple(tuple(tuple(pair[i] for pair in segment) for segment in outputs) for i in range(2))  # pyright: ignore


def _summed(auxiliary: Any) -> Auxiliary:
    """The sum over layers of auxiliary values {layers, row}, or {row}, from each layer of each segment's period."""
    total: dict[str, NamedArray] = {}
    for of_layer in (of_layer for segment in auxiliary for of_layer in segment):
        for name, values in of_layer.items():
            summed = hax.sum(values, axis=LAYERS) if values.has_axis(LAYERS) else values
            total[name] = total[name] + summed if name in total else summed
    return total
