"""The attention kernels compile for TPUs, by libtpu and without any TPU here."""

import functools

import haliax as hax
import jax
import jax.numpy as jnp
import pytest
from haliax import Axis, NamedArray

from lora_dpo_jax.axes import KEY_POSITION
from lora_dpo_jax.cost.devices import devices_of_topology
from lora_dpo_jax.models.attention import PackedMask, ScoreRule, attend
from lora_dpo_jax.sharding import MeshConfig, Placement

KVHead, Group = Axis("kv_head", 4), Axis("q_heads_per_group", 2)


@functools.cache
def placement(topology: str) -> Placement:
    return Placement(MeshConfig({"data": 2, "model": 2}), devices_of_topology(topology)[1])


def compiled(topology: str, length: int, head_size: int, dtype, *, windowed: bool = False):
    """Forward and backward, rows and heads split over four chips."""
    Row, Pos, HeadSize = Axis("row", 2), Axis("position", length), Axis("head_size", head_size)
    place = placement(topology)

    def shape(axes, dtype) -> NamedArray:
        sharding = hax.partitioning.sharding_for_axis(axes, place.compute, place.mesh)
        array = jax.ShapeDtypeStruct([axis.size for axis in axes], dtype, sharding=sharding)
        return NamedArray(array, tuple(axis.name for axis in axes))

    def gradients(arrays, mask, rule, d_out):
        out, pullback = jax.vjp(lambda arrays: attend(*arrays, mask, rule, HeadSize), arrays)
        return out, pullback(d_out)

    q = shape((Row, Pos, KVHead, Group, HeadSize), dtype)
    k = shape((Row, Pos.alias(KEY_POSITION), KVHead, HeadSize), dtype)
    mask = PackedMask(*[shape((Row, Pos), jnp.int32)] * 3)
    rule = ScoreRule(head_size**-0.5)
    if windowed:
        rule = ScoreRule(head_size**-0.5, softcap=30.0, window=512, sinks=shape((KVHead, Group), jnp.float32))
    with place.scope():
        return jax.jit(gradients).lower((q, k, k), mask, rule, q).compile()


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
@pytest.mark.parametrize(
    "length, head_size, dtype, windowed",
    [(2048, 128, jnp.bfloat16, False), (2112, 64, jnp.bfloat16, True), (192, 96, jnp.float32, False)],
)
def test_kernels_compile_for_tpu(topology, length, head_size, dtype, windowed):
    program = compiled(topology, length, head_size, dtype, windowed=windowed)
    text = program.as_text()
    for kernel in ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel"):
        assert kernel in text
    assert "all-gather" not in text and "all-reduce" not in text, "rows and heads stay where they are"
