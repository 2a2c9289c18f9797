"""The traffic that is read out of a compiled program's text is what the program does."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_dpo_jax.cost.traffic import collective_bytes

MESH = Mesh(np.array(jax.devices()), ("x",))
SPLIT, WHOLE = NamedSharding(MESH, PartitionSpec("x")), NamedSharding(MESH, PartitionSpec())


def exchanged(turns) -> jax.stages.Compiled:
    """A matrix [64, 32] gathered and a vector [128] summed over the devices, in each turn of a loop."""

    def on_a_device(matrix, vector, turns):
        def turn(_, carry):
            matrix, vector = carry
            whole = jax.lax.all_gather(matrix, "x", tiled=True)
            return matrix + whole.mean(), jax.lax.psum(vector, "x") * 0.1

        return jax.lax.fori_loop(0, turns, turn, (matrix, vector))

    program = jax.shard_map(
        on_a_device,
        mesh=MESH,
        in_specs=(PartitionSpec("x"), PartitionSpec(), PartitionSpec()),
        out_specs=(PartitionSpec("x"), PartitionSpec()),
        check_vma=False,
    )
    arrays = jnp.zeros((64, 32)), jnp.zeros(128)
    if isinstance(turns, int):
        return jax.jit(lambda *arrays: program(*arrays, turns)).lower(*arrays).compile()
    return jax.jit(program).lower(*arrays, turns).compile()


def test_exchanges_count_as_often_as_their_loop_turns():
    gathered, summed = 64 * 32 * 4, 128 * 4
    assert collective_bytes(exchanged(5).as_text()) == {"all-gather": 5 * gathered, "all-reduce": 10 * summed}
    # A TPU's programs bear no note of it, and their conditions compare with a constant.
    unnoted = re.sub(r'"known_trip_count":\{"n":"5"\},?', "", exchanged(5).as_text())
    assert "known_trip_count" not in unnoted
    assert collective_bytes(unnoted) == {"all-gather": 5 * gathered, "all-reduce": 10 * summed}
    unknown = exchanged(jnp.int32(5)).as_text()
    assert collective_bytes(unknown, unknown_trips=3) == {"all-gather": 3 * gathered, "all-reduce": 6 * summed}


# As libtpu writes a gathering that goes on while something else is computed, in two turns of a loop.
OVERLAPPED = """
%fused_start (p: bf16[8,4]) -> (bf16[8,4], bf16[64,4]) {
  %p = bf16[8,4]{1,0} parameter(0)
  %all-gather.1 = bf16[64,4]{1,0} all-gather(%p), channel_id=7, dimensions={0}
  ROOT %t = (bf16[8,4]{1,0}, bf16[64,4]{1,0}) tuple(%p, %all-gather.1)
}

%async_collective_fusion.2 (p: bf16[8,4]) -> bf16[64,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[64,4]{1,0} all-gather(%p), channel_id=7, dimensions={0}
}

%fused_done (p: bf16[8,4]) -> bf16[64,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  ROOT %all-gather.3 = bf16[64,4]{1,0} all-gather(%p), channel_id=7, dimensions={0}
}

%body (p: (u32[], bf16[8,4])) -> (u32[], bf16[8,4]) {
  %p = (u32[], bf16[8,4]{1,0}) parameter(0)
  %shard = bf16[8,4]{1,0} get-tuple-element(%p), index=1
  %async-collective-start = (bf16[8,4]{1,0}, bf16[64,4]{1,0}) fusion(%shard), kind=kCustom, calls=%fused_start
  %fusion.2 = bf16[64,4]{1,0} fusion(%shard), kind=kCustom, calls=%async_collective_fusion.2
  %async-collective-done = bf16[64,4]{1,0} fusion(%shard), kind=kCustom, calls=%fused_done
}

%condition (p: (u32[], bf16[8,4])) -> pred[] {
  %p = (u32[], bf16[8,4]{1,0}) parameter(0)
  %turns = u32[]{:T(128)} constant(2)
  %turn = u32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%turn, %turns), direction=LT
}

ENTRY %main (p: (u32[], bf16[8,4])) -> (u32[], bf16[8,4]) {
  %p = (u32[], bf16[8,4]{1,0}) parameter(0)
  ROOT %while = (u32[], bf16[8,4]{1,0}) while(%p), condition=%condition, body=%body
}
"""


def test_an_exchange_that_overlaps_with_arithmetic_counts_once():
    assert collective_bytes(OVERLAPPED, unknown_trips=100) == {"all-gather": 2 * 64 * 4 * 2}


def test_exchanges_that_were_combined_count_together():
    line = "  %all-reduce.1 = (f32[4,2]{1,0}, /*index=1*/bf16[8]{0}) all-reduce(%a, %b), channel_id=1, to_apply=%add"
    program = "ENTRY %main (a: f32[4,2], b: bf16[8]) -> (f32[4,2], bf16[8]) {\n" + line + "\n}"
    assert collective_bytes(program) == {"all-reduce": 2 * (4 * 2 * 4 + 8 * 2)}


def test_a_program_on_one_device_exchanges_nothing():
    compiled = jax.jit(lambda x: jnp.sin(x) @ x).lower(jnp.zeros((8, 8))).compile()
    assert collective_bytes(compiled.as_text()) == {}
