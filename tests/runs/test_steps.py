"""Which pairs the steps of a run train on."""

import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_pairs import random_pairs

from lora_dpo_jax.data import ExampleTable, MemoryExamples, PackingConfig, whole_table
from lora_dpo_jax.data.examples import ExampleSizes
from lora_dpo_jax.data.order import ExampleOrder, StepIds
from lora_dpo_jax.data.shapes import choose_shapes
from lora_dpo_jax.runs.steps import TOKENS_AT_ONCE, Steps, lay_out_steps, pair_order, row_bound
from lora_dpo_jax.sharding import MeshConfig, Placement


def test_a_component_of_which_all_pairs_are_held_out_is_named():
    nothing_left = ExampleTable({"prefs": (MemoryExamples([([1], [2], [3])]), np.zeros(0, int))})
    with pytest.raises(ValueError, match=r"data\.train_weights\.prefs=2\.0, but all pairs of prefs are held out"):
        pair_order(nothing_left, seed=0, shuffle=True, weights={"prefs": 2.0})


def test_weights_are_matched_to_components_by_name():
    pairs = whole_table({"many": random_pairs(6), "few": random_pairs(2)})
    order = pair_order(pairs, seed=0, shuffle=False, weights={"few": 1.0, "many": 0.0})
    assert set(order.batch(0, 8)) == {6, 7}


def test_batches_from_a_later_step_are_those_of_the_whole_run():
    pairs, placement = whole_table({"prefs": random_pairs(12)}), Placement(MeshConfig())
    ids = list(np.arange(12).reshape(3, 4))
    steps = lay_out_steps(pairs, ids, PackingConfig(), parallelism=-1, row_shards=placement.row_shards)
    assert len(steps) == 3
    trained_on = [
        {*part.examples.ids.array.ravel().tolist()} - {-1} for parts in steps.batches(placement) for part in parts
    ]
    resumed = [
        {*part.examples.ids.array.ravel().tolist()} - {-1}
        for parts in steps.batches(placement, steps=range(2, len(steps)))
        for part in parts
    ]
    assert trained_on == [set(step.tolist()) for step in ids]
    assert resumed == trained_on[2:]


def test_a_long_run_of_the_same_steps_compiles_more_shapes_than_a_short_one():
    pairs = whole_table({"prefs": random_pairs(16, prompt=300, response=200)})

    def shapes(num_steps: int) -> int:
        ids = StepIds(ExampleOrder((16,), 0), 4, num_steps, False)
        steps = lay_out_steps(pairs, ids, PackingConfig(), parallelism=-1, row_shards=1, shape_tokens=20_000)
        return len(steps.shapes.parts)

    assert shapes(4) == 1 < shapes(100_000)


def test_rows_of_other_lengths_have_another_number():
    """So scores that were computed in them are not taken for those of step 0."""
    pairs = whole_table({"prefs": random_pairs(20, prompt=90, response=70)})
    ids, placement = [np.arange(20)], Placement(MeshConfig(), jax.devices()[:1])
    numbers = {}
    for price in (0, 10_000):
        shapes = choose_shapes(ids, pairs.sizes, longest_row=2048, micro_batch_tokens=price)
        numbers[shapes.parts] = Steps(pairs, ids, shapes).number_of_rows(0, placement)
    assert len(set(numbers.values())) == len(numbers) == 2


@pytest.mark.parametrize("components", [1, 500])
def test_twenty_million_steps_over_a_million_pairs_are_planned_in_seconds(components):
    """And need no memory of their own."""
    rng, counts = np.random.default_rng(0), (1_000_000 // components,) * components
    weights = None if components == 1 else tuple(rng.uniform(0.1, 3.0, components).tolist())
    table = SimpleNamespace(sizes=ExampleSizes.of_pairs(rng.integers(20, 400, (1_000_000, 3))))
    order = ExampleOrder(counts, 0, True, weights)
    began = time.process_time()
    ids, packing = StepIds(order, 16, num_steps=20_000_000), PackingConfig()
    steps = lay_out_steps(table, ids, packing, parallelism=-1, row_shards=1)  # pyright: ignore[reportArgumentType]
    assert len(steps.ids[19_999_999]) == 16
    assert len(steps.ids.visited()) == 1_000_000
    assert time.process_time() - began < 6


def test_a_row_holds_what_a_device_may_compute_at_once_and_always_the_longest_pair():
    assert row_bound(-1, 512) == TOKENS_AT_ONCE
    assert row_bound(-1, 2 * TOKENS_AT_ONCE) == 2 * TOKENS_AT_ONCE
    assert row_bound(3, 512) == 3 * 512
