"""Which pairs the steps of a run train on: each once an epoch, or drawn from components in exact proportions."""

import itertools
import math
import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_dpo_jax.data.order import BLOCK, ExampleOrder, StepIds, _hash, _Mixture, _shuffled

ORDERS = {
    "shuffled": ExampleOrder((7, 20), seed=3),
    "in order": ExampleOrder((7, 20), seed=3, shuffle=False),
    "weighted": ExampleOrder((7, 20), seed=3, weights=(3.0, 1.0)),
    "weighted, in order": ExampleOrder((7, 20), seed=3, shuffle=False, weights=(3.0, 1.0)),
}
MANY = tuple(np.random.default_rng(0).lognormal(0, 2, 2000).tolist())
# Of each component, never more than two draws more or less than its share: two rounded shares after each other.
WITHIN = 2


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
    epochs = ExampleOrder(tuple(sizes), seed, shuffle).batch(0, 4 * total).reshape(4, total)
    for epoch in epochs:
        assert sorted(epoch) == list(range(total))
    if not shuffle:
        assert epochs[2].tolist() == list(range(total))


def test_without_weights_an_epoch_is_numpys_permutation_of_seed_and_epoch():
    """Runs that began with earlier versions resume with the same pairs."""
    ids = ExampleOrder((7, 20), seed=3).batch(0, 3 * 27)
    expected = [np.random.default_rng([3, 0, epoch]).permutation(27) for epoch in range(3)]
    np.testing.assert_array_equal(ids, np.concatenate(expected))


def test_epochs_and_seeds_have_orders_of_their_own():
    one, other = (ExampleOrder((50,), seed).batch(0, 100).reshape(2, 50).tolist() for seed in (0, 1))
    assert one[0] != one[1] and one[0] != other[0] and one[0] != sorted(one[0])


@settings(deadline=None, max_examples=100)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    size=st.integers(1, 9),
    num_steps=st.integers(1, 40),
    short_ends=st.booleans(),
    shuffle=st.booleans(),
    weights=st.none() | st.lists(st.sampled_from([0.0, 0.3, 1.0, 7.0]), min_size=5, max_size=5),
)
def test_what_the_steps_visit_is_known_without_going_through_them(sizes, size, num_steps, short_ends, shuffle, weights):
    weights = None if weights is None or not any(weights[: len(sizes)]) else tuple(weights[: len(sizes)])
    steps = StepIds(ExampleOrder(tuple(sizes), 3, shuffle, weights), size, num_steps, short_ends)
    visits = np.concatenate(list(steps))
    assert steps.num_visits == len(visits)
    np.testing.assert_array_equal(steps.visited(), np.unique(visits))


@pytest.mark.parametrize("weights", [None, (2.0, 1.0)])
def test_a_short_batch_ends_an_epoch_and_a_new_batch_begins_the_next(weights):
    order = ExampleOrder((3, 4), seed=0, weights=weights)
    batches = [order.batch(step, 3, short_ends=True) for step in range(7)]
    assert [len(batch) for batch in batches] == [3, 3, 1, 3, 3, 1, 3]
    assert np.concatenate(batches).tolist() == order.batch(0, 17).tolist()
    assert [len(order.batch(step, 9, short_ends=True)) for step in range(3)] == [7, 7, 7]


def test_an_epoch_is_as_long_as_the_components_that_are_drawn_from():
    assert ExampleOrder((3, 4), seed=0).epoch == 7
    assert ExampleOrder((3, 4), seed=0, weights=(0.0, 1.0)).epoch == 4


def worst_error(weights: tuple[float, ...], component: np.ndarray, start: int = 0, before=None) -> float:
    """How far the counts of a few components are from their shares, after any number of positions."""
    total, worst = sum(map(Fraction, weights)), 0.0
    few = {0, len(weights) - 1, *range(0, len(weights), 1 + len(weights) // 20)}
    for number in few:
        count = np.cumsum(component == number) + (0 if before is None else before[number])
        positions = start + 1 + np.arange(len(component))
        worst = max(worst, np.abs(count - positions * float(Fraction(weights[number]) / total)).max())
    return worst


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 1e30), min_size=1, max_size=40).filter(any))
def test_shares_are_exact_whatever_the_weights(weights):
    component, nth = _Mixture(weights).draw(np.arange(3000))
    assert worst_error(tuple(weights), component) <= WITHIN
    for number, weight in enumerate(weights):
        assert nth[component == number].tolist() == list(range(np.sum(component == number)))
        assert weight > 0 or not np.any(component == number)


@pytest.mark.parametrize(
    "weights", [(3000.0, 1.0), (1e6, 1.0), (1.0,) * 2000, MANY, (2000.0, *[1.0] * 2000)], ids=lambda w: str(w[:2])
)
def test_shares_are_exact_after_any_number_of_positions(weights):
    mixture, start = _Mixture(weights), 10**9
    component, _ = mixture.draw(np.arange(50_000))
    assert worst_error(weights, component) <= WITHIN
    # A million steps of a thousand pairs later; what came before is counted by the first of each component there.
    component, nth = mixture.draw(np.arange(start, start + 50_000))
    drawn, first = np.unique(component, return_index=True)
    shares = np.array(weights)[drawn] / math.fsum(weights)
    assert np.all(np.abs(nth[first] - (start + first) * shares) <= WITHIN)


def test_a_rare_component_is_drawn():
    ids = ExampleOrder((100, 5), seed=0, weights=(3000.0, 1.0)).batch(0, 15_005)
    assert sorted(ids[ids >= 100]) == [100, 101, 102, 103, 104]


def test_a_batch_has_each_components_share():
    ids = ExampleOrder((50, 50), seed=0, weights=(3.0, 1.0)).batch(0, 800).reshape(100, 8)
    assert set(np.sum(ids >= 50, axis=1)) == {2}


@pytest.mark.parametrize("shuffle", [True, False])
def test_each_component_goes_through_epochs_of_its_own(shuffle):
    sizes, starts = (30, 11, 400), np.cumsum([0, 30, 11, 400])
    ids = ExampleOrder(sizes, seed=1, shuffle=shuffle, weights=(0.7, 0.2, 0.1)).batch(0, BLOCK + 100)
    for component, size in enumerate(sizes):
        own = ids[(ids >= starts[component]) & (ids < starts[component + 1])] - starts[component]
        epochs = [own[start : start + size].tolist() for start in range(0, len(own) - size + 1, size)]
        assert len(epochs) >= 2
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert (epochs[0] == epochs[1]) is not shuffle
    other_seed = ExampleOrder(sizes, seed=2, shuffle=shuffle, weights=(0.7, 0.2, 0.1)).batch(0, 500)
    assert np.array_equal(other_seed, ids[:500]) is not shuffle


@pytest.mark.parametrize("size", [*range(1, 40), 1000, 4097])
def test_a_shuffle_sends_each_element_somewhere_else(size):
    key = np.full(size, 7, np.uint64)
    assert sorted(_shuffled(np.arange(size), np.full(size, size), key)) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_orders_of_a_few_elements_are_equally_frequent(size):
    shuffles = 20_000
    key = _hash(np.uint64(1), 0, np.arange(shuffles, dtype=np.uint64)).repeat(size)
    index = np.tile(np.arange(size), shuffles)
    orders = Counter(map(tuple, _shuffled(index, np.full_like(index, size), key).reshape(-1, size).tolist()))
    expected = shuffles / math.factorial(size)
    chi_squared = sum((orders[o] - expected) ** 2 / expected for o in itertools.permutations(range(size)))
    freedom = math.factorial(size) - 1
    assert chi_squared < freedom + 4 * math.sqrt(2 * freedom)  # a chance of about 1 in 10,000


def test_an_element_of_many_may_go_anywhere():
    """The first of 1000 elements, by 20,000 keys: in each of ten parts about as often."""
    keys = np.arange(20_000, dtype=np.uint64)
    counts = np.bincount(_shuffled(np.zeros(20_000, int), np.full(20_000, 1000), keys) // 100)
    assert np.all(np.abs(counts - 2000) < 5 * math.sqrt(2000))


def test_choosing_a_pair_costs_the_same_with_two_or_two_thousand_components():
    def seconds(count: int) -> float:
        order = ExampleOrder((50,) * count, seed=0, weights=tuple(np.random.default_rng(1).random(count).tolist()))
        start = time.process_time()
        for step in range(10 * BLOCK // 32):
            order.batch(step, 32)
        return time.process_time() - start

    assert min(seconds(2000) for _ in range(3)) < 5 * min(seconds(2) for _ in range(3))


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
        ExampleOrder(sizes, seed=0, weights=weights)
