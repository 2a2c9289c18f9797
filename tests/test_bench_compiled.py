"""What bench.compiled reads in the text of a program is what the program does."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from bench.compiled import Options, Traffic, beyond
from lora_dpo_jax.cost.gpus import installed_plugin
from lora_dpo_jax.cost.program_text import computations_of, runs_of

# Two layers with weights [24, 40]: each is sliced and transposed before its product, as XLA does for some layouts.
PROGRAM = """
%sliced (p: bf16[2,24,40], i: s32[]) -> bf16[1,40,24] {
  %p = bf16[2,24,40]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,24,40]{2,1,0} dynamic-slice(%p, %i, %zero, %zero), dynamic_slice_sizes={1,24,40}
  ROOT %turned = bf16[1,40,24]{2,1,0} transpose(%slice), dimensions={0,2,1}
}

%product (a: bf16[10,40], b: bf16[1,40,24]) -> bf16[10,24] {
  %a = bf16[10,40]{1,0} parameter(0)
  %b = bf16[1,40,24]{2,1,0} parameter(1)
  %flat = bf16[40,24]{1,0} bitcast(%b)
  ROOT %dot = bf16[10,24]{1,0} dot(%a, %flat), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%doubled (x: bf16[10,24]) -> bf16[10,24] {
  %x = bf16[10,24]{1,0} parameter(0)
  ROOT %sum = bf16[10,24]{1,0} add(%x, %x)
}

%cleared () -> bf16[2,10,24] {
  %nothing = bf16[] constant(0)
  ROOT %filled = bf16[2,10,24]{2,1,0} broadcast(%nothing), dimensions={}
}

%body (t: (s32[], bf16[2,24,40], bf16[10,40])) -> (s32[], bf16[2,24,40], bf16[10,40]) {
  %t = (s32[], bf16[2,24,40]{2,1,0}, bf16[10,40]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%t), index=0
  %stack = bf16[2,24,40]{2,1,0} get-tuple-element(%t), index=1
  %x = bf16[10,40]{1,0} get-tuple-element(%t), index=2
  %weight = bf16[1,40,24]{2,1,0} fusion(%stack, %n), kind=kLoop, calls=%sliced
  %y = bf16[10,24]{1,0} fusion(%x, %weight), kind=kCustom, calls=%product
  %z = bf16[10,24]{1,0} fusion(%y), kind=kLoop, calls=%doubled
  ROOT %next = (s32[], bf16[2,24,40]{2,1,0}, bf16[10,40]{1,0}) tuple(%n, %stack, %x)
}

ENTRY %main (s: bf16[2,24,40], x: bf16[10,40]) -> bf16[2,24,40] {
  %s = bf16[2,24,40]{2,1,0} parameter(0)
  %x = bf16[10,40]{1,0} parameter(1)
  %zeros = bf16[2,10,24]{2,1,0} fusion(), kind=kLoop, calls=%cleared
  %again = bf16[2,10,24]{2,1,0} copy(%zeros)
  %logits = bf16[10,97]{1,0} custom-call(%x), custom_call_target="__cublas$lt$matmul"
  %start = s32[] constant(0)
  %t = (s32[], bf16[2,24,40]{2,1,0}, bf16[10,40]{1,0}) tuple(%start, %s, %x)
  %loop = (s32[], bf16[2,24,40]{2,1,0}, /*index=2*/bf16[10,40]{1,0}) while(%t), condition=%c, body=%body, """
PROGRAM += """backend_config={"known_trip_count":{"n":"2"}}
  ROOT %out = bf16[2,24,40]{2,1,0} get-tuple-element(%loop), index=1
}
"""


def test_traffic_is_told_apart():
    found = Traffic(PROGRAM, 2, {2 * 24 * 40}, 97).found
    assert found["weights_copied_mb"] == 2 * 24 * 40 * 2
    assert found["zeros_mb"] == 2 * (2 * 10 * 24 * 2)  # written, and copied
    assert found["elementwise_mb"] == 2 * (10 * 24 * 2) * 2
    assert found["head_block_mb"] == 10 * 40 * 2 + 10 * 97 * 2
    assert found["products_a_layer"] == 2


# One layer of three is read through a bitcast, one column of an array of four; a buffer is made and not filled.
IN_PART = """
%parts (s: bf16[3,1,8,4], x: bf16[8,4], i: s32[]) -> bf16[8,1] {
  %s = bf16[3,1,8,4]{3,2,1,0} parameter(0)
  %x = bf16[8,4]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %flat = bf16[3,8,4]{2,1,0} bitcast(%s)
  %layer = bf16[1,8,4]{2,1,0} dynamic-slice(%flat, %i, %zero, %zero), dynamic_slice_sizes={1,8,4}
  %summed = bf16[8]{0} reduce(%layer, %zero), dimensions={0,2}
  %bent = bf16[8,1]{1,0} bitcast(%summed)
  %column = bf16[8,1]{1,0} slice(%x), slice={[0:8], [3:4]}
  ROOT %sum = bf16[8,1]{1,0} add(%bent, %column)
}

ENTRY %main (s: bf16[3,1,8,4], x: bf16[8,4], i: s32[]) -> bf16[8,1] {
  %s = bf16[3,1,8,4]{3,2,1,0} parameter(0)
  %x = bf16[8,4]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %made = bf16[3,8]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %begun = ((bf16[3,1,8,4]{3,2,1,0}, bf16[8,4]{1,0}, s32[]), bf16[8,1]{1,0}, u32[]) fusion-start(%s, %x, %i), """
IN_PART += """kind=kInput, calls=%parts
  ROOT %done = bf16[8,1]{1,0} fusion-done(%begun)
}
"""


def test_arrays_that_are_read_in_part_count_in_part():
    found = Traffic(IN_PART, 3, set(), 97).found
    assert found["elementwise_mb"] == 2 * (8 * 4 + 8) + 4 + 2 * 8  # the layer and the column, the index, the result
    assert found["kernels_mb"] == 0


# Two Pallas kernels for Triton, whose code precedes the name.
KERNELS = """
ENTRY %main (x: bf16[8,4], w: bf16[2,4,4]) -> bf16[8,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %w = bf16[2,4,4]{2,1,0} parameter(1)
  %attended = bf16[8,4]{1,0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", """
KERNELS += r"""backend_config={ir = "\22grouped_\0D", name = "packed_attention_forward_kernel", num_warps = 4 : i32}
  ROOT %y = bf16[8,4]{1,0} custom-call(%attended, %w), custom_call_target="__gpu$xla.gpu.triton", """
KERNELS += r"""backend_config={ir = "\0D", name = "grouped_product", num_warps = 4 : i32}
}
"""


def test_grouped_kernels_are_products():
    found = Traffic(KERNELS, 1, set(), 97).found
    assert found["products_a_layer"] == 1
    assert found["kernels_mb"] == 2 * 8 * 4 * 2


def test_instructions_run_as_often_as_their_loops():
    def program(x):
        return jax.lax.fori_loop(0, 7, lambda _, y: jax.lax.fori_loop(0, 3, lambda _, z: jnp.sin(z @ x), y), x)

    computations, entry = computations_of(jax.jit(program).lower(jnp.zeros((64, 64))).compile().as_text())
    assert sorted(runs_of(computations, entry).values()) == [1, 7, 7 * 3]


@pytest.mark.parametrize("bounds, broken", [({}, 0), ({"most_copied": 1.0}, 1), ({"most_copied": 2.0}, 0)])
def test_bounds_are_told_if_they_are_broken(bounds, broken):
    row = {"weights_copied_mb": 1.5, "zeros_mb": 3.0, "layers_mb": 1.0, "temporary_mb": 2.0}
    assert len(list(beyond(Options(**bounds), row))) == broken
    assert len(list(beyond(Options(**bounds, most_cleared=1.0), row))) == broken + 1


if installed_plugin() is not None:  # the extra gpu-plan, which the tests do not need otherwise

    @pytest.mark.parametrize("reference", ["cached", "live"])
    def test_an_h100_copies_no_stacked_weights_and_clears_no_stacks(reference):
        # JAX 0.10 does not read slices of stacked weights in place: each of the passes copies all of them.
        most_copied = 4.0 if jax.__version_info__ < (0, 11) else 0.01
        options = ["--shapes=[22m]", "--platforms=[gpu]", f"--reference={reference}", "--tokens=1920"]
        bounds = [f"--most_copied={most_copied}", "--most_cleared=0.1"]
        subprocess.run([sys.executable, "-m", "bench.compiled", *options, *bounds], check=True, timeout=200)
