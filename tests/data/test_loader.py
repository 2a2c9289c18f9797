"""Which pairs a step trains on, which are held out, and how they get to the device."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_pairs import random_pairs, table_of

from lora_dpo_jax.data.loader import (
    BLOCK,
    PairOrder,
    PairTable,
    packed_batches,
    packed_rows,
    prefetch,
    split_by_prompt,
    whole_table,
)
from lora_dpo_jax.data.memory import MemoryPairs
from lora_dpo_jax.data.planning import plan_layout

ORDERS = {
    "shuffled": PairOrder((7, 20), seed=3),
    "in order": PairOrder((7, 20), seed=3, shuffle=False),
    "weighted": PairOrder((7, 20), seed=3, weights=(3.0, 1.0)),
    "weighted, in order": PairOrder((7, 20), seed=3, shuffle=False, weights=(3.0, 1.0)),
}


@pytest.mark.parametrize("name", ORDERS)
def test_the_order_is_a_function_of_seed_and_step(name):
    order = ORDERS[name]
    forwards = [order.batch(step, 5).tolist() for step in range(60)]
    backwards = [order.batch(step, 5).tolist() for step in reversed(range(60))]
    assert forwards == backwards[::-1]
    # Steps cut one endless sequence: the size of batches does not change it.
    assert np.concatenate([order.batch(step, 12) for step in range(25)]).tolist() == sum(forwards, [])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=3).filter(any), st.integers(0, 3), st.booleans())
def test_every_epoch_holds_each_pair_once(sizes, seed, shuffle):
    total = sum(sizes)
    epochs = PairOrder(tuple(sizes), seed, shuffle).batch(0, 4 * total).reshape(4, total)
    for epoch in epochs:
        assert sorted(epoch) == list(range(total))
    if not shuffle:
        assert epochs[2].tolist() == list(range(total))


def test_epochs_and_seeds_have_orders_of_their_own():
    one, other = (PairOrder((50,), seed).batch(0, 100).reshape(2, 50).tolist() for seed in (0, 1))
    assert one[0] != one[1] and one[0] != other[0] and one[0] != sorted(one[0])


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.7, 0.2, 0.1), (5.0, 0.0, 2.0)])
def test_weights_hold_to_rounding_over_a_block_of_positions(weights):
    sizes = (30, 11, 400)
    starts = np.cumsum([0, *sizes])
    ids = PairOrder(sizes, seed=1, weights=weights).batch(0, 3 * BLOCK)
    for block in ids.reshape(3, BLOCK):
        counts = np.histogram(block, starts)[0]
        assert np.all(np.abs(counts - BLOCK * np.array(weights) / sum(weights)) < 1)
    for component, size in enumerate(sizes):
        own = ids[(ids >= starts[component]) & (ids < starts[component + 1])]
        for start in range(0, len(own) - size + 1, size):
            assert len(set(own[start : start + size])) == size, "a component goes through its own epochs"


def test_weighted_components_go_through_different_epochs_in_different_orders():
    ids = PairOrder((16,), seed=1, weights=(1.0,)).batch(0, 32).tolist()
    assert ids[:16] != ids[16:]


@pytest.mark.parametrize(
    "sizes, weights, message",
    [
        ((), None, "no training pairs"),
        ((0, 0), None, "no training pairs"),
        ((4, 0), (0.5, 0.5), "gives weight to a component without training pairs"),
    ],
)
def test_impossible_orders_are_errors(sizes, weights, message):
    with pytest.raises(ValueError, match=message):
        PairOrder(sizes, seed=0, weights=weights)


def components_sharing_prompts() -> dict[str, MemoryPairs]:
    """Prompts with one pair and with many, some of them in both components."""
    rng = np.random.default_rng(0)
    prompts = np.concatenate([rng.integers(0, 150, 300), rng.integers(100, 400, 200)])
    pairs = [([prompt], *responses) for prompt, (_, *responses) in zip(prompts, random_pairs(500), strict=True)]
    return {"one": MemoryPairs(pairs[:300], "one"), "two": MemoryPairs(pairs[300:], "two")}


def prompts_of(table: PairTable, components: dict[str, MemoryPairs]) -> list[int]:
    found = []
    for index in range(len(table)):
        name, row = table.origin(index).split(", row ")
        found.append(int(components[name].prompt_hashes[int(row)]))
    return found


def test_a_subset_holds_the_same_pairs_in_the_same_order():
    table, _ = split_by_prompt(components_sharing_prompts(), 0.3, seed=0)
    ids = np.flatnonzero(np.random.default_rng(1).random(len(table)) < 0.4)
    last_of_one, first_of_two = table.sizes[0] - 1, table.sizes[0]
    for some in (ids, ids[:0], ids[ids > last_of_one], np.array([last_of_one, first_of_two])):
        subset = table.subset(some)
        assert [subset.origin(i) for i in range(len(subset))] == [table.origin(int(i)) for i in some]
        np.testing.assert_array_equal(subset.lengths, table.lengths[some])
        assert (subset.names, sum(subset.sizes)) == (table.names, len(some))


@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_training_and_validation_share_no_prompt(fraction):
    components = components_sharing_prompts()
    train, validation = split_by_prompt(components, fraction, seed=0)
    assert not set(prompts_of(train, components)) & set(prompts_of(validation, components))
    origins = [table.origin(i) for table in (train, validation) for i in range(len(table))]
    assert len(origins) == len(set(origins)) == 500
    assert len(validation) == pytest.approx(fraction * 500, abs=5)
    for mine, expected in zip(validation.sizes, (300, 200), strict=True):
        assert mine == pytest.approx(fraction * expected, rel=0.6)


def test_the_split_depends_on_the_seed_alone():
    components = components_sharing_prompts()
    one, again, other = (split_by_prompt(components, 0.1, seed=seed)[1] for seed in (0, 0, 1))
    origins = [[table.origin(i) for i in range(len(table))] for table in (one, again, other)]
    assert origins[0] == origins[1] != origins[2]


def test_nothing_is_held_out_of_a_fraction_of_zero():
    train, validation = split_by_prompt(components_sharing_prompts(), 0.0, seed=0)
    assert (len(train), len(validation)) == (500, 0)


def test_a_table_numbers_its_components_through():
    one, two = random_pairs(3, name="one"), random_pairs(4, seed=1, name="two")
    table = PairTable({"one": (one, np.array([2, 0])), "none": (two, np.array([], int)), "two": (two, np.arange(4))})
    expected = [one[2], one[0], *two.pairs]
    assert len(table) == 6 and table.sizes == [2, 0, 4]
    for pair, (index, mine) in zip(expected, enumerate(table), strict=True):
        assert mine is pair
        assert table.lengths[index].tolist() == [len(tokens) for tokens in pair]
    assert [table.origin(i) for i in range(6)] == ["one, row 2", "one, row 0", *(f"two, row {i}" for i in range(4))]
    assert len(whole_table({"one": one, "two": two})) == 7
    assert len(PairTable({})) == 0


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_packed_rows_yield_each_pair_once(rows):
    pairs = table_of(random_pairs(40, seed=2))
    total, batches = packed_rows(pairs, rows=rows, place=lambda batch: batch)
    batches = list(batches)
    assert len(batches) == total
    assert {batch.tokens.array.shape[:2] for batch in batches} == {(1, rows)}
    ids = np.concatenate([np.ravel(batch.pair_ids.array) for batch in batches])
    assert sorted(ids[ids >= 0]) == list(range(40))


def test_batches_hold_the_pairs_asked_for_in_their_order():
    pairs = table_of(random_pairs(20, seed=2))
    order = PairOrder((20,), seed=0)
    wanted = [order.batch(step, 6) for step in range(5)]
    layout = plan_layout(wanted, pairs.lengths)
    placed = []
    batches = list(packed_batches(pairs, wanted, layout, place=lambda batch: placed.append(batch) or batch))
    assert all(batch is other for batch, other in zip(batches, placed, strict=True))
    for ids, batch in zip(wanted, batches, strict=True):
        found = np.concatenate([np.ravel(part.pair_ids.array) for part in batch])
        assert sorted(found[found >= 0]) == sorted(ids)


def packing_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "packing"]


def test_results_come_in_order_and_few_are_made_ahead():
    made = []

    def job(number):
        return lambda: made.append(number) or number

    results = prefetch((job(i) for i in range(20)), ahead=2)
    for expected, result in zip(range(20), results, strict=True):
        assert result == expected
        # Two in the queue, one in the making.
        assert len(made) <= expected + 1 + 2 + 1
    assert not packing_threads()


def test_the_workers_error_is_raised_where_its_result_is_asked_for():
    def jobs():
        yield lambda: 1
        yield lambda: 1 / 0
        yield lambda: pytest.fail("nothing is made after an error")

    results = prefetch(jobs(), ahead=2)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert not packing_threads()


def test_an_error_in_the_list_of_jobs_is_raised_too():
    def jobs():
        yield lambda: 1
        raise KeyError("pair")

    results = prefetch(jobs(), ahead=2)
    assert next(results) == 1
    with pytest.raises(KeyError, match="pair"):
        next(results)
    assert not packing_threads()


def test_a_reader_who_leaves_early_stops_the_thread():
    results = prefetch((lambda: time.sleep(0.001) for _ in range(10**6)), ahead=2)
    next(results)
    assert len(packing_threads()) == 1
    results.close()
    assert not packing_threads()
