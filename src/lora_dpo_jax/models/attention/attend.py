"""The attention function: the platform's kernels for packed rows, all scores at once for other masks."""

import dataclasses
from collections.abc import Callable
from typing import Any

import haliax as hax
import jax
import jax.numpy as jnp
from haliax import Axis, NamedArray
from jax import Array
from jax.sharding import PartitionSpec

from lora_dpo_jax.axes import KEY_POSITION
from lora_dpo_jax.models.attention.blocked import BlockedKernels
from lora_dpo_jax.models.attention.gpu import GpuKernels
from lora_dpo_jax.models.attention.masks import AttentionMask, PackedMask
from lora_dpo_jax.models.attention.packed_blocks import MASKED, Kernels, key_runs, packed_attention
from lora_dpo_jax.models.attention.score_rule import ScoreRule
from lora_dpo_jax.models.attention.tpu import TpuKernels
from lora_dpo_jax.platforms import platform


def attend(
    q: NamedArray,
    k: NamedArray,
    v: NamedArray,
    mask: AttentionMask,
    rule: ScoreRule,
    HeadSize: Axis,
    implementation: str = "auto",
) -> NamedArray:
    """Softmax attention, probabilities in float32.

    q {row, position, kv_head, q_heads_per_group, head_size}, k and v {row, key_position, kv_head, head_size};
    returns q's axes. `implementation`: see `IMPLEMENTATIONS`; a mask that is not packed, or is short, always
    takes `dense`.
    """
    if implementation != "dense" and isinstance(mask, PackedMask) and not mask.is_short:
        return _packed(_kernels(implementation), q, k, v, mask, rule)
    Row, Position, KVHead, Group, _ = (axis.name for axis in q.axes)
    of_scores = (Row, KVHead, Position, Group, KEY_POSITION)
    # The factors of a cache have this order already.
    queries = q.rearrange((Row, KVHead, Position, Group, HeadSize)).array
    keys = k.rearrange((Row, KVHead, HeadSize, KEY_POSITION)).array
    values = v.rearrange((Row, KVHead, KEY_POSITION, HeadSize)).array
    scores = NamedArray(rule.scores(_product(queries, keys, jnp.float32)), of_scores)
    # MASKED is finite, so a padding query, which sees no key, yields finite values and no NaN.
    allowed = mask.allowed(rule.window).rearrange((Row, Position, KEY_POSITION))
    scores = hax.where(allowed, scores, MASKED).rearrange(of_scores)
    probabilities = _softmax(scores, rule.sinks).astype(v.dtype).rearrange(of_scores).array
    attended = NamedArray(_product(probabilities, values, v.dtype), (*of_scores[:-1], HeadSize.name))
    return attended.rearrange(q.axes)


def _product(x: Array, y: Array, dtype: Any) -> Array:
    """[row, kv_head, position, group, inner] times [row, kv_head, inner, outer]: the former with outer for inner."""
    return jax.lax.dot_general(x, y, (((4,), (2,)), ((0, 1), (0, 1))), preferred_element_type=dtype)


def _softmax(scores: NamedArray, sinks: NamedArray | None) -> NamedArray:
    """Softmax over keys. A sink takes its share of the weight but has no value to add."""
    if sinks is None:
        return hax.nn.softmax(scores, axis=KEY_POSITION)
    log_normalizer = hax.nn.logsumexp(scores, axis=KEY_POSITION)
    log_normalizer = NamedArray(
        jnp.logaddexp(log_normalizer.array, sinks.broadcast_to(log_normalizer.axes).array), log_normalizer.axis_names
    )
    return hax.exp(scores - log_normalizer)


def _packed(
    kernels: Kernels, q: NamedArray, k: NamedArray, v: NamedArray, mask: PackedMask, rule: ScoreRule
) -> NamedArray:
    k, v = (x.rearrange((q.axes[0], KEY_POSITION, q.axes[2], q.axes[4])) for x in (k, v))
    ids = [mask.segment_ids, mask.branch_ids]
    sinks = None if rule.sinks is None else rule.sinks.rearrange(q.axes[2:4])

    def on_one_device(q, k, v, segment, branch, sinks):
        runs = key_runs(segment, branch, rule.window)
        return packed_attention(kernels, q, k, v, runs, dataclasses.replace(rule, window=None, sinks=sinks))

    attention: Callable = on_one_device
    arrays = [x.array for x in (q, k, v, *ids)]
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        # Rows and heads are independent: each device loops over its own.
        split = hax.partitioning.pspec_for_axis
        of_sinks = PartitionSpec() if sinks is None else split(sinks.axes)
        specs = (*(split(x.axes) for x in (q, k, v, *ids)), of_sinks)
        attention = jax.shard_map(on_one_device, in_specs=specs, out_specs=split(q.axes), check_vma=False)
    return NamedArray(attention(*arrays, None if sinks is None else sinks.array), q.axis_names)


PACKED_KERNELS: dict[str, Kernels] = {
    "blocked": BlockedKernels(),
    "pallas_tpu": TpuKernels(),
    "pallas_gpu": GpuKernels(),
}
# How attention over packed rows is computed. `dense` is for comparison. All others take memory linear in the row's
# length and skip blocks of keys that no query sees.
IMPLEMENTATIONS = ("auto", *PACKED_KERNELS, "dense")
PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}  # implementations that run on one platform only


def _kernels(implementation: str) -> Kernels:
    """`auto` is the kernels of the platform that the program is traced for."""
    if implementation == "auto":
        implementation = {"cpu": "blocked", "gpu": "pallas_gpu", "tpu": "pallas_tpu"}[platform()]
    return PACKED_KERNELS[implementation]
