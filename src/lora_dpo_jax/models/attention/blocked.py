"""Packed attention by blocks in plain XLA, for CPUs and other platforms without kernels of their own.

Rows and key-value heads are processed one after the other, so each product is a plain matrix product over all query
heads of a group. On a CPU, these products run several times faster than batched products.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lora_dpo_jax.models.attention.packed_blocks import MASKED, KeyRuns, pad_positions, visits
from lora_dpo_jax.models.attention.score_rule import ScoreRule


@dataclass(frozen=True)
class BlockedKernels:
    """`Kernels` for any platform. Rows are padded to a multiple of the block."""

    block: int = 64  # positions; on two CPU cores 64 was the fastest of 64 to 320

    def forward(self, q: Array, k: Array, v: Array, runs: KeyRuns, rule: ScoreRule) -> tuple[Array, Array]:
        cut = _Cut(self.block, q, runs, rule)
        out, log_normalizer = cut.over_heads(_head_forward, "query", cut.tiles(q), cut.tiles(k), cut.tiles(v))
        return cut.whole(out, q), cut.whole_numbers(log_normalizer)

    def backward(
        self,
        q: Array,
        k: Array,
        v: Array,
        runs: KeyRuns,
        rule: ScoreRule,
        log_normalizer: Array,
        inner: Array,
        d_out: Array,
    ) -> tuple[Array, Array, Array]:
        cut = _Cut(self.block, q, runs, rule)
        numbers = (cut.number_tiles(x) for x in (log_normalizer, inner))
        arrays = *(cut.tiles(x) for x in (q, k, v, d_out)), *numbers
        d_q, d_k, d_v = cut.over_heads(_head_backward, "key", *arrays)
        return cut.whole(d_q, q), cut.whole(d_k, k), cut.whole(d_v, v)


class _Cut:
    """How arrays are cut into tiles [row, kv_head, block, position in the block * group, head_size]."""

    def __init__(self, block: int, q: Array, runs: KeyRuns, rule: ScoreRule):
        self.rows, self.size, self.kv_heads, self.group, self.head_size = q.shape
        self.block, self.blocks = block, -(-self.size // block)
        self.length = self.block * self.blocks
        self.runs, self.rule = runs.padded(self.length), rule

    def over_heads(self, function: Callable, outer: str, *tiles: Array) -> Any:
        """Maps function(head, *its tiles) over rows and key-value heads."""
        todo = visits(self.runs, self.block, self.block, outer=outer)
        starts = todo.start[:-1].reshape(self.rows, self.blocks), todo.start[1:].reshape(self.rows, self.blocks)
        runs = jax.tree.map(lambda x: x.reshape(self.rows, self.blocks, self.block), self.runs)

        def row(of_row):
            (start, stop), runs, tiles = of_row

            def head(of_head):
                sinks, tiles = of_head
                return function(_Head(runs, start, stop, todo.inner, self.group, self.rule, sinks), *tiles)

            return jax.lax.map(head, (self.rule.sinks, tiles))

        return jax.lax.map(row, (starts, runs, tiles))

    def tiles(self, x: Array) -> Array:
        x = jnp.moveaxis(pad_positions(x, self.length), 2, 1)
        return x.reshape(self.rows, self.kv_heads, self.blocks, -1, self.head_size)

    def number_tiles(self, x: Array) -> Array:
        x = pad_positions(x, self.length, axis=3).swapaxes(2, 3)
        return x.reshape(self.rows, self.kv_heads, self.blocks, -1)

    def whole(self, tiles: Array, like: Array) -> Array:
        x = tiles.reshape(self.rows, self.kv_heads, self.length, *like.shape[3:])
        return jnp.moveaxis(x, 1, 2)[:, : self.size].astype(like.dtype)

    def whole_numbers(self, tiles: Array) -> Array:
        x = tiles.reshape(self.rows, self.kv_heads, self.length, self.group)
        return x.swapaxes(2, 3)[..., : self.size]


@dataclass(frozen=True)
class _Head:
    """The blocks of one row and key-value head: what each must visit, and the score rule."""

    runs: KeyRuns  # [block, position in the block]
    start: Array
    stop: Array
    inner: Array
    group: int
    rule: ScoreRule
    sinks: Array | None  # [head of the group]

    def visit(self, outer: Array, body: Callable[[Array, Any], Any], carry: Any) -> Any:
        """Folds body(inner block, carry) over the inner blocks that block `outer` visits."""
        bounds = self.start[outer], self.stop[outer]
        return jax.lax.fori_loop(*bounds, lambda n, carry: body(self.inner[n], carry), carry)

    def scores(self, q_i: Array, k_j: Array) -> Array:
        """Scores float32 [block * group, block] of a block of queries and a block of keys."""
        return self.rule.scores(_dot(q_i, k_j.T))

    def masked(self, scores: Array, i: Array, j: Array) -> Array:
        """The scores of query block `i` and key block `j`, but MASKED where a query does not see a key."""
        block = scores.shape[1]
        at = jnp.arange(block)
        runs = jax.tree.map(lambda x: x[i][:, None], self.runs)
        mask = runs.visible(i * block + at[:, None], j * block + at)
        mask = jnp.broadcast_to(mask[:, None], (block, self.group, block)).reshape(scores.shape)
        return jnp.where(mask, scores, MASKED)

    def begin(self, queries: int, head_size: int) -> tuple[Array, Array, Array]:
        """The initial state of a block's running softmax: highest score, sum of weights, weighted sum of values."""
        high, total = jnp.full(queries, MASKED), jnp.zeros(queries)
        if self.sinks is not None:
            high, total = jnp.tile(self.sinks, queries // self.group), jnp.ones(queries)
        return high, total, jnp.zeros((queries, head_size))


def _head_forward(head: _Head, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    def query_block(i):
        def key_block(j, carry):
            high, total, out = carry
            scores = head.masked(head.scores(q[i], k[j]), i, j)
            new_high = jnp.maximum(high, scores.max(axis=1))
            weights = jnp.exp(scores - new_high[:, None])
            shrink = jnp.exp(high - new_high)
            total = total * shrink + weights.sum(axis=1)
            return new_high, total, out * shrink[:, None] + _dot(weights.astype(v.dtype), v[j])

        high, total, out = head.visit(i, key_block, head.begin(*q.shape[1:]))
        return (out / total[:, None]).astype(q.dtype), high + jnp.log(total)

    return jax.lax.map(query_block, jnp.arange(q.shape[0]))


def _head_backward(head: _Head, q, k, v, d_out, log_normalizer, inner) -> tuple[Array, Array, Array]:
    def key_block(d_q, j):
        def query_block(i, carry):
            d_q, d_k, d_v = carry
            scores = head.scores(q[i], k[j])
            weights = jnp.exp(head.masked(scores, i, j) - log_normalizer[i][:, None])
            d_v = d_v + _dot(weights.astype(v.dtype).T, d_out[i])
            d_weights = _dot(d_out[i], v[j].T)
            d_scores = weights * (d_weights - inner[i][:, None])
            d_products = (head.rule.slope(d_scores, scores) * head.rule.scale).astype(q.dtype)
            d_k = d_k + _dot(d_products.T, q[i])
            return d_q.at[i].add(_dot(d_products, k[j])), d_k, d_v

        zeros = jnp.zeros(k.shape[1:])
        d_q, d_k, d_v = head.visit(j, query_block, (d_q, zeros, zeros))
        return d_q, (d_k, d_v)

    d_q, (d_k, d_v) = jax.lax.scan(key_block, jnp.zeros(q.shape), jnp.arange(k.shape[0]))
    return d_q, d_k, d_v


def _dot(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
