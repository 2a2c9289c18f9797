"""Who may attend to whom, and attention itself."""

import abc
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
from haliax import Axis, NamedArray
from jax import Array
from jax.sharding import PartitionSpec

from lora_dpo_jax.models.blocked_attention import BlockedKernels
from lora_dpo_jax.models.gpu_attention import GpuKernels
from lora_dpo_jax.models.packed_blocks import Kernels, KeyRuns, key_runs, packed_attention
from lora_dpo_jax.models.tpu_attention import TpuKernels

KEY_POSITION = "key_position"


def as_keys(x: NamedArray) -> NamedArray:
    """Renames the position axis so that keys and queries can meet in one array."""
    return x.rename({"position": KEY_POSITION})


class AttentionMask(eqx.Module):
    """Says which keys each query may see."""

    @abc.abstractmethod
    def allowed(self, window: NamedArray | None) -> NamedArray:
        """bool {row, position, key_position}. `window` (tokens, scalar): keys must be closer than this."""


class PackedMask(AttentionMask):
    """Several pairs in a row, each laid out `prompt | chosen | rejected`; all arrays {row, position}.

    Query *q* sees key *k* when both are in the same segment, *k* does not come after *q*, and *k* is in the prompt
    (branch 0) or in *q*'s branch. Distances are measured in rotary positions, which go on from the prompt in both
    branches.
    """

    segment_ids: NamedArray
    branch_ids: NamedArray
    position_ids: NamedArray

    def allowed(self, window: NamedArray | None) -> NamedArray:
        Pos = self.segment_ids.resolve_axis("position")
        ids = (self.segment_ids, self.branch_ids, self.position_ids, hax.arange(Pos))
        keys: Any = [as_keys(x) for x in ids]
        queries: Any = [x.broadcast_axis(keys[-1].axes) for x in ids]
        key_segment, key_branch, key_position, key_index = keys
        segment, branch, position, index = queries
        mask = (segment == key_segment) & ((key_branch == 0) | (branch == key_branch)) & (index >= key_index)
        if window is not None:
            mask = mask & (position - key_position < window)
        return mask

    @staticmethod
    def causal(Row: Axis, Pos: Axis) -> "PackedMask":
        """One unbranched sequence a row."""
        ones = hax.ones((Row, Pos), dtype=jnp.int32)
        return PackedMask(ones, ones * 0, hax.arange(Pos).broadcast_to((Row, Pos)))


class CachedMask(AttentionMask):
    """Queries at `position_ids` {row, position} over a key-value cache.

    Cache slots hold keys at `key_position_ids` {row, key_position}; a negative one is an empty slot.
    """

    position_ids: NamedArray
    key_position_ids: NamedArray

    def allowed(self, window: NamedArray | None) -> NamedArray:
        key = self.key_position_ids
        position = self.position_ids.broadcast_axis(key.resolve_axis(KEY_POSITION))
        mask = (position >= key) & (key >= 0)
        if window is not None:
            mask = mask & (position - key < window)
        return mask


def attend(
    q: NamedArray,
    k: NamedArray,
    v: NamedArray,
    mask: AttentionMask,
    window: NamedArray | None,
    HeadSize: Axis,
    implementation: str = "auto",
) -> NamedArray:
    """Softmax attention, probabilities in float32.

    q {row, position, kv_head, q_heads_per_group, head_size}, k and v {row, key_position, kv_head, head_size};
    returns q's axes. `implementation`: see `IMPLEMENTATIONS`; a mask that is not packed is always dense.
    """
    if implementation != "dense" and isinstance(mask, PackedMask):
        return _packed(PACKED_KERNELS[implementation], q, k, v, mask, window)
    scores = hax.dot(q, k, axis=HeadSize, preferred_element_type=jnp.float32) * HeadSize.size**-0.5
    # Finite, so that a padding query, which sees nothing, yields numbers and no NaN.
    scores = hax.where(mask.allowed(window), scores, -1e30)
    probabilities = hax.nn.softmax(scores, axis=KEY_POSITION).astype(v.dtype)
    return hax.dot(probabilities, v, axis=KEY_POSITION).rearrange(q.axes)


@dataclass(frozen=True)
class _PlatformKernels:
    """The kernels of the platform that a program is compiled for, which need not be the one it is traced on."""

    def forward(self, q: Array, k: Array, v: Array, runs: KeyRuns) -> tuple[Array, Array]:
        return self._of_platform("forward")(q, k, v, runs)

    def backward(
        self, q: Array, k: Array, v: Array, runs: KeyRuns, log_normalizer: Array, inner: Array, d_out: Array
    ) -> tuple[Array, Array, Array]:
        return self._of_platform("backward")(q, k, v, runs, log_normalizer, inner, d_out)

    def _of_platform(self, name: str) -> Callable:
        tpu, cuda, default = (getattr(kernels, name) for kernels in (TpuKernels(), GpuKernels(), BlockedKernels()))
        return functools.partial(jax.lax.platform_dependent, tpu=tpu, cuda=cuda, default=default)


def _packed(
    kernels: Kernels, q: NamedArray, k: NamedArray, v: NamedArray, mask: PackedMask, window: NamedArray | None
) -> NamedArray:
    k, v = (x.rearrange((q.axes[0], KEY_POSITION, q.axes[2], q.axes[4])) for x in (k, v))
    ids = [mask.segment_ids, mask.branch_ids]

    def on_one_device(q, k, v, segment, branch, window):
        return packed_attention(kernels, q, k, v, key_runs(segment, branch, window))

    attention: Callable = on_one_device
    window_array = None if window is None else window.array
    arrays = [x.array for x in (q, k, v, *ids)]
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        # Rows and heads are independent: each device loops over its own.
        split = hax.partitioning.pspec_for_axis
        specs = (*(split(x.axes) for x in (q, k, v, *ids)), PartitionSpec())
        attention = jax.shard_map(on_one_device, in_specs=specs, out_specs=split(q.axes), check_vma=False)
    return NamedArray(attention(*arrays, window_array), q.axis_names)


PACKED_KERNELS: dict[str, Kernels] = {
    "auto": _PlatformKernels(),
    "blocked": BlockedKernels(),
    "pallas_tpu": TpuKernels(),
    "pallas_gpu": GpuKernels(),
}
# How attention over packed rows is computed. All but `dense`, which is there to compare with, take memory linear in the
# row and compute nothing for blocks that nobody may see.
IMPLEMENTATIONS = (*PACKED_KERNELS, "dense")
PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}  # what runs on one platform alone
