"""A ranking as a whole has the likelihood of Plackett and Luce."""

import dataclasses
import itertools
import math

import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses_by_hand import B, Numbers, loss_of, losses_of, random_numbers
from tiny_pairs import named

from lora_dpo_jax.data.examples import TokenizedExample
from lora_dpo_jax.data.memory import MemoryExamples
from lora_dpo_jax.losses import Examples, Scores
from lora_dpo_jax.losses.examples import greatest

ONE = np.ones(1, np.int32)
RANKING = [3, 1, 0, 2]  # the responses of an example, from the best one to the worst one


def ranked(comparisons: list[tuple[int, int]], weights: list[float] | None = None, copies: int = 1) -> Examples:
    example = TokenizedExample(ONE, (ONE,) * 4, tuple(comparisons), None if weights is None else tuple(weights))
    return MemoryExamples([example] * copies).arrays.examples


def all_of(order: list[int]) -> list[tuple[int, int]]:
    return list(itertools.combinations(order, 2))


def in_rows(examples: Examples, *arrays: hax.NamedArray):
    def row(x: hax.NamedArray) -> hax.NamedArray:
        return hax.named(x.array[None], (hax.Axis("row", 1), *x.axes))

    return jax.tree.map(row, (examples, *arrays), is_leaf=lambda x: isinstance(x, hax.NamedArray))


def log_ratios(values: Numbers) -> tuple[Scores, Scores]:
    tokens = named(np.full(len(values), 4), "response")
    policy, reference = (named(np.asarray(x, np.float32), "response") for x in (values - 20, np.full(len(values), -20)))
    return Scores(policy, tokens), Scores(reference, tokens)


def choices(rewards: Numbers, sets: list[tuple[int, list[int]]]) -> float:
    """By hand, in float64: the negative log-likelihood of choosing each first response from itself and the others."""
    return sum(np.log(np.exp(rewards[[first, *others]] - rewards[first]).sum()) for first, others in sets)


@pytest.mark.parametrize("has_rows", [False, True])
def test_plackett_luce_is_the_likelihood_of_the_ranking(has_rows):
    rng = np.random.default_rng(2)
    ratios = rng.normal(0, 4, 8)
    (policy, reference), examples = log_ratios(ratios), ranked(all_of(RANKING), [0.4] * 6, copies=2)
    if has_rows:
        examples, policy, reference = in_rows(examples, policy, reference)
    found = loss_of("plackett_luce")(policy, reference, examples)
    sets = [(RANKING[at], RANKING[at + 1 :]) for at in range(3)]
    expected = [choices(B * x, sets) for x in (ratios[:4], ratios[4:])]
    np.testing.assert_allclose(np.ravel(found.loss.array), [2.4 * x for x in expected], rtol=1e-5)
    assert float(found.metrics["plackett_luce_loss"].value) == pytest.approx(np.mean(expected), rel=1e-5)
    equal = loss_of("plackett_luce").loss_where_equal(ranked(all_of(RANKING)))
    assert equal == pytest.approx(math.log(math.factorial(4)), rel=1e-6)


def test_the_gradient_of_plackett_luce_is_that_of_its_formula():
    ratios = np.random.default_rng(3).normal(0, 4, 4)
    examples, sets = ranked(all_of(RANKING)), [(RANKING[at], RANKING[at + 1 :]) for at in range(3)]

    def total(log_probs: jax.Array) -> jax.Array:
        policy, reference = log_ratios(ratios)
        policy = dataclasses.replace(policy, log_probs=named(log_probs, "response"))
        return loss_of("plackett_luce")(policy, reference, examples).loss.sum().scalar()

    slopes = jax.jit(jax.grad(total))(jnp.asarray(ratios - 20, jnp.float32))
    for at, step in enumerate(1e-6 * np.eye(4)):
        slope = (choices(B * (ratios + step), sets) - choices(B * (ratios - step), sets)) / 2e-6
        assert float(slopes[at]) == pytest.approx(slope, rel=1e-3, abs=1e-6)


def test_plackett_luce_of_pairs_is_sigmoid_to_the_bit():
    numbers = random_numbers(15)
    for settings in ({}, {"f_divergence_type": "js_divergence"}):
        losses = [loss_of(name, **settings) for name in ("plackett_luce", "sigmoid")]
        np.testing.assert_array_equal(*(losses_of(loss, numbers) for loss in losses))


def test_ties_are_left_out_or_chosen_from_each_other():
    """Responses 1 and 0 are tied: neither is among those that the other is chosen from, or each is."""
    ratios = np.random.default_rng(4).normal(0, 4, 4)
    policy, reference = log_ratios(ratios)
    dropped = [pair for pair in all_of(RANKING) if pair != (1, 0)]
    both = [*dropped, (1, 0), (0, 1)]
    loss = loss_of("plackett_luce")
    found = loss(policy, reference, ranked(dropped)).loss.array[0]
    assert found == pytest.approx(choices(B * ratios, [(3, [1, 0, 2]), (1, [2]), (0, [2])]), rel=1e-5)
    weights = [1 / 6] * 5 + [1 / 12] * 2
    found = loss(policy, reference, ranked(both, weights)).loss.array[0]
    assert found == pytest.approx(choices(B * ratios, [(3, [1, 0, 2]), (1, [0, 2]), (0, [1, 2])]), rel=1e-5)


def test_a_ranking_of_far_apart_rewards_has_finite_gradients():
    policy, reference = log_ratios(np.array([0.0, 1e4, -1e4, 30.0]))
    examples = ranked(all_of(RANKING))

    def total(log_probs: jax.Array) -> jax.Array:
        scored = dataclasses.replace(policy, log_probs=named(log_probs, "response"))
        return loss_of("plackett_luce")(scored, reference, examples).loss.sum().scalar()

    value, slopes = jax.jit(jax.value_and_grad(total))(policy.log_probs.array)
    assert np.isfinite(float(value)) and np.isfinite(slopes).all() and np.any(slopes)


@pytest.mark.parametrize("rows", [(), (2,)])
def test_the_greatest_of_a_slot_is_that_of_its_row(rows):
    rng = np.random.default_rng(5)
    axes = ["row"][: len(rows)]
    index = named(rng.integers(-1, 3, (*rows, 6)), *axes, "slot")
    values = named(rng.normal(size=(*rows, 6)).astype(np.float32), *axes, "slot")
    found = greatest(values, index, hax.Axis("example", 5))
    for at in np.ndindex(*rows, 5):
        mine = np.asarray(values.array)[at[:-1]][np.asarray(index.array)[at[:-1]] == at[-1]]
        assert found.array[at] == (mine.max() if mine.size else 0.0)


def test_weighting_by_pairs_is_not_of_rankings():
    with pytest.raises(ValueError, match=r"loss\.use_weighting=true weighs single pairs"):
        loss_of("plackett_luce", use_weighting=True)


def test_a_comparison_of_weight_0_counts_for_nothing():
    policy, reference = log_ratios(np.random.default_rng(6).normal(0, 4, 4))
    loss, some = loss_of("plackett_luce"), all_of(RANKING)[:4]
    without = loss(policy, reference, ranked(some, [0.25] * 4)).loss.array
    found = loss(policy, reference, ranked(all_of(RANKING), [0.25] * 4 + [0.0] * 2)).loss.array
    np.testing.assert_allclose(found, without, rtol=1e-6)
