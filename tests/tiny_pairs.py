"""Tiny decoders of our own and random pairs, for tests that need no transformers. What is cached serves a session."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np

from lora_dpo_jax.data.examples import TokenizedExample
from lora_dpo_jax.data.memory import MemoryExamples
from lora_dpo_jax.data.mismatched import with_mismatched_answers
from lora_dpo_jax.data.packing import PreferenceBatch, pack
from lora_dpo_jax.data.shapes import PartShape, fill_rows
from lora_dpo_jax.data.table import ExampleTable, whole_table
from lora_dpo_jax.lora import LoraConfig, loraize, trainable_filter
from lora_dpo_jax.models import CausalLM, ComputeConfig, DecoderConfig, PackedMask

VOCAB = 97  # no other size below is a multiple of it, so that it is told apart in shapes
LLAMA = DecoderConfig(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=256,
)
# What the other families have: norms of queries and keys, biases, a tied head, windows in some layers alone.
QWEN = dataclasses.replace(
    LLAMA, head_dim=16, qk_norm="head", qkv_bias=True, tie_word_embeddings=True, sliding_windows=(None, 5)
)
CONFIGS = {
    "llama": LLAMA,
    "llama_remat": LLAMA,
    "llama_window": dataclasses.replace(LLAMA, sliding_windows=(5, 5)),
    "qwen": QWEN,
}
COMPUTE = {"llama_remat": ComputeConfig(gradient_checkpointing="full")}
# Dense attention is traced and compiled in half the time. Tests whose subject is attention ask for `auto`.
ATTENTION = "dense"
SOME_LAYERS = ["layers.1.self_attn.q_proj", "0.mlp.down_proj", "k_proj", "lm_head"]
ADAPTERS = {
    "everywhere": LoraConfig(r=4, alpha=8.0),  # but in the head
    "some layers and lm_head": LoraConfig(r=4, alpha=8.0, target_modules=SOME_LAYERS),
}


def tiny_decoder(name: str = "llama", attention: str = ATTENTION) -> CausalLM:
    """Float32. Norms and biases are random too, so that a forgotten one shows."""
    return jax.tree.unflatten(jax.tree.structure(_shapes(name, attention)), jax.tree.leaves(_decoder(name)))


def new_adapters(name: str = "llama", lora: str = "everywhere", attention: str = ATTENTION) -> CausalLM:
    """The tiny decoder after `loraize`. A train step takes the adapters for its own: give it `fresh` ones."""
    adapted = _new_adapters(name, lora)
    if attention == ATTENTION:
        return adapted
    # The same arrays, for a model that differs in nothing but how it is computed.
    shapes = eqx.filter_eval_shape(loraize, tiny_decoder(name, attention), ADAPTERS[lora], key=jax.random.key(2))
    return jax.tree.unflatten(jax.tree.structure(shapes), jax.tree.leaves(adapted))


def _shapes(name: str, attention: str = ATTENTION) -> CausalLM:
    compute = dataclasses.replace(COMPUTE.get(name, ComputeConfig()), attention=attention)
    return eqx.filter_eval_shape(CausalLM.init, CONFIGS[name], compute, key=jax.random.key(0))


@functools.cache
def _decoder(name: str) -> CausalLM:
    rng = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        is_norm = "norm" in jax.tree_util.keystr(path)
        return jnp.asarray(rng.normal(1.0 if is_norm else 0.0, 0.2, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, _shapes(name))


@functools.cache
def _new_adapters(name: str, lora: str) -> CausalLM:
    return loraize(_decoder(name), ADAPTERS[lora], key=jax.random.key(2))


def fresh(model: CausalLM) -> CausalLM:
    """The model with a copy of its adapters, and the same weights."""
    return _with_adapters(model, lambda leaf: leaf.copy())


def moved(model: CausalLM, *, seed: int = 3, size: float = 0.1) -> CausalLM:
    """The model with random adapters, as if it had been trained, and the same weights."""
    rng = np.random.default_rng(seed)
    return _with_adapters(model, lambda leaf: rng.normal(0, size, leaf.shape))


def _with_adapters(model: CausalLM, change: Callable[[np.ndarray], np.ndarray]) -> CausalLM:
    adapters, weights = eqx.partition(model, trainable_filter(model))
    adapters = jax.tree.map(lambda leaf: jnp.asarray(change(np.asarray(leaf)), leaf.dtype), adapters)
    return eqx.combine(adapters, weights)


def random_pairs(
    count: int, *, seed: int = 0, prompt: int = 9, response: int = 12, name: str = "memory"
) -> MemoryExamples:
    """Prompts of 1 to `prompt` tokens, responses of 1 to `response`."""
    rng = np.random.default_rng(seed)

    def tokens(longest: int) -> np.ndarray:
        return rng.integers(0, VOCAB, rng.integers(1, longest + 1)).astype(np.int32)

    pairs = [TokenizedExample.pair(tokens(prompt), tokens(response), tokens(response)) for _ in range(count)]
    return MemoryExamples(pairs, name=name)


def random_answers(count: int, *, seed: int = 0) -> ExampleTable:
    """Single answers with labels, each with the answer to another prompt."""
    rng = np.random.default_rng(seed)
    pairs = random_pairs(count, seed=seed)
    answers = [
        TokenizedExample(
            pair.prompt,
            pair.responses[:1],
            columns={"label": [float(rng.integers(2))], "example_weight": float(rng.uniform(0.5, 2))},
        )
        for pair in pairs
    ]
    return with_mismatched_answers(table_of(MemoryExamples(answers)), seed=seed, longest=32)


def table_of(pairs: MemoryExamples) -> ExampleTable:
    return whole_table({"pairs": pairs})


def lengths_of(pairs: ExampleTable) -> np.ndarray:
    """int [pair, 3]: tokens of prompt, chosen and rejected."""
    return np.column_stack([pairs.arrays.prompt_tokens, pairs.arrays.response_tokens.reshape(-1, 2)])


def packed(
    pairs: ExampleTable, layout: PartShape, rows: Sequence[Sequence[int]] | None = None, *, share_prefix: bool = True
) -> PreferenceBatch:
    """All examples as a batch with all columns, in the rows given or as tightly as can be."""
    if rows is None:
        rows = fill_rows(pairs.sizes.tokens.tolist(), layout.row_length)
    columns = {name: column.per_response for name, column in pairs.arrays.columns.items()}
    batch = pack(pairs, [np.array(row) for row in rows], layout, share_prefix=share_prefix, columns=columns)
    return jax.tree.map(jnp.asarray, batch)


@eqx.filter_jit
def response_log_probs(model: CausalLM, tokens: np.ndarray, is_response: np.ndarray) -> jax.Array:
    """float32 [sequence]: sums over the responses of plain sequences [sequence, position], from whole logits."""
    Row, Pos = hax.Axis("row", tokens.shape[0]), hax.Axis("position", tokens.shape[1])
    mask = PackedMask.causal(Row, Pos)
    logits = model(hax.named(tokens, (Row, Pos)), mask.position_ids, mask).array
    log_probs = jax.nn.log_softmax(logits[:, :-1])
    taken = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(is_response[:, 1:], taken, 0.0), axis=1)


def plain_sequences(pairs: Sequence[TokenizedExample]) -> tuple[np.ndarray, np.ndarray]:
    """[prompt + chosen] and [prompt + rejected] of each pair, padded to 32: (tokens, where the response is)."""
    tokens, is_response = np.zeros((2 * len(pairs), 32), np.int32), np.zeros((2 * len(pairs), 32), bool)
    for index, pair in enumerate(pairs):
        for branch, response in enumerate(pair.responses):
            whole = np.concatenate([pair.prompt, response])
            tokens[2 * index + branch, : len(whole)] = whole
            is_response[2 * index + branch, len(pair.prompt) : len(whole)] = True
    return tokens, is_response


def adapters_of(model: CausalLM) -> dict[str, np.ndarray]:
    """By path, copied to the host."""
    return _by_path(jax.tree.map(np.array, eqx.filter(model, trainable_filter(model))))


def weights_of(model: CausalLM) -> dict[str, Any]:
    """By path: the frozen arrays themselves."""
    return _by_path(eqx.filter(model, trainable_filter(model), inverse=True))


def _by_path(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(entry.name for entry in path if hasattr(entry, "name")): leaf for path, leaf in leaves}


def named(values: Any, *axes: str) -> hax.NamedArray:
    values = jnp.asarray(values)
    return hax.named(values, tuple(hax.Axis(name, size) for name, size in zip(axes, values.shape, strict=True)))


def intermediates(jaxpr: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(operation, shape) of everything that a jaxpr computes, in loops and calls too."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield equation.primitive.name, getattr(variable.aval, "shape", ())
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                yield from intermediates(getattr(inner, "jaxpr", inner))


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")
