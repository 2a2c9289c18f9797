"""Packed attention on TPU: Pallas kernels whose grid is the list of blocks to visit.

The grid is as long as the list, which depends on the data. A block that no query sees therefore costs nothing and is
not even fetched. Scores are transposed, [key, query]: values per query are then a row of lanes, and the softmax reduces
over sublanes, which is the cheap direction.
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
from jax.experimental.pallas import tpu as pltpu

from lora_dpo_jax.models.attention.packed_blocks import LOG2_E, MASKED, KeyRuns, Visits, dot, pad_positions, visits
from lora_dpo_jax.models.attention.score_rule import ScoreRule

LANES = 128


@dataclass(frozen=True)
class TpuKernels:
    """`Kernels` for TPU. Rows are padded to a multiple of the block."""

    largest_block: int = 512  # positions, a multiple of 128; every visit costs about 0.35 us, whatever its size
    interpret: bool = False

    def forward(self, q: Array, k: Array, v: Array, runs: KeyRuns, rule: ScoreRule) -> tuple[Array, Array]:
        rows, length, kv_heads, group, _ = q.shape
        tiles = _Tiles(self, q, k, runs, rule, outer="query")
        sinks = [] if rule.sinks is None else [tiles.of_heads(rule.sinks * LOG2_E)]
        call = tiles.call(
            functools.partial(_forward_kernel, blocks=tiles.blocks, rule=tiles.rule),
            grid=(tiles.heads, tiles.total),
            inputs=(
                tiles.query,
                tiles.key,
                tiles.key,
                tiles.per_query(3, of_head=False),
                *[tiles.per_head] * len(sinks),
            ),
            outputs=(tiles.query, tiles.per_query(1)),
            shapes=(tiles.query_shape(q.dtype), tiles.per_query_shape(1)),
            scratch=((1, tiles.block), (1, tiles.block), (tiles.head_size, tiles.block)),
        )
        out, log_normalizer = call(tiles.to_heads(q), tiles.to_heads(k), tiles.to_heads(v), tiles.runs, *sinks)
        return tiles.from_heads(out, q), log_normalizer[:, :, 0, :length].reshape(rows, kv_heads, group, length)

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
        by_query, by_key = (_Tiles(self, q, k, runs, rule, outer=outer) for outer in ("query", "key"))
        stats = jnp.stack([x.reshape(x.shape[0], -1, x.shape[3]) for x in (log_normalizer, inner)], axis=2)
        stats = pad_positions(stats, by_query.length, axis=3)
        arrays = (*map(by_query.to_heads, (q, k, v)), by_query.runs, by_query.to_heads(d_out), stats)

        def call(tiles, kernel, grid, outputs, shapes, scratch):
            inputs = (tiles.query, tiles.key, tiles.key, tiles.per_query(3, of_head=False), tiles.query)
            inputs = (*inputs, tiles.per_query(2))
            kernel = functools.partial(kernel, blocks=tiles.blocks, rule=tiles.rule)
            return tiles.call(kernel, grid, inputs, outputs, shapes, scratch)(*arrays)

        (d_q,) = call(
            by_query,
            _query_gradient_kernel,
            grid=(by_query.heads, by_query.total),
            outputs=(by_query.query,),
            shapes=(by_query.query_shape(q.dtype),),
            scratch=((by_query.head_size, by_query.block),),
        )
        d_k, d_v = call(
            by_key,
            _key_gradient_kernel,
            grid=(by_key.kv_heads, by_key.total, by_key.group),
            outputs=(by_key.key, by_key.key),
            shapes=(by_key.key_shape(k.dtype), by_key.key_shape(v.dtype)),
            scratch=((by_key.block, by_key.head_size), (by_key.block, by_key.head_size)),
        )
        return by_query.from_heads(d_q, q), by_key.from_heads(d_k, k), by_key.from_heads(d_v, v)


class _Tiles:
    """How arrays are cut for one grid: (head, visit), or (key-value head, visit, head of its group)."""

    def __init__(self, kernels: TpuKernels, q: Array, k: Array, runs: KeyRuns, rule: ScoreRule, *, outer: str):
        self.rows, size, self.kv_heads, self.group, self.head_size = q.shape
        self.heads = self.kv_heads * self.group
        self.rule = dataclasses.replace(rule, window=None, sinks=None)  # kernels cannot close over arrays
        # As many blocks as `largest_block` requires, each as small as this number of blocks allows.
        blocks = -(-size // kernels.largest_block)
        unit = min(LANES, kernels.largest_block)
        self.block = -(-size // (blocks * unit)) * unit
        self.blocks, self.length = blocks, blocks * self.block
        self.interpret = kernels.interpret
        runs = runs.padded(self.length)
        self.runs = jnp.stack([runs.own_start, runs.prompt_start, runs.prompt_stop], axis=1)
        self.visits: Visits = visits(runs, self.block, self.block, outer=outer)
        self.total = self.visits.start[-1]
        self.outer_is_query = outer == "query"

    def call(self, kernel, grid, inputs, outputs, shapes, scratch):
        # Cores may share the heads; visits must run in order.
        semantics = "parallel", "arbitrary", "arbitrary"
        call = pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3,
                grid=grid,
                in_specs=inputs,
                out_specs=outputs,
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            out_shape=shapes,
            compiler_params=pltpu.CompilerParams(dimension_semantics=semantics[: len(grid)]),
            interpret=self.interpret,
            name=kernel.func.__name__.strip("_"),
        )
        return functools.partial(call, self.visits.outer, self.visits.inner, self.visits.masked)

    def _place(self, grid_indices: tuple) -> tuple:
        """(row, head, key-value head, query block, key block) of a step of the grid."""
        *program, outer, inner, _ = grid_indices
        if len(program) == 2:
            head, kv_head = program[0], jax.lax.div(program[0], self.group)
        else:
            head, kv_head = program[0] * self.group + program[2], program[0]
        outer, inner = outer[program[1]], inner[program[1]]
        row, outer = jax.lax.div(outer, self.blocks), jax.lax.rem(outer, self.blocks)
        return (row, head, kv_head, outer, inner) if self.outer_is_query else (row, head, kv_head, inner, outer)

    @property
    def query(self) -> pl.BlockSpec:
        def place(*indices):
            row, head, _, query, _ = self._place(indices)
            return row, head, query, 0

        return pl.BlockSpec((None, None, self.block, self.head_size), place)

    @property
    def key(self) -> pl.BlockSpec:
        def place(*indices):
            row, _, kv_head, _, key = self._place(indices)
            return row, kv_head, key, 0

        return pl.BlockSpec((None, None, self.block, self.head_size), place)

    def per_query(self, count: int, of_head: bool = True) -> pl.BlockSpec:
        """The block of an array with `count` numbers for each query, for each head or for all heads together."""

        def place(*indices):
            row, head, _, query, _ = self._place(indices)
            return (row, head, 0, query) if of_head else (row, 0, query)

        block: Any = (None, None, count, self.block) if of_head else (None, count, self.block)
        return pl.BlockSpec(block, place)

    @property
    def per_head(self) -> pl.BlockSpec:
        """The block of a result of `of_heads`."""
        return pl.BlockSpec((None, 1, self.block), lambda *indices: (self._place(indices)[1], 0, 0))

    def of_heads(self, x: Array) -> Array:
        """[kv_head, group] -> [heads, 1, block]: repeats a head's number for each query of a block."""
        return jnp.broadcast_to(x.reshape(self.heads, 1, 1), (self.heads, 1, self.block))

    def query_shape(self, dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.rows, self.heads, self.length, self.head_size), dtype)

    def key_shape(self, dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.rows, self.kv_heads, self.length, self.head_size), dtype)

    def per_query_shape(self, count: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.rows, self.heads, count, self.length), jnp.float32)

    def to_heads(self, x: Array) -> Array:
        """[row, position, ..., head_size] -> [row, heads, padded position, head_size]."""
        x = x.reshape(x.shape[0], x.shape[1], -1, x.shape[-1]).swapaxes(1, 2)
        return pad_positions(x, self.length, axis=2)

    def from_heads(self, x: Array, like: Array) -> Array:
        return x.swapaxes(1, 2)[:, : like.shape[1]].reshape(like.shape)


def _forward_kernel(outer, inner, masked, q, k, v, runs, *rest, blocks: int, rule: ScoreRule):
    *sinks, out, log_normalizer, high, total, attended = rest
    visit = pl.program_id(1)

    @pl.when(_is_first(outer, visit))
    def _():
        high[...] = sinks[0][...] if sinks else jnp.full_like(high, MASKED)
        total[...] = jnp.ones_like(total) if sinks else jnp.zeros_like(total)
        attended[...] = jnp.zeros_like(attended)

    def accumulate(with_mask):
        scores = rule.scores(dot(k[...], q[...], (1, 1)), LOG2_E)
        if with_mask:
            scores = _mask(scores, runs, query_block=jax.lax.rem(outer[visit], blocks), key_block=inner[visit])
        new_high = jnp.maximum(high[...], scores.max(axis=0, keepdims=True))
        weights = jnp.exp2(scores - new_high)
        shrink = jnp.exp2(high[...] - new_high)
        high[...] = new_high
        total[...] = total[...] * shrink + weights.sum(axis=0, keepdims=True)
        attended[...] = attended[...] * shrink + dot(v[...], weights.astype(v.dtype), (0, 0))

    _with_or_without_mask(masked[visit], accumulate)

    @pl.when(_is_last(outer, visit))
    def _():
        out[...] = (attended[...] / total[...]).T.astype(out.dtype)
        log_normalizer[...] = high[...] + jnp.log2(total[...])


def _query_gradient_kernel(
    outer, inner, masked, q, k, v, runs, d_out, stats, d_q, sum_q, *, blocks: int, rule: ScoreRule
):
    visit = pl.program_id(1)

    @pl.when(_is_first(outer, visit))
    def _():
        sum_q[...] = jnp.zeros_like(sum_q)

    def accumulate(with_mask):
        place = dict(query_block=jax.lax.rem(outer[visit], blocks), key_block=inner[visit]) if with_mask else None
        _, d_products = _gradient_of_products(q, k, v, runs, d_out, stats, rule, place)
        sum_q[...] += dot(k[...], d_products, (0, 0))

    _with_or_without_mask(masked[visit], accumulate)

    @pl.when(_is_last(outer, visit))
    def _():
        d_q[...] = (sum_q[...] * rule.scale).T.astype(d_q.dtype)


def _key_gradient_kernel(
    outer, inner, masked, q, k, v, runs, d_out, stats, d_k, d_v, sum_k, sum_v, *, blocks: int, rule: ScoreRule
):
    visit, head = pl.program_id(1), pl.program_id(2)

    @pl.when(_is_first(outer, visit) & (head == 0))
    def _():
        sum_k[...] = jnp.zeros_like(sum_k)
        sum_v[...] = jnp.zeros_like(sum_v)

    def accumulate(with_mask):
        place = dict(query_block=inner[visit], key_block=jax.lax.rem(outer[visit], blocks)) if with_mask else None
        weights, d_products = _gradient_of_products(q, k, v, runs, d_out, stats, rule, place)
        sum_v[...] += dot(weights, d_out[...])
        sum_k[...] += dot(d_products, q[...])

    _with_or_without_mask(masked[visit], accumulate)

    @pl.when(_is_last(outer, visit) & (head == pl.num_programs(2) - 1))
    def _():
        d_k[...] = (sum_k[...] * rule.scale).astype(d_k.dtype)
        d_v[...] = sum_v[...].astype(d_v.dtype)


def _gradient_of_products(q, k, v, runs, d_out, stats, rule: ScoreRule, place: dict[str, Array] | None):
    """Attention weights and the gradient of the scaled products, [key, query], in the dtypes of `d_out` and `q`."""
    scores = rule.scores(dot(k[...], q[...], (1, 1)), LOG2_E)
    masked = scores if place is None else _mask(scores, runs, **place)
    log_normalizer, inner_product = stats[0:1, :], stats[1:2, :]
    weights = jnp.exp2(masked - log_normalizer)
    d_scores = weights * (dot(v[...], d_out[...], (1, 1)) - inner_product)
    return weights.astype(d_out.dtype), rule.slope(d_scores, scores, LOG2_E).astype(q.dtype)


def _mask(scores: Array, runs: Any, query_block: Array, key_block: Array) -> Array:
    keys, queries = scores.shape
    key = key_block * keys + jax.lax.broadcasted_iota(jnp.int32, (keys, queries), 0)
    query = query_block * queries + jax.lax.broadcasted_iota(jnp.int32, (1, queries), 1)
    return jnp.where(KeyRuns(runs[0:1, :], runs[1:2, :], runs[2:3, :]).visible(query, key), scores, MASKED)


def _with_or_without_mask(masked: Array, accumulate: Callable[[bool], None]) -> None:
    """Masks only where needed: most blocks of long examples are fully visible, and a mask costs as much as softmax."""
    pl.when(masked == 1)(lambda: accumulate(True))
    pl.when(masked == 0)(lambda: accumulate(False))


def _is_first(outer: Any, visit: Array) -> Array:
    return (visit == 0) | (outer[jnp.maximum(visit - 1, 0)] != outer[visit])


def _is_last(outer: Any, visit: Array) -> Array:
    return outer[visit + 1] != outer[visit]
