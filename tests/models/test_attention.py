"""Attention over packed rows: every way of computing it is the plain one."""

import dataclasses
import functools
import re

import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from haliax import Axis
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from lora_dpo_jax.axes import KEY_POSITION
from lora_dpo_jax.models.attention import PackedMask, ScoreRule, attend
from lora_dpo_jax.models.attention.blocked import BlockedKernels
from lora_dpo_jax.models.attention.gpu import GpuKernels
from lora_dpo_jax.models.attention.packed_blocks import key_runs, packed_attention, visits
from lora_dpo_jax.models.attention.tpu import TpuKernels

# Blocks that the rows below need several of; kernels of other platforms run in Pallas's interpreter.
KERNELS = {
    "blocked": BlockedKernels(block=32),
    "pallas_tpu": TpuKernels(largest_block=32, interpret=True),
    "pallas_gpu": GpuKernels(block=32, interpret=True),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows of pairs `(prompt, chosen, rejected)`, by their lengths; heads; and what makes up the rule of scores."""

    rows: tuple[tuple[tuple[int, int, int], ...], ...]
    length: int
    window: int | None = None
    kv_heads: int = 2
    group: int = 3
    head_size: int = 16
    softcap: float | None = None
    has_sinks: bool = False

    def rule(self) -> ScoreRule:
        heads = Axis("kv_head", self.kv_heads), Axis("q_heads_per_group", self.group)
        sinks = hax.random.normal(jax.random.key(3), heads) if self.has_sinks else None
        return ScoreRule(self.head_size**-0.5, self.softcap, self.window, sinks)

    def mask(self) -> PackedMask:
        ids = np.zeros((3, len(self.rows), self.length), np.int32)
        for segment, branch, position, pairs in zip(*ids, self.rows, strict=True):
            at = 0
            for number, (prompt, chosen, rejected) in enumerate(pairs, start=1):
                end = at + prompt + chosen + rejected
                segment[at:end] = number
                branch[at:end] = np.repeat([0, 1, 2], [prompt, chosen, rejected])
                position[at:end] = [*range(prompt + chosen), *range(prompt, prompt + rejected)]
                at = end
            assert at <= self.length
        return PackedMask(*(hax.named(x, ("row", "position")) for x in ids))

    def arrays(self, dtype=jnp.float32):
        """q, k, v and the gradient of the output, which is zero for padding: no loss sees it."""
        rng = np.random.default_rng(0)
        names = ("row", "position", "kv_head", "q_heads_per_group", "head_size")
        shape = (len(self.rows), self.length, self.kv_heads, self.group, self.head_size)
        keys = ("row", KEY_POSITION, "kv_head", "head_size")
        q, d_out = (hax.named(jnp.asarray(rng.normal(size=shape), dtype), names) for _ in range(2))
        k, v = (hax.named(jnp.asarray(rng.normal(size=shape[:3] + shape[4:]), dtype), keys) for _ in range(2))
        return (q, k, v), hax.where(self.mask().segment_ids > 0, d_out, 0).rearrange(q.axes).astype(dtype)


def random_case(seed: int, length: int, **settings) -> Case:
    rng, rows = np.random.default_rng(seed), []
    for _ in range(2):
        pairs, left = [], length
        while sum(pair := tuple(rng.integers(1, rng.choice([4, 30, 90]), 3).tolist())) <= left:
            pairs.append(pair)
            left -= sum(pair)
        rows.append(tuple(pairs))
    return Case(tuple(rows), length, **settings)


CASES = {
    "short and long pairs": random_case(0, 192),
    "a row that no block divides": random_case(1, 150),
    "sliding window": random_case(2, 160, window=20),
    "window shorter than a block": random_case(3, 96, window=3),
    "one pair, one row empty": Case((((20, 70, 38),), ()), 128),
    "no prompt, one branch": Case((((0, 40, 24), (33, 31, 0)),), 128, group=1),
    "head size of no power of two": random_case(4, 64, head_size=24, kv_heads=1),
    "capped scores": random_case(5, 96, softcap=0.8),
    "sinks": random_case(6, 96, has_sinks=True),
    "window, cap and sinks": random_case(7, 96, window=9, softcap=0.5, has_sinks=True),
}


def dense(case: Case, arrays):
    return attend(*arrays, case.mask(), case.rule(), Axis("head_size", case.head_size), "dense")


def runs_of(case: Case):
    mask = case.mask()
    return key_runs(mask.segment_ids.array, mask.branch_ids.array, case.window)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def visits_of(case: Case, query_block: int, key_block: int, outer: str):
    block = max(query_block, key_block)
    return visits(runs_of(case).padded(-(-case.length // block) * block), query_block, key_block, outer=outer)


def packed(case: Case, kernels, arrays):
    q, k, v = arrays
    rule = case.rule()
    rule = dataclasses.replace(rule, window=None, sinks=None if rule.sinks is None else rule.sinks.array)
    return hax.named(packed_attention(kernels, q.array, k.array, v.array, runs_of(case), rule), q.axes)


def with_gradients(attention, arrays, d_out):
    @jax.jit
    def run(arrays, d_out):
        out, pullback = jax.vjp(attention, arrays)
        return out, pullback(d_out)[0]

    out, gradients = run(arrays, d_out)
    return [np.asarray(x.array, np.float32) for x in (out, *gradients)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kernels", KERNELS)
def test_kernels_agree_with_dense_attention(kernels, name):
    case = CASES[name]
    arrays, d_out = case.arrays()
    real = np.asarray(case.mask().segment_ids.array) > 0
    expected = with_gradients(lambda arrays: dense(case, arrays), arrays, d_out)
    found = with_gradients(lambda arrays: packed(case, KERNELS[kernels], arrays), arrays, d_out)
    for mine, theirs in zip(found, expected, strict=True):
        assert np.isfinite(mine).all(), "of padding too"
        # Float32 sums of some hundred products of size one, in another order.
        np.testing.assert_allclose(mine[real], theirs[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernels", KERNELS)
def test_low_precision_is_off_by_its_rounding_alone(kernels):
    """From bfloat16 inputs, compared with float32 attention of the same numbers."""
    case = CASES["short and long pairs"]
    arrays, d_out = case.arrays(jnp.bfloat16)
    real = np.asarray(case.mask().segment_ids.array) > 0
    float32 = jax.tree.map(lambda x: x.astype(jnp.float32), (arrays, d_out))
    expected = with_gradients(lambda arrays: dense(case, arrays), *float32)
    found = with_gradients(lambda arrays: packed(case, KERNELS[kernels], arrays), arrays, d_out)
    for mine, theirs in zip(found, expected, strict=True):
        # Each rounding is up to 2 ** -9 of its number; weights, their gradients and results are rounded.
        error = np.abs(mine[real] - theirs[real])
        assert error.max() < 3 * 2**-9 * np.abs(theirs[real]).max()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("outer", ["query", "key"])
@pytest.mark.parametrize("query_block, key_block", [(16, 16), (32, 16)])
def test_blocks_are_visited_if_and_only_if_some_query_sees_some_key(name, outer, query_block, key_block):
    case = CASES[name]
    length = -(-case.length // 32) * 32
    seen = np.zeros((len(case.rows), length, length), bool)
    padding = np.asarray(case.mask().segment_ids.array) == 0
    allowed = np.asarray(case.mask().allowed(case.window).rearrange(("row", "position", KEY_POSITION)).array)
    # What padding sees is nobody's business, but each token of it must see something: itself.
    seen[:, : case.length, : case.length] = np.where(padding[:, :, None], np.eye(case.length, dtype=bool), allowed)
    seen[:, range(case.length, length), range(case.length, length)] = True
    blocks = seen.reshape(len(seen), length // query_block, query_block, length // key_block, key_block)
    some, every = blocks.any((2, 4)), blocks.all((2, 4))
    if outer == "key":
        some, every = some.swapaxes(1, 2), every.swapaxes(1, 2)
    row, outside, inside = np.nonzero(some)

    found = visits_of(case, query_block, key_block, outer)
    total = int(found.start[-1])
    np.testing.assert_array_equal(found.outer[:total], row * some.shape[1] + outside)
    np.testing.assert_array_equal(found.inner[:total], inside)
    np.testing.assert_array_equal(np.diff(found.start), some.sum(axis=2).ravel())
    assert found.outer[total] != found.outer[total - 1], "a kernel must know the last visit of the last block"
    # A window may leave whole blocks unknown to be so; none is taken for whole that is not.
    is_whole = np.asarray(found.masked[:total]) == 0
    assert not np.any(is_whole & ~every[row, outside, inside])


def test_what_is_computed_grows_with_the_pairs_and_not_with_their_square():
    def computed(pairs: int) -> int:
        case = Case((((10, 12, 10),) * pairs,), 32 * pairs)
        return int(visits_of(case, 64, 64, "query").start[-1])

    assert [computed(pairs) for pairs in (8, 16, 32, 64)] == [4, 8, 16, 32]


def lowered_gradient(implementation: str, length: int, target: AbstractDevice | None = None):
    """Forward and backward over one row of short pairs, for this machine or for a device that it lacks."""
    case = Case((((40, 50, 38),) * (length // 128),), length, group=2)
    HeadSize = Axis("head_size", case.head_size)

    def gradients(arrays, mask, d_out):
        _, pullback = jax.vjp(lambda arrays: attend(*arrays, mask, case.rule(), HeadSize, implementation), arrays)
        return pullback(d_out)

    (arrays, d_out), mask = case.arrays(), case.mask()
    if target is None:
        return jax.jit(gradients).lower(arrays, mask, d_out)
    with use_abstract_mesh(AbstractMesh((1,), ("device",), abstract_device=target)):
        return jax.jit(gradients).trace(arrays, mask, d_out).lower(lowering_platforms=(target.platform,))


def largest_square(text: str, length: int) -> bool:
    """Whether an array has two axes as long as the row."""
    return any(shape.split(",").count(str(length)) > 1 for shape in re.findall(r"\[([\d,]+)\]", text))


def test_memory_grows_with_the_row_and_not_with_its_square():
    lengths = [2048, 4096, 8192]
    programs = [lowered_gradient("auto", length).compile() for length in lengths]
    sizes = [program.memory_analysis().temp_size_in_bytes for program in programs]
    assert sizes[2] - sizes[1] < 2.2 * (sizes[1] - sizes[0]), sizes
    assert not any(largest_square(p.as_text(), n) for p, n in zip(programs, lengths, strict=True))
    assert largest_square(lowered_gradient("dense", 256).compile().as_text(), 256)


@pytest.mark.parametrize(
    "target, call",
    [
        (AbstractDevice("TPU v5 lite", 1, "tpu"), "tpu_custom_call"),
        (AbstractDevice("NVIDIA H100", None, "cuda"), "triton"),
    ],
    ids=lambda value: getattr(value, "platform", value),
)
def test_auto_is_the_kernel_of_the_platform_compiled_for(target, call):
    """As far as this machine can follow: to the kernels' own intermediate language."""
    lowered = lowered_gradient("auto", 256, target).as_text()
    assert lowered.count(call) >= 3, "forward, gradient of queries, gradients of keys and values"
    assert call not in lowered_gradient("auto", 256).as_text()
