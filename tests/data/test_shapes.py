"""Rows hold every pair, few shapes serve a run, and little of them is padding."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_pairs import random_pairs, table_of

from lora_dpo_jax.data import shapes
from lora_dpo_jax.data.examples import ExampleSizes
from lora_dpo_jax.data.packing import PreferenceBatch, pack
from lora_dpo_jax.data.shapes import (
    MAX_SHAPES,
    MICRO_BATCH_TOKENS,
    PackingConfig,
    PartShape,
    StepShapes,
    choose_shapes,
    fill_rows,
)

SIZES = st.integers(1, 300).flatmap(
    lambda length: st.tuples(st.lists(st.integers(1, length), max_size=80), st.just(length))
)


@settings(deadline=None)
@given(SIZES)
def test_planned_rows_hold_every_item_once_within_their_length(sizes_and_length):
    sizes, length = sizes_and_length
    rows = fill_rows(sizes, length)
    assert sorted(item for row in rows for item in row) == list(range(len(sizes)))
    assert all(row for row in rows)
    assert all(sum(sizes[item] for item in row) <= length for row in rows)
    # Two rows never fit into one, so all but one are more than half full.
    assert len(rows) <= 2 * sum(sizes) / length + 1
    assert rows == fill_rows(sizes, length)


def test_an_item_longer_than_a_row_is_an_error():
    with pytest.raises(ValueError, match="an item of 11 tokens does not fit a row of 10"):
        fill_rows([3, 11], 10)


def preference_sizes(count: int, seed: int = 0) -> ExampleSizes:
    """Of pairs as chat data have them: most short, some of 2,048."""
    rng = np.random.default_rng(seed)
    prompt = np.clip(rng.lognormal(4.0, 0.9, count), 8, 1024)
    responses = [np.clip(rng.lognormal(5.1, 0.8, count), 2, 2048 - prompt) for _ in range(2)]
    return ExampleSizes.of_pairs(np.stack([prompt, *responses], axis=1).astype(int))


def in_steps(count: int, size: int) -> list[np.ndarray]:
    return [np.arange(i, i + size) for i in range(0, count - size + 1, size)]


def time_at(cost: int, layout: StepShapes, batches: list[np.ndarray], sizes: ExampleSizes) -> int:
    """Predicted, in tokens of one row, if a micro-batch costs that many beside its own."""
    time = 0
    for ids in batches:
        for part, rows in zip(layout.parts, layout.rows_of(sizes[ids]), strict=True):
            time += -(-len(rows) // part.rows) * (part.row_length + cost)
    return time


def padding(layout: StepShapes, batches: list[np.ndarray], sizes: ExampleSizes) -> float:
    computed = 0
    for ids in batches:
        for part, rows in zip(layout.parts, layout.rows_of(sizes[ids]), strict=True):
            computed += -(-len(rows) // part.rows) * part.rows * part.row_length
    return 1 - layout.packing.tokens(sizes[np.concatenate(batches)]).sum() / computed


def test_a_hundred_thousand_pairs_are_planned_in_seconds():
    sizes = preference_sizes(100_000)
    batches = in_steps(len(sizes), 128)
    start = time.process_time()
    layout = choose_shapes(batches, sizes, longest_row=8192)
    assert time.process_time() - start < 10
    assert padding(layout, batches, sizes) < 0.02


def test_a_step_that_was_not_looked_at_gets_larger_shapes_of_few_sizes():
    sizes = preference_sizes(4096)
    batches = in_steps(len(sizes), 16)
    layout = choose_shapes(batches[:16], sizes, longest_row=4096)
    found = set()
    for ids in batches:
        rows_of_parts = layout.rows_of(sizes[ids])
        larger = layout.holding(rows_of_parts, sizes[ids])
        for part, before, rows in zip(larger.parts, layout.parts, rows_of_parts, strict=True):
            assert (part.rows, part.row_length) == (before.rows, before.row_length)
            assert len(rows) <= part.micro_batches * part.rows
            assert all(sizes.targets[ids[row]].sum() <= part.targets <= part.row_length for row in rows)
            assert all(len(row) <= part.examples and 2 * len(row) <= part.responses for row in rows)
        found.add(larger)
    assert layout in found and 1 < len(found) < 12


def test_a_step_with_the_first_comparisons_of_a_run_gets_room_for_them():
    """The steps that were looked at had single answers alone."""
    one = np.ones(2, int)
    sizes = ExampleSizes(9 * one, 9 * one, 0 * one, responses=np.array([1, 2]), comparisons=np.array([0, 1]))
    layout = choose_shapes([np.array([0])], sizes[np.array([0])])
    assert layout.parts[0].comparisons == 0
    (part,) = layout.holding([[[1]]], sizes).parts
    assert (part.comparisons, part.responses) == (1, 2)


@pytest.mark.parametrize("size, devices", [(16, 1), (32, 1), (128, 1), (128, 8)])
def test_little_of_the_rows_is_padding(size, devices):
    sizes = preference_sizes(1024)
    batches = in_steps(len(sizes), size)
    layout = choose_shapes(batches, sizes, row_multiple=devices)
    assert len(layout.parts) <= MAX_SHAPES
    assert padding(layout, batches, sizes) < 0.05
    one_shape = choose_shapes(batches, sizes, row_multiple=devices, max_shapes=1)
    assert padding(layout, batches, sizes) < padding(one_shape, batches, sizes)


def test_shapes_take_the_least_time_at_the_price_that_they_are_chosen_at():
    """Few long rows where a micro-batch is dear, little padding where it is cheap."""
    sizes = preference_sizes(1024)
    batches, prices = in_steps(len(sizes), 32), (0, 200, 2000)
    layouts = [choose_shapes(batches, sizes, longest_row=8192, micro_batch_tokens=price) for price in prices]
    for price, layout in zip(prices, layouts, strict=True):
        # The first choices bind the later ones, and a further shape must save 1%.
        best = min(time_at(price, other, batches, sizes) for other in layouts)
        assert time_at(price, layout, batches, sizes) <= best / 0.98
    cheap, _, dear = (time_at(1, each, batches, sizes) - time_at(0, each, batches, sizes) for each in layouts)
    assert dear < 0.6 * cheap  # micro-batches
    assert padding(layouts[0], batches, sizes) < padding(layouts[2], batches, sizes)


def test_another_shape_is_compiled_if_the_run_saves_more_than_that_takes():
    sizes = preference_sizes(1024)
    batches = in_steps(len(sizes), 16)

    def shapes(**options) -> StepShapes:
        return choose_shapes(batches, sizes, longest_row=8192, micro_batch_tokens=40, **options)

    one, two = (time_at(40, shapes(max_shapes=count), batches, sizes) for count in (1, 2))
    assert one - two > 0.02 * one
    assert len(shapes(shape_tokens=1.001 * (one - two)).parts) == 1
    assert len(shapes(shape_tokens=0.999 * (one - two)).parts) > 1


def test_a_step_takes_its_cheapest_micro_batches_not_those_with_the_least_padding():
    """Rows of 1,024 and of 256 tokens, for pairs of 200, 200 and 200."""
    rows = PartShape.of_pairs(1, 1, 1024, targets=1024, pairs=8), PartShape.of_pairs(4, 1, 256, targets=256, pairs=8)
    sizes = ExampleSizes.of_pairs(np.array([[50, 100, 50]] * 3))
    for price, numbers in ((0, [0, 3]), (600, [1, 0])):
        assert [len(found) for found in StepShapes(rows, micro_batch_tokens=price).rows_of(sizes)] == numbers


def test_an_example_that_fits_no_row_is_an_error():
    shape = PartShape.of_pairs(1, 1, 256, targets=256, pairs=8)
    with pytest.raises(ValueError, match="an example of 300 tokens does not fit a row of 256"):
        StepShapes((shape,)).rows_of(ExampleSizes.of_pairs(np.array([[100, 100, 100]])))


def test_the_price_is_that_of_the_platform_unless_it_is_given(monkeypatch):
    sizes, chosen = preference_sizes(64), []
    for platform in MICRO_BATCH_TOKENS:
        monkeypatch.setattr(shapes, "platform", lambda platform=platform: platform)
        chosen.append(choose_shapes(in_steps(64, 16), sizes))
        assert chosen[-1] == choose_shapes(in_steps(64, 16), sizes, micro_batch_tokens=MICRO_BATCH_TOKENS[platform])
    assert len({repr(each) for each in chosen}) == 3  # by which processes see that they agree


@settings(deadline=None, max_examples=30)
@given(
    count=st.integers(1, 40),
    batch_size=st.integers(1, 12),
    row_multiple=st.sampled_from([1, 2, 8]),
    longest_row=st.sampled_from([None, 1, 256, 512]),
    packing=st.builds(PackingConfig, st.booleans(), st.booleans()),
    seed=st.integers(0, 5),
)
def test_one_layout_holds_every_batch_of_a_run(count, batch_size, row_multiple, longest_row, packing, seed):
    pairs = table_of(random_pairs(count, seed=seed, prompt=90, response=70))
    order = np.random.default_rng(seed).permutation(count)
    batches = [order[i : i + batch_size] for i in range(0, count, batch_size)]
    layout = choose_shapes(batches, pairs.sizes, row_multiple=row_multiple, longest_row=longest_row, packing=packing)
    assert 1 <= len(layout.parts) <= MAX_SHAPES
    longest_pair = packing.shortest_row(pairs.sizes)
    for part in layout.parts:
        assert part.rows == row_multiple
        assert longest_row is None or part.row_length <= max(longest_row, longest_pair)
    for ids in batches:
        found = {}
        for part, rows in zip(layout.parts, layout.rows_of(pairs.sizes[ids]), strict=True):
            assert packing.packing or all(len(row) == 1 for row in rows)
            batch = pack(pairs, [ids[row] for row in rows], part, share_prefix=packing.share_prefix)
            found |= read_pairs(batch, packing.share_prefix)
        assert found == {int(i): tuple(part.tolist() for part in pairs[int(i)].parts) for i in ids}


def read_pairs(batch: PreferenceBatch, share_prefix: bool) -> dict[int, tuple[list[int], ...]]:
    """By id, the tokens of the pairs of a batch, read off its segments, branches and targets."""
    found = {}
    arrays = (batch.tokens, batch.segment_ids, batch.branch_ids, batch.examples.ids, batch.response_tokens)
    flat = [np.asarray(array.array) for array in arrays]
    for tokens, segments, branches, ids, counts in zip(
        *(array.reshape(-1, array.shape[-1]) for array in flat), strict=True
    ):
        for slot, pair_id in enumerate(ids):
            if pair_id < 0:
                continue
            of_branch = [tokens[(segments == slot + 1) & (branches == branch)].tolist() for branch in range(3)]
            if not share_prefix:
                chosen, rejected = (len(of_branch[b]) - counts[2 * slot + b - 1] for b in (1, 2))
                assert not of_branch[0] and of_branch[1][:chosen] == of_branch[2][:rejected]
                of_branch = [of_branch[1][:chosen], of_branch[1][chosen:], of_branch[2][rejected:]]
            found[int(pair_id)] = tuple(of_branch)
    return found
