"""Attention over packed rows, and dense causal attention over as many tokens, forward and backward:

    python -m bench.attention --length 4096 --rows 4

The dense one is cuDNN's on a GPU and XLA's elsewhere: a row is one sequence to it, with no pairs and no branches.
Prints one line of JSON.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
from haliax import Axis, NamedArray

from bench import pairs as benchmark_pairs
from bench.measure import emit
from lora_dpo_jax.axes import HEAD_SIZE, KEY_POSITION, KV_HEAD, POSITION, Q_HEADS_PER_GROUP
from lora_dpo_jax.data import PartShape, PreferenceBatch, fill_rows
from lora_dpo_jax.data.packing import pack
from lora_dpo_jax.models.attention import IMPLEMENTATIONS, PackedMask, ScoreRule, attend
from lora_dpo_jax.settings.arguments import parse
from lora_dpo_jax.settings.choices import check_choice


@dataclass(frozen=True)
class Options:
    """By default the heads of Llama-3.1-8B."""

    rows: int = 4
    length: int = 4096  # tokens of a row
    kv_heads: int = 8
    group: int = 4  # query heads of a key-value head
    head_size: int = 128
    dtype: str = "bfloat16"
    data: str = "ultrafeedback"  # the profile that pairs are drawn by
    attention: str = "auto"
    steps: int = 20
    out: str | None = None  # also write the JSON to this file

    def __post_init__(self):
        check_choice("attention", self.attention, IMPLEMENTATIONS)


def main() -> None:
    options = parse(Options)
    emit(measure(options), options.out)


def measure(options: Options) -> dict[str, Any]:
    """Median milliseconds of both, and the share of the dense one's products of query and key that ours needs."""
    batch = packed_rows(options)
    KVHead, Group, HeadSize = (
        Axis(KV_HEAD, options.kv_heads),
        Axis(Q_HEADS_PER_GROUP, options.group),
        Axis(HEAD_SIZE, options.head_size),
    )
    Row, Pos = batch.tokens.axes
    q, d_out, k, v = (
        hax.random.normal(jax.random.key(seed), axes).astype(options.dtype)
        for seed, axes in enumerate([(Row, Pos, KVHead, Group, HeadSize)] * 2 + [(Row, Pos, KVHead, HeadSize)] * 2)
    )
    mask = PackedMask(batch.segment_ids, batch.branch_ids, batch.position_ids)

    def packed(q: NamedArray, k: NamedArray, v: NamedArray, mask: PackedMask) -> NamedArray:
        keys, values = (x.rename({POSITION: KEY_POSITION}) for x in (k, v))
        return attend(q, keys, values, mask, ScoreRule(HeadSize.size**-0.5), HeadSize, options.attention)

    dense_kind = "cudnn" if jax.default_backend() == "gpu" else "xla"

    def dense(q: NamedArray, k: NamedArray, v: NamedArray, mask: None) -> NamedArray:
        heads = q.array.reshape(Row.size, Pos.size, -1, HeadSize.size)
        out = jax.nn.dot_product_attention(heads, k.array, v.array, is_causal=True, implementation=dense_kind)
        return hax.named(out.reshape(q.array.shape), q.axes)

    began = time.perf_counter()
    ours, theirs = (
        _milliseconds(_both_ways(attention), (d_out, of_mask, q, k, v), options.steps)
        for attention, of_mask in ((packed, mask), (dense, None))
    )
    seconds = time.perf_counter() - began
    allowed = np.asarray(hax.sum(_visible(batch)).array)
    return {
        "rows": options.rows,
        "length": options.length,
        "dtype": options.dtype,
        "attention": options.attention,
        "dense": dense_kind,
        "milliseconds": round(ours, 3),
        "dense_milliseconds": round(theirs, 3),
        "times_as_fast": round(theirs / ours, 3),
        "share_of_dense_scores": round(float(allowed) / (options.rows * options.length * (options.length + 1) / 2), 4),
        "seconds": round(seconds, 1),  # with compiling
        "device": jax.devices()[0].device_kind,
    }


def packed_rows(options: Options) -> PreferenceBatch:
    """One micro-batch of the fullest rows that pairs of the profile make, with its ids on the device."""
    pairs = benchmark_pairs.load(options.data, 64 * options.rows, vocab_size=32000)
    rows = fill_rows([pair.size for pair in pairs], options.length)[: options.rows]
    layout = PartShape.of_pairs(1, options.rows, options.length, targets=options.length, pairs=max(map(len, rows)))
    batch = pack(pairs, [np.array(row) for row in rows], layout)
    return jax.tree.map(jnp.asarray, batch.micro_batch(0))


def _visible(batch: PreferenceBatch) -> NamedArray:
    """int32 {row, position}: how many keys each token sees; padding sees nothing."""
    # Positions count the tokens before one in its own sequence, whichever branch that runs through.
    return hax.where(batch.segment_ids > 0, batch.position_ids + 1, 0)


def _both_ways(attention: Callable) -> Callable:
    # The mask is an argument: XLA would compute all that follows from a constant one while it compiles.
    def run(d_out, mask, *arrays):
        out, pullback = jax.vjp(lambda *arrays: attention(*arrays, mask), *arrays)
        return out, pullback(d_out)

    return jax.jit(run)


def _milliseconds(program: Callable, arrays: tuple, steps: int) -> float:
    jax.block_until_ready(program(*arrays))
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        jax.block_until_ready(program(*arrays))
        seconds.append(time.perf_counter() - began)
    return 1000 * statistics.median(seconds)


if __name__ == "__main__":
    main()
