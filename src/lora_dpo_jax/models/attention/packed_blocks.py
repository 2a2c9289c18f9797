"""Which keys each query of a packed row sees, and which blocks of keys each block of queries must therefore visit.

A row holds examples laid out `prompt | response 1 | ...`. The keys that a query sees there are two runs: its own branch
up to itself, and its prompt. On every platform, four comparisons of indices per score then give the mask, and the list
of blocks to visit is exact.
"""

import functools
import math
from typing import Any, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from lora_dpo_jax.models.attention.score_rule import ScoreRule
from lora_dpo_jax.platforms import platform

MASKED = -1e30  # finite, so that differences of masked scores are not NaN
ATTENDED = "attended"  # the name of attention's results in checkpointing policies
LOG2_E = math.log2(math.e)  # kernels take powers of two, exp2(x * LOG2_E), as the hardware does


class KeyRuns(eqx.Module):
    """The keys that each query sees: from `own_start` to itself, and from `prompt_start` to before `prompt_stop`.

    All are int32 [row, position] and count positions of the row. A query always sees itself.
    """

    own_start: Array
    prompt_start: Array
    prompt_stop: Array

    def visible(self, query: Array, key: Array) -> Array:
        """Whether the queries at indices `query` see the keys at indices `key`. Both broadcast against the runs."""
        own = (self.own_start <= key) & (key <= query)
        return own | ((self.prompt_start <= key) & (key < self.prompt_stop))

    def padded(self, length: int) -> "KeyRuns":
        """The runs of rows that are padded at their end to `length`. Padding sees only padding."""
        size = self.own_start.shape[1]
        return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, length - size)), constant_values=size), self)


def key_runs(segment: Array, branch: Array, window: int | None) -> KeyRuns:
    """The runs, from ids [row, position] (see `PackedMask`) and the sliding window (tokens).

    Rotary positions rise by one from token to token and continue from the prompt in each branch. Distances therefore
    follow from the indices.
    """
    index = jnp.broadcast_to(jnp.arange(segment.shape[1], dtype=jnp.int32), segment.shape)

    def changed(ids):
        return jnp.concatenate([jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=1)

    def last(begins):
        return jax.lax.cummax(jnp.where(begins, index, 0), axis=1)

    new_segment = changed(segment)
    new_run = new_segment | changed(branch)
    after_prompt = jnp.concatenate([jnp.zeros_like(branch[:, :1]), branch[:, :-1]], axis=1) == 0
    own_start, prompt_start = last(new_run), last(new_segment)
    prompt_stop = last(new_segment | (new_run & after_prompt))
    prompt_stop = jnp.where(branch == 0, prompt_start, prompt_stop)
    if window is not None:
        first_own = index - window + 1
        first_of_prompt = prompt_stop + index - own_start - window + 1
        own_start = jnp.maximum(own_start, first_own)
        prompt_start = jnp.minimum(jnp.maximum(prompt_start, first_of_prompt), prompt_stop)
    # A padding token sees only itself, so its block visits no other block.
    own_start = jnp.where(segment == 0, index, own_start)
    return KeyRuns(own_start, prompt_start, prompt_stop)


class Visits(eqx.Module):
    """The pairs of blocks to compute, ordered by outer block; int32.

    `outer` [visits + 1] counts the outer blocks of all rows together; `inner` [visits] is a block of the same row. The
    visits of outer block `b` are at `start[b]` to before `start[b + 1]`. Entries after the last visit are not used.
    `masked` [visits] is 1 if some query of the pair does not see some key.
    """

    outer: Array
    inner: Array
    masked: Array
    start: Array


def visits(runs: KeyRuns, query_block: int, key_block: int, *, outer: str) -> Visits:
    """The pairs of blocks to visit. `outer` is "query" or "key". The rows' length must be a multiple of both blocks."""
    rows, length = runs.own_start.shape
    needed, whole = _block_pairs(runs, query_block, key_block)
    # The most visits that a row can need: those of a row without branches.
    most = sum(-(-(start + query_block) // key_block) for start in range(0, length, query_block))
    if outer == "key":
        needed, whole = needed.swapaxes(1, 2), whole.swapaxes(1, 2)
    inner_blocks = needed.shape[2]
    found = jnp.nonzero(needed.ravel(), size=rows * most + 1, fill_value=needed.size)[0].astype(jnp.int32)
    counts = needed.sum(axis=2, dtype=jnp.int32).ravel()
    start = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])
    masked = 1 - whole.ravel().astype(jnp.int32).at[found].get(mode="clip")
    return Visits(found // inner_blocks, found[:-1] % inner_blocks, masked[:-1], start)


def _block_pairs(runs: KeyRuns, query_block: int, key_block: int) -> tuple[Array, Array]:
    """Two bool [row, query block, key block]: whether some query sees some key, whether every query sees every key."""
    rows, length = runs.own_start.shape
    first_key = jnp.arange(0, length, key_block)
    last_key = first_key + key_block - 1
    query = jnp.arange(length)[:, None]
    own_start, prompt_start, prompt_stop = (x[..., None] for x in (runs.own_start, runs.prompt_start, runs.prompt_stop))
    some = (own_start <= last_key) & (first_key <= query)
    some |= (prompt_start <= last_key) & (first_key < prompt_stop) & (prompt_start < prompt_stop)
    every = (own_start <= first_key) & (last_key <= query)
    every |= (prompt_start <= first_key) & (last_key < prompt_stop)
    blocks = (rows, length // query_block, query_block, -1)
    return some.reshape(blocks).any(axis=2), every.reshape(blocks).all(axis=2)


class Kernels(Protocol):
    """Attention over packed rows on one platform: hashable settings with two functions.

    q, the output and their gradients are [row, position, kv_head, group, head_size]; k, v and their gradients are
    [row, position, kv_head, head_size]. `forward` returns log-normalizers for `backward`, float32 [row, kv_head, group,
    position]. `runs` already includes the window of `rule`. The sinks of `rule` are float32 [kv_head, group].
    """

    def forward(self, q: Array, k: Array, v: Array, runs: KeyRuns, rule: ScoreRule) -> tuple[Array, Array]:
        """(attended, log-normalizers)"""
        ...

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
        """Gradients of q, k and v. `inner`, shaped as `log_normalizer`, is the sum of out * d_out over head_size."""
        ...


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def packed_attention(kernels: Kernels, q: Array, k: Array, v: Array, runs: KeyRuns, rule: ScoreRule) -> Array:
    """Softmax attention; memory linear in the row's length, forward and backward. Only q, k and v get gradients.

    Softmax is accumulated over blocks of keys (https://arxiv.org/abs/2205.14135). The backward pass recomputes scores
    and uses the saved log-normalizers (https://arxiv.org/abs/2307.08691).
    """
    return kernels.forward(q, k, v, runs, rule)[0]


def _forward(kernels: Kernels, q, k, v, runs, rule):
    out, log_normalizer = checkpoint_name(kernels.forward(q, k, v, runs, rule), ATTENDED)
    return out, (q, k, v, runs, rule, out, log_normalizer)


def _backward(kernels: Kernels, saved: Any, d_out: Array):
    q, k, v, runs, rule, out, log_normalizer = saved
    # The sum over keys of weights * d_weights equals the sum of out * d_out.
    inner = jnp.moveaxis(_sum_of_products(out, d_out), 1, -1)
    return *kernels.backward(q, k, v, runs, rule, log_normalizer, inner, d_out), None, None


packed_attention.defvjp(_forward, _backward)


def _sum_of_products(a: Array, b: Array) -> Array:
    """The sum of a * b over the last axis, in float32."""
    if platform() == "cpu":  # there, a product with ones is ten times as fast in XLA
        products = a.astype(jnp.float32) * b.astype(jnp.float32)
        return products @ jnp.ones(a.shape[-1], jnp.float32)
    return jnp.einsum("...h,...h->...", a, b, preferred_element_type=jnp.float32)


def pad_positions(x: Array, length: int, axis: int = 1) -> Array:
    """Pads the position axis at its end with zeros, to `length`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths)


def dot(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """The product of two matrices with float32 sums; float32 factors are multiplied at full precision."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision, preferred_element_type=jnp.float32)
