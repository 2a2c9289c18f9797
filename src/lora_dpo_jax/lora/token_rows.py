"""Rows of the embedding and of the head that are trained beside LoRA, for added tokens: PEFT's trainable tokens.

    before                          after with_token_rows

    embed_tokens: Embedding         embed_tokens: EmbeddingRows
                                      wrapped: Embedding        frozen, the same array
                                      rows       {trained_token, embed}   float32: in place of the weight's
                                      base_rows  {trained_token, embed}   the weight's own
    lm_head: Linear                 lm_head: HeadRows           likewise

If the embedding is the head, `EmbeddingRows.head` gives the head with the same rows. The whole matrix is never copied.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self, TypeVar

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
import jax.numpy as jnp
import numpy as np
from haliax import Axis, NamedArray

from lora_dpo_jax.axes import TRAINED_TOKEN
from lora_dpo_jax.lora.adapter import Adapter, ByLayer, Factor
from lora_dpo_jax.lora.config import EMBEDDING, HEAD, LoraConfig
from lora_dpo_jax.lora.targets import matching_names
from lora_dpo_jax.tensor_names import tensor_names

M = TypeVar("M")

ROWS = "token_adapter.trainable_tokens_delta"  # PEFT's name of the tensor, which holds the rows and no difference


class TokenRows(Adapter):
    """Some rows of a matrix {vocab, embed}, in place of its own. Their first values are the matrix's."""

    wrapped: Any
    rows: NamedArray  # {trained_token, embed}
    base_rows: NamedArray  # the same rows of the frozen matrix, in its dtype
    token_ids: tuple[int, ...] = eqx.field(static=True)
    scaling: ClassVar[float] = 1.0
    dropout: ClassVar[float] = 0.0
    by_layer: ClassVar[ByLayer | None] = None
    is_target: ClassVar[bool] = False
    part: ClassVar[str]  # the key of `LoraConfig.token_rows`

    @classmethod
    def init(cls, layer: Any, config: LoraConfig, by_layer: ByLayer | None, *, key) -> Self:
        del by_layer, key
        return cls.of(layer, config.token_rows(tied=False)[cls.part])

    @classmethod
    def of(cls, layer: Any, token_ids: tuple[int, ...]) -> Self:
        base_rows = _rows_of(layer, token_ids)
        # A copy: steps are given the rows for their own.
        rows = jax.tree.map(jnp.copy, base_rows.astype(jnp.float32))
        return cls(layer, rows, base_rows, token_ids)

    @property
    def factors(self) -> dict[str, Factor]:
        _, Embed = _sides(self.wrapped)
        return {ROWS: Factor(self.rows, ((TRAINED_TOKEN,), (Embed.name,)))}

    @property
    def constants(self) -> dict[str, NamedArray]:
        return {"base_rows": self.base_rows}

    @property
    def rank(self) -> int:
        return len(self.token_ids)

    @property
    def weight_shape(self) -> tuple[int, int]:
        Vocab, Embed = _sides(self.wrapped)
        return Vocab.size, Embed.size

    def merge(self, weight: Any, tensors: Mapping[str, Any], scaling: Any) -> Any:
        del scaling
        ids = np.asarray(self.token_ids)
        if isinstance(weight, jax.Array):
            return weight.at[ids].set(tensors[ROWS])
        weight = weight.copy()
        weight[ids] = tensors[ROWS]
        return weight

    def merged(self) -> Any:
        weight = self.wrapped.weight
        Vocab, Embed = _sides(self.wrapped)
        ordered = weight.rearrange((Vocab, Embed))
        rows = self.plain().rows.rearrange((TRAINED_TOKEN, Embed)).array.astype(weight.dtype)
        array = self.merge(ordered.array, {ROWS: rows}, self.scaling)
        total = hax.named(array, ordered.axes).rearrange(weight.axes)
        return eqx.tree_at(lambda layer: layer.weight, self.wrapped, total)

    def adds_nothing(self) -> jax.Array:
        return ~jnp.any(self.moved().array != 0)

    def plain(self) -> Self:
        """The rows in float32. Those that a narrow dtype holds have the weight's precision where they did not move."""
        return eqx.tree_at(lambda adapter: adapter.rows, self, self.values())

    def values(self) -> NamedArray:
        """The rows, float32 {trained_token, embed}. They equal the weight's to the bit until they move."""
        if jnp.promote_types(self.base_rows.dtype, self.rows.dtype) == self.rows.dtype:
            return self.rows.astype(jnp.float32)
        return self.base_rows.astype(jnp.float32) + self.moved()

    def moved(self) -> NamedArray:
        """float32 {trained_token, embed}: how far the rows are from the weight's."""
        return (self.rows - self.base_rows.astype(self.rows.dtype)).astype(jnp.float32)

    def with_factors(self, arrays: Mapping[str, NamedArray]) -> Self:
        return eqx.tree_at(lambda adapter: adapter.rows, self, arrays[ROWS])

    def with_dropout(self, rate: float) -> Self:
        del rate
        return self


class EmbeddingRows(TokenRows):
    """An embedding with some rows of its own."""

    wrapped: hnn.Embedding
    part: ClassVar[str] = EMBEDDING

    @property
    def flops_per_token(self) -> int:
        return 0

    def __call__(self, x: NamedArray, *, key=None) -> NamedArray:
        """Token ids {...} to embeddings {..., embed}."""
        del key
        order = np.argsort(self.token_ids)
        known = np.asarray(self.token_ids, np.int32)[order]
        place = jnp.minimum(jnp.searchsorted(jnp.asarray(known), x.array), len(known) - 1)
        is_trained = hax.named(jnp.asarray(known)[place] == x.array, x.axes)
        # Rounded after the lookup, so that gradients of a row are summed in float32.
        _, Embed = _sides(self.wrapped)
        table = self.values().rearrange((TRAINED_TOKEN, Embed)).array
        found = hax.named(table[jnp.asarray(order)[place]], (*x.axes, Embed))
        frozen = self.wrapped(x)
        return hax.auto_sharded(hax.where(is_trained, found.astype(frozen.dtype), frozen).rearrange(frozen.axes))

    def head(self, layer: hnn.Linear) -> "HeadRows":
        """The tied head, whose frozen part is `layer`, with the same rows."""
        return HeadRows(layer, self.rows, self.base_rows, self.token_ids)


class HeadRows(TokenRows):
    """A head with some rows of its own: logits of these tokens get a term for how far their rows moved."""

    wrapped: hnn.Linear
    part: ClassVar[str] = HEAD

    def __call__(self, x: NamedArray, *, key=None) -> NamedArray:
        """Hidden states {..., embed} to logits {..., vocab}."""
        del key
        Vocab, Embed = _sides(self.wrapped)
        frozen = self.wrapped(x)
        logits = frozen.rearrange((..., Vocab))
        # In float32, as are the gradients of the rows: there are few of them.
        added = x.astype(jnp.float32).dot(self.moved(), axis=Embed).rearrange((*logits.axes[:-1], TRAINED_TOKEN))
        ids = np.asarray(self.token_ids)
        array = logits.array.at[..., ids].add(added.array.astype(logits.dtype), unique_indices=True)
        return hax.auto_sharded(hax.named(array, logits.axes).rearrange(frozen.axes))


def with_token_rows(model: M, config: LoraConfig) -> M:
    """The model with the rows of `lora.trainable_token_indices`; the model itself if that is null.

    Raises ValueError if a matrix has no such row.
    """
    tied = getattr(model, HEAD, "absent") is None
    wanted = config.token_rows(tied=tied)

    def is_layer(node: Any) -> bool:
        return isinstance(node, Adapter | hnn.Embedding | hnn.Linear)

    def visit(path: tuple, node: Any) -> Any:
        if not is_layer(node):
            return node
        name = tensor_names(path, model)[0]
        part = name.rpartition(".")[2]
        if part not in wanted:
            return node
        if isinstance(node, Adapter):
            raise ValueError(f"{name} has an adapter already; merge_lora it, or leave one of the two out")
        kind = EmbeddingRows if isinstance(node, hnn.Embedding) else HeadRows
        _check_range(name, wanted[part], _sides(node)[0].size)
        return kind.of(node, wanted[part])

    return jax.tree_util.tree_map_with_path(visit, model, is_leaf=is_layer) if wanted else model


def check_token_rows(config: LoraConfig, *, tied: bool, vocab_size: int | None = None) -> None:
    """Raises ValueError unless new adapters can train the rows that `config` names.

    `tied`: the embedding of the model is its head. `vocab_size`: the number of rows, if it is known.
    """
    named = config.trainable_token_indices
    if isinstance(named, list) and not tied:
        raise ValueError(
            f"lora.trainable_token_indices={_brief(named)} is a list, and the head of this model is a matrix of its "
            f"own, whose rows would stay as they are: write {{{EMBEDDING}: [...], {HEAD}: [...]}} to train both, or "
            f"{{{EMBEDDING}: [...]}} for tokens that are only read"
        )
    rows = config.token_rows(tied=tied)
    if HEAD in rows and matching_names([HEAD], config):
        raise ValueError(
            f"lora.trainable_token_indices and lora.target_modules both name {HEAD}: leave it out of one of them"
        )
    for name, token_ids in rows.items():
        if vocab_size is not None:
            _check_range(name, token_ids, vocab_size)


def _check_range(name: str, token_ids: tuple[int, ...], count: int) -> None:
    if beyond := [token for token in token_ids if token >= count]:
        raise ValueError(
            f"lora.trainable_token_indices names {beyond[0]}, and {name} has the rows 0 to {count - 1}: enlarge the "
            "vocabulary of the base first (resize_token_embeddings in transformers)"
        )


def _brief(token_ids: list[int]) -> str:
    return repr(token_ids) if len(token_ids) <= 8 else f"[{', '.join(map(str, token_ids[:8]))}, ...]"


def _sides(layer: Any) -> tuple[Any, Any]:
    """The axes of the tokens and of the hidden states."""
    return (layer.Vocab, layer.Embed) if isinstance(layer, hnn.Embedding) else (layer.Out, layer.In)


@eqx.filter_jit
def _rows_of(layer: Any, token_ids: tuple[int, ...]) -> NamedArray:
    Vocab, Embed = _sides(layer)
    ids = np.asarray(token_ids)
    ordered = layer.weight.rearrange((Vocab, Embed)).array
    return hax.named(ordered[ids], (Axis(TRAINED_TOKEN, len(token_ids)), Embed))
