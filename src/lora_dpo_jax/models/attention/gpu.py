"""Packed attention on GPU: Pallas kernels for Triton that loop over the blocks to visit.

One program computes one block of queries or, for the gradients of keys and values, one block of keys. It loops over its
list of blocks to visit, which depends on the data. Kernels take whole arrays, which in Triton are only addresses.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lora_dpo_jax.models.attention.packed_blocks import LOG2_E, MASKED, KeyRuns, dot, pad_positions, visits
from lora_dpo_jax.models.attention.score_rule import ScoreRule


@dataclass(frozen=True)
class GpuKernels:
    """`Kernels` for GPU. Rows are padded to a multiple of the block, heads to a power of two."""

    block: int = 64  # positions, a power of two
    interpret: bool = False

    def forward(self, q: Array, k: Array, v: Array, runs: KeyRuns, rule: ScoreRule) -> tuple[Array, Array]:
        padded_q = self._pad(q)
        rows, length, kv_heads, group, _ = padded_q.shape
        results = (padded_q, jax.ShapeDtypeStruct((rows, kv_heads, group, length), jnp.float32))
        arrays = padded_q, self._pad(k), self._pad(v)
        if rule.sinks is not None:
            arrays = (*arrays, rule.sinks * LOG2_E)
        out, log_normalizer = self._call(_forward_kernel, "query", results, runs, rule, arrays)
        return _unpad(out, q), log_normalizer[..., : q.shape[1]]

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
        arrays = tuple(self._pad(x) for x in (q, k, v, d_out))
        length = arrays[0].shape[1]
        # In the order of q, which its sum leaves. For any other, XLA would turn over the saved outputs of all layers.
        inner = pad_positions(jnp.moveaxis(inner, -1, 1), length)
        arrays = *arrays, pad_positions(log_normalizer, length, axis=3), inner
        (d_q,) = self._call(_query_gradient_kernel, "query", arrays[:1], runs, rule, arrays)
        d_k, d_v = self._call(_key_gradient_kernel, "key", arrays[1:3], runs, rule, arrays)
        return _unpad(d_q, q), _unpad(d_k, k), _unpad(d_v, v)

    def _pad(self, x: Array) -> Array:
        x = pad_positions(x, pl.cdiv(x.shape[1], self.block) * self.block)
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pl.next_power_of_2(x.shape[-1]) - x.shape[-1])])

    def _call(self, kernel: Callable, outer: str, results: tuple, runs: KeyRuns, rule: ScoreRule, arrays: tuple) -> Any:
        """Runs a program for each (block, row, head), or (block, row, key-value head) if `outer` is "key"."""
        rows, length, kv_heads, group, _ = arrays[0].shape
        runs = runs.padded(length)
        todo = visits(runs, self.block, self.block, outer=outer)
        return pl.pallas_call(
            functools.partial(kernel, block=self.block, rule=dataclasses.replace(rule, window=None, sinks=None)),
            grid=(length // self.block, rows, kv_heads * group if outer == "query" else kv_heads),
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
            compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
            interpret=self.interpret,
            name=f"packed_attention{kernel.__name__}",
        )(todo.start, todo.inner, runs.own_start, runs.prompt_start, runs.prompt_stop, *arrays)


def _unpad(x: Array, like: Array) -> Array:
    return x[:, : like.shape[1], ..., : like.shape[-1]]


def _forward_kernel(start, inner, own, first, stop, q, k, v, *rest, block: int, rule: ScoreRule):
    *sinks, out, log_normalizer = rest
    row, kv_head, head = _of_query_program(q)
    queries = pl.ds(pl.program_id(0) * block, block)
    q_block = q[row, queries, kv_head, head, :]
    runs = _runs(own, first, stop, row, queries, axis=0)

    def visit(n, carry):
        high, total, attended = carry
        keys = pl.ds(inner[n] * block, block)
        scores = rule.scores(dot(q_block, k[row, keys, kv_head, :].T), LOG2_E)
        scores = _masked(scores, runs, queries, keys, query_axis=0)
        new_high = jnp.maximum(high, scores.max(axis=1))
        weights = jnp.exp2(scores - new_high[:, None])
        shrink = jnp.exp2(high - new_high)
        attended = attended * shrink[:, None] + dot(weights.astype(v.dtype), v[row, keys, kv_head, :])
        return new_high, total * shrink + weights.sum(axis=1), attended

    high, total = jnp.full((block,), MASKED), jnp.zeros((block,))
    if sinks:
        high, total = jnp.full((block,), sinks[0][kv_head, head]), jnp.ones((block,))
    begin = high, total, jnp.zeros(q_block.shape)
    high, total, attended = jax.lax.fori_loop(*_visits_of_program(start), visit, begin)
    out[row, queries, kv_head, head, :] = (attended / total[:, None]).astype(out.dtype)
    log_normalizer[row, kv_head, head, queries] = high + jnp.log2(total)


def _query_gradient_kernel(
    start, inner, own, first, stop, q, k, v, d_out, log_normalizer, inner_product, d_q, *, block: int, rule: ScoreRule
):
    row, kv_head, head = _of_query_program(q)
    queries = pl.ds(pl.program_id(0) * block, block)
    q_block, d_out_block = (x[row, queries, kv_head, head, :] for x in (q, d_out))
    normalizer = log_normalizer[row, kv_head, head, queries][:, None]
    product = inner_product[row, queries, kv_head, head][:, None]
    runs = _runs(own, first, stop, row, queries, axis=0)

    def visit(n, sum_q):
        keys = pl.ds(inner[n] * block, block)
        k_block = k[row, keys, kv_head, :]
        scores = rule.scores(dot(q_block, k_block.T), LOG2_E)
        weights = jnp.exp2(_masked(scores, runs, queries, keys, query_axis=0) - normalizer)
        d_scores = weights * (dot(d_out_block, v[row, keys, kv_head, :].T) - product)
        return sum_q + dot(rule.slope(d_scores, scores, LOG2_E).astype(q.dtype), k_block)

    sum_q = jax.lax.fori_loop(*_visits_of_program(start), visit, jnp.zeros(q_block.shape))
    d_q[row, queries, kv_head, head, :] = (sum_q * rule.scale).astype(d_q.dtype)


def _key_gradient_kernel(
    start,
    inner,
    own,
    first,
    stop,
    q,
    k,
    v,
    d_out,
    log_normalizer,
    inner_product,
    d_k,
    d_v,
    *,
    block: int,
    rule: ScoreRule,
):
    row, kv_head = pl.program_id(1), pl.program_id(2)
    keys = pl.ds(pl.program_id(0) * block, block)
    k_block, v_block = (x[row, keys, kv_head, :] for x in (k, v))
    todo = _visits_of_program(start)

    def of_head(head, carry):
        def visit(n, carry):
            sum_k, sum_v = carry
            queries = pl.ds(inner[n] * block, block)
            q_block, d_out_block = (x[row, queries, kv_head, head, :] for x in (q, d_out))
            normalizer = log_normalizer[row, kv_head, head, queries][None]
            product = inner_product[row, queries, kv_head, head][None]
            # Scores are [key, query], so that the products below need no transpose.
            scores = rule.scores(dot(k_block, q_block.T), LOG2_E)
            runs = _runs(own, first, stop, row, queries, axis=1)
            weights = jnp.exp2(_masked(scores, runs, queries, keys, query_axis=1) - normalizer)
            d_scores = weights * (dot(v_block, d_out_block.T) - product)
            sum_v += dot(weights.astype(d_out.dtype), d_out_block)
            return sum_k + dot(rule.slope(d_scores, scores, LOG2_E).astype(q.dtype), q_block), sum_v

        return jax.lax.fori_loop(*todo, visit, carry)

    sum_k, sum_v = jax.lax.fori_loop(0, q.shape[3], of_head, (jnp.zeros(k_block.shape), jnp.zeros(v_block.shape)))
    d_k[row, keys, kv_head, :] = (sum_k * rule.scale).astype(d_k.dtype)
    d_v[row, keys, kv_head, :] = sum_v.astype(d_v.dtype)


def _of_query_program(q: Any) -> tuple[Array, Array, Array]:
    """(row, key-value head, head of its group) of this program."""
    head, group = pl.program_id(2), q.shape[3]
    return pl.program_id(1), jax.lax.div(head, group), jax.lax.rem(head, group)


def _visits_of_program(start: Any) -> tuple[Array, Array]:
    outer = pl.program_id(1) * pl.num_programs(0) + pl.program_id(0)
    return start[outer], start[outer + 1]


def _runs(own: Any, first: Any, stop: Any, row: Array, queries: Any, axis: int) -> KeyRuns:
    """The runs of a block of queries, which lie along `axis` of the scores."""
    return KeyRuns(*(jnp.expand_dims(x[row, queries], 1 - axis) for x in (own, first, stop)))


def _masked(scores: Array, runs: KeyRuns, queries: Any, keys: Any, query_axis: int) -> Array:
    query = queries.start + jax.lax.broadcasted_iota(jnp.int32, scores.shape, query_axis)
    key = keys.start + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1 - query_axis)
    return jnp.where(runs.visible(query, key), scores, MASKED)
