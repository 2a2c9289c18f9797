"""Packed attention by blocks: memory linear in the row's length, and blocks that nobody may see are not computed.

Softmax is accumulated over key blocks (https://arxiv.org/abs/2205.14135) and the backward pass computes scores again
from the saved log-normalizers (https://arxiv.org/abs/2307.08691). Rows and key-value heads are taken one after the
other, so that each product is a plain matrix product with all query heads of a group in it: on a CPU these run several
times faster than batched ones.
"""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

MASKED = -1e30  # finite, so that a query that sees nothing yields numbers


class TokenIds(eqx.Module):
    """What decides who sees whom: int32 arrays [position] of one row (or [row, position])."""

    segment: Array  # 0 = padding
    branch: Array
    position: Array

    def blocks(self, size: int) -> "TokenIds":
        return jax.tree.map(lambda x: x.reshape(-1, size), self)


def blocked_attention(q: Array, k: Array, v: Array, ids: TokenIds, window: Array | None, *, block: int) -> Array:
    """Attention of packed rows, scaled by head_size ** -0.5.

    q [row, position, kv_head, group, head_size]; k, v [row, position, kv_head, head_size]; ids [row, position];
    `window` (tokens, scalar) or None. Returns q's shape. `block` must divide the row's length.
    """
    window = jnp.asarray(jnp.iinfo(jnp.int32).max if window is None else window)

    def row(arrays):
        q, k, v, ids = arrays
        heads = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v))
        out = jax.lax.map(lambda head: _head(*head, ids, window, block), heads)
        return jnp.moveaxis(out, 0, 1)

    return jax.lax.map(row, (q, k, v, ids))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _head(q: Array, k: Array, v: Array, ids: TokenIds, window: Array, block: int) -> Array:
    """One key-value head of one row: q [position, group, head_size]; k, v [position, head_size]."""
    return _head_forward(q, k, v, ids, window, block)[0]


def _head_forward(q, k, v, ids, window, block):
    tiles = _Tiles(q, k, v, ids, window, block)

    def query_block(i):
        q_i = tiles.q[i]

        def key_block(j, carry):
            def accumulate(carry):
                high, total, out = carry
                scores = tiles.scores(q_i, i, j)
                new_high = jnp.maximum(high, scores.max(axis=1))
                weights = jnp.exp(scores - new_high[:, None])
                shrink = jnp.exp(high - new_high)
                total = total * shrink + weights.sum(axis=1)
                out = out * shrink[:, None] + _dot(weights.astype(v.dtype), tiles.v[j])
                return new_high, total, out

            return jax.lax.cond(tiles.is_needed(i, j), accumulate, lambda carry: carry, carry)

        rows = q_i.shape[0]
        start = jnp.full(rows, MASKED), jnp.zeros(rows), jnp.zeros((rows, q_i.shape[1]))
        high, total, out = jax.lax.fori_loop(tiles.first_key_block(i), i + 1, key_block, start)
        total = jnp.where(total == 0, 1.0, total)  # a block of padding
        return (out / total[:, None]).astype(q.dtype), high + jnp.log(total)

    out, log_normalizer = jax.lax.map(query_block, jnp.arange(tiles.count))
    out = out.reshape(q.shape)
    return out, (q, k, v, ids, window, out, log_normalizer)


def _head_backward(block, saved, d_out):
    q, k, v, ids, window, out, log_normalizer = saved
    tiles = _Tiles(q, k, v, ids, window, block)
    d_out_tiles = d_out.reshape(tiles.q.shape)
    # sum over the row of weights * d_weights, by way of the output
    inner = jnp.sum(d_out_tiles.astype(jnp.float32) * out.reshape(tiles.q.shape), axis=2)

    def key_block(d_q, j):
        def query_block(i, carry):
            def accumulate(carry):
                d_q, d_k, d_v = carry
                q_i, d_out_i = tiles.q[i], d_out_tiles[i]
                weights = jnp.exp(tiles.scores(q_i, i, j) - log_normalizer[i][:, None])
                d_v = d_v + _dot(weights.astype(v.dtype).T, d_out_i)
                d_weights = _dot(d_out_i, tiles.v[j].T)
                d_scores = (weights * (d_weights - inner[i][:, None]) * tiles.scale).astype(q.dtype)
                d_k = d_k + _dot(d_scores.T, q_i)
                return d_q.at[i].add(_dot(d_scores, tiles.k[j])), d_k, d_v

            return jax.lax.cond(tiles.is_needed(i, j), accumulate, lambda carry: carry, carry)

        zeros = jnp.zeros(tiles.k.shape[1:])
        d_q, d_k, d_v = jax.lax.fori_loop(j, tiles.last_query_block(j) + 1, query_block, (d_q, zeros, zeros))
        return d_q, (d_k, d_v)

    start = jnp.zeros(tiles.q.shape)
    d_q, (d_k, d_v) = jax.lax.scan(key_block, start, jnp.arange(tiles.count))
    grads = (d.reshape(x.shape).astype(x.dtype) for d, x in zip((d_q, d_k, d_v), (q, k, v), strict=True))
    return *grads, None, None


_head.defvjp(_head_forward, _head_backward)


class _Tiles:
    """A head cut into blocks; the queries of a group are rows of the same tile."""

    def __init__(self, q: Array, k: Array, v: Array, ids: TokenIds, window: Array, block: int):
        self.count, self.block, self.group = q.shape[0] // block, block, q.shape[1]
        self.q = q.reshape(self.count, block * self.group, q.shape[2])
        self.k, self.v = (x.reshape(self.count, block, x.shape[1]) for x in (k, v))
        self.ids, self.window = ids.blocks(block), window
        self.scale = 1 / math.sqrt(q.shape[2])
        # Padding comes last in a row; so numbered, segments never fall.
        segment = jnp.where(self.ids.segment == 0, jnp.iinfo(jnp.int32).max, self.ids.segment)
        self.first_segment, self.last_segment = segment[:, 0], segment[:, -1]
        self.is_padding = self.ids.segment[:, 0] == 0
        self.only_chosen, self.only_rejected = ((self.ids.branch == b).all(axis=1) for b in (1, 2))

    def is_needed(self, i: Array, j: Array) -> Array:
        """False only if no query of block `i` may see a key of block `j`."""
        shares_segment = self.last_segment[j] >= self.first_segment[i]
        same = (self.first_segment[j] == self.last_segment[i]) & shares_segment
        other_branch = self.only_rejected[i] & self.only_chosen[j] & same
        return shares_segment & ~other_branch & ~self.is_padding[i]

    def first_key_block(self, i: Array) -> Array:
        return jnp.argmax(self.last_segment >= self.first_segment[i])

    def last_query_block(self, j: Array) -> Array:
        return self.count - 1 - jnp.argmax((self.first_segment <= self.last_segment[j])[::-1])

    def scores(self, q_i: Array, i: Array, j: Array) -> Array:
        """Float32 [block * group, block] of query block `i` and key block `j`, masked."""
        scores = _dot(q_i, self.k[j].T) * self.scale
        queries, keys = self._ids_of(i), self._ids_of(j)
        at = jnp.arange(self.block)
        mask = (queries.segment[:, None] == keys.segment[None]) & (at[:, None] + (i - j) * self.block >= at[None])
        mask &= (keys.branch[None] == 0) | (keys.branch[None] == queries.branch[:, None])
        mask &= queries.position[:, None] - keys.position[None] < self.window
        mask = jnp.broadcast_to(mask[:, None], (self.block, self.group, self.block)).reshape(scores.shape)
        return jnp.where(mask, scores, MASKED)

    def _ids_of(self, index: Array) -> TokenIds:
        return jax.tree.map(lambda x: x[index], self.ids)


def _dot(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
