"""Which pairs are held out, and how those of a step get to the device."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from tiny_pairs import random_pairs, table_of

from lora_dpo_jax.data.batches import packed_batches, packed_rows, prefetch
from lora_dpo_jax.data.memory import MemoryExamples
from lora_dpo_jax.data.order import ExampleOrder
from lora_dpo_jax.data.shapes import choose_shapes
from lora_dpo_jax.data.table import ExampleTable, split_by_prompt, whole_table, why_none_is_held_out


def components_sharing_prompts() -> dict[str, MemoryExamples]:
    """Prompts with one pair and with many, some of them in both components."""
    rng = np.random.default_rng(0)
    prompts = np.concatenate([rng.integers(0, 150, 300), rng.integers(100, 400, 200)])
    pairs = [
        ([prompt], *responses)
        for prompt, (_, *responses) in zip(prompts, [pair.parts for pair in random_pairs(500)], strict=True)
    ]
    return {"one": MemoryExamples(pairs[:300], "one"), "two": MemoryExamples(pairs[300:], "two")}


def prompts_of(table: ExampleTable, components: dict[str, MemoryExamples]) -> list[int]:
    found = []
    for index in range(len(table)):
        name, row = table.origin(index).split(", row ")
        found.append(int(components[name].prompt_hashes[int(row)]))
    return found


def test_a_subset_holds_the_same_pairs_in_the_same_order():
    table, _ = split_by_prompt(components_sharing_prompts(), 0.3, seed=0)
    ids = np.flatnonzero(np.random.default_rng(1).random(len(table)) < 0.4)
    last_of_one, first_of_two = table.counts[0] - 1, table.counts[0]
    for some in (ids, ids[:0], ids[ids > last_of_one], np.array([last_of_one, first_of_two])):
        subset = table.subset(some)
        assert [subset.origin(i) for i in range(len(subset))] == [table.origin(int(i)) for i in some]
        np.testing.assert_array_equal(subset.sizes.tokens, table.sizes.tokens[some])
        assert (subset.names, sum(subset.counts)) == (table.names, len(some))


@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_training_and_validation_share_no_prompt(fraction):
    components = components_sharing_prompts()
    train, validation = split_by_prompt(components, fraction, seed=0)
    assert not set(prompts_of(train, components)) & set(prompts_of(validation, components))
    origins = [table.origin(i) for table in (train, validation) for i in range(len(table))]
    assert len(origins) == len(set(origins)) == 500
    assert len(validation) == pytest.approx(fraction * 500, abs=5)
    for mine, expected in zip(validation.counts, (300, 200), strict=True):
        assert mine == pytest.approx(fraction * expected, rel=0.6)


def test_the_split_depends_on_the_seed_alone():
    components = components_sharing_prompts()
    one, again, other = (split_by_prompt(components, 0.1, seed=seed)[1] for seed in (0, 0, 1))
    origins = [[table.origin(i) for i in range(len(table))] for table in (one, again, other)]
    assert origins[0] == origins[1] != origins[2]


def pairs_of_prompts(counts: list[int]) -> dict[str, MemoryExamples]:
    """A component of so many pairs of each of the prompts."""
    prompts = np.repeat(np.arange(len(counts)), counts)
    return {"all": MemoryExamples([([int(prompt)], [1, number], [2, number]) for number, prompt in enumerate(prompts)])}


@pytest.mark.parametrize(
    "counts, fraction, why",
    [
        ([1] * 30, 0.0, "validation_split_fraction is 0.0, and no component has validation data"),
        ([1] * 4, 0.1, "validation_split_fraction=0.1 of 4 is less than a pair"),
        ([20], 0.1, "all have the same prompt, and no prompt may be in both parts"),
        ([9, 9, 9], 0.2, "each of the 3 prompts has more than the 5 pairs that validation_split_fraction=0.2 is"),
    ],
)
def test_where_nothing_is_held_out_there_is_a_reason(counts, fraction, why):
    train, validation = split_by_prompt(pairs_of_prompts(counts), fraction, seed=0)
    assert (len(train), len(validation)) == (sum(counts), 0)
    assert why in why_none_is_held_out(train, fraction)


@pytest.mark.parametrize("seed", range(5))
def test_a_prompt_with_too_many_pairs_leaves_room_for_the_others(seed):
    _, validation = split_by_prompt(pairs_of_prompts([50] * 3 + [1] * 50), 0.1, seed=seed)
    assert len(validation) == 20


def test_a_table_numbers_its_components_through():
    one, two = random_pairs(3, name="one"), random_pairs(4, seed=1, name="two")
    table = ExampleTable({"one": (one, np.array([2, 0])), "none": (two, np.array([], int)), "two": (two, np.arange(4))})
    expected = [one[2], one[0], *two.examples]
    assert len(table) == 6 and table.counts == [2, 0, 4]
    for pair, (index, mine) in zip(expected, enumerate(table), strict=True):
        assert mine is pair
        assert table.sizes.tokens[index] == pair.size
    assert [table.origin(i) for i in range(6)] == ["one, row 2", "one, row 0", *(f"two, row {i}" for i in range(4))]
    assert len(whole_table({"one": one, "two": two})) == 7
    assert len(ExampleTable({})) == 0


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_packed_rows_yield_each_pair_once(rows):
    pairs = table_of(random_pairs(40, seed=2))
    total, batches = packed_rows(pairs, rows=rows, place=lambda batch: batch)
    batches = list(batches)
    assert len(batches) == total
    assert {batch.tokens.array.shape[:2] for batch in batches} == {(1, rows)}
    ids = np.concatenate([np.ravel(batch.examples.ids.array) for batch in batches])
    assert sorted(ids[ids >= 0]) == list(range(40))


def test_batches_hold_the_pairs_asked_for_in_their_order():
    pairs = table_of(random_pairs(20, seed=2))
    order = ExampleOrder((20,), seed=0)
    wanted = [order.batch(step, 6) for step in range(5)]
    layout = choose_shapes(wanted, pairs.sizes)
    placed = []
    batches = list(packed_batches(pairs, wanted, layout, place=lambda batch: placed.append(batch) or batch))
    assert all(batch is other for batch, other in zip(batches, placed, strict=True))
    for ids, batch in zip(wanted, batches, strict=True):
        found = np.concatenate([np.ravel(part.examples.ids.array) for part in batch])
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


def test_a_program_ends_though_it_has_batches_left():
    """Python 3.13 waited without end for the thread, which stands still while the interpreter ends."""
    program = (
        "import itertools, time\n"
        "from lora_dpo_jax.data.batches import prefetch\n"
        "jobs = ((lambda number=number: (time.sleep(0.01), number)[1]) for number in itertools.count())\n"
        "batches = prefetch(jobs, 2)\n"
        "print(next(batches))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
