"""Rates of verdicts by hand, and against scipy's own optimizer."""

import numpy as np
import pytest
from scipy.optimize import minimize

from lora_dpo_jax.judging.rates import RIDGE, Rates, length_controlled, outcome, rates_of

WIN, LOSS, TIE = ("first", "second"), ("second", "first"), ("tie", "tie")
FIRST, SECOND, HALF, NONE = ("first", "first"), ("second", "second"), ("first", "tie"), ("first", None)


def of(verdicts, lengths=None, seed=0) -> Rates:
    return rates_of(verdicts, lengths or [(10, 10)] * len(verdicts), seed=seed)


def test_a_win_counts_only_if_both_orders_agree():
    found = {both: outcome(*both) for both in (WIN, LOSS, TIE, FIRST, SECOND, HALF, NONE, ("tie", "first"))}
    assert list(found.values()) == ["win", "loss", "tie", *["inconsistent"] * 3, "unparsed", "inconsistent"]


def test_rates_are_shares_of_all_prompts_and_the_win_rate_is_one_of_those_that_agree():
    found = of([*[WIN] * 4, *[LOSS] * 2, *[TIE] * 1, *[FIRST] * 2, NONE])
    assert found.counts == {"win": 4, "loss": 2, "tie": 1, "inconsistent": 2, "unparsed": 1}
    values = {name: rate.value for name, rate in found.rates.items()}
    assert values == pytest.approx({"win": 0.4, "loss": 0.2, "tie": 0.1, "inconsistent": 0.2, "unparsed": 0.1})
    assert found.win_rate.value == pytest.approx((4 + 0.5) / 7)
    # Of 6 prompts with opposite preferences each place is preferred once; 2 prefer the first twice, and one once.
    assert found.prefers_first.value == pytest.approx((6 + 4 + 1) / (12 + 4 + 1))


def test_intervals_are_those_of_the_binomial_for_many_prompts():
    found = of([*[WIN] * 300, *[LOSS] * 100])
    low, high = found.win_rate.low, found.win_rate.high
    deviation = (0.75 * 0.25 / 400) ** 0.5
    # The percentiles of 2,000 samples vary by a tenth of the deviation, and rates by 1 / 400.
    np.testing.assert_allclose([low, high], 0.75 + 1.96 * deviation * np.array([-1, 1]), atol=0.2 * deviation)
    assert of([*[WIN] * 300, *[LOSS] * 100]) == found != of([*[WIN] * 300, *[LOSS] * 100], seed=1)


def test_a_judge_that_always_prefers_the_first_answer_says_nothing():
    found = of([FIRST] * 8, [(5, 3)] * 8)
    assert found.rates["inconsistent"].value == 1.0
    assert (found.prefers_first.value, found.prefers_first.low) == (1.0, 1.0)
    for rate in (found.win_rate, found.length_controlled_win_rate):
        assert rate.value is None and str(rate) == "undefined: the judge's two orders agree on no prompt"


def test_replies_that_cannot_be_read_leave_no_rate_but_their_own():
    found = of([(None, None)] * 3)
    assert found.rates["unparsed"].value == 1.0 and found.win_rate.value is None
    assert str(found.prefers_first) == "undefined: no verdict prefers one of the places"


def test_a_rate_of_few_prompts_has_no_interval_if_it_is_undefined_for_most_samples():
    assert of([WIN] + [FIRST] * 40).win_rate.low is not None  # 63% of the samples hold the one prompt
    rare = length_controlled(np.array([1.0, -1.0]), np.array([1.0, 0.0]), np.array([[0.0, 0.0], [1.0, 1.0]]))
    assert np.isnan(rare[0]) and rare[1] == pytest.approx(0.5)


def test_answers_of_equal_length_have_the_plain_rate():
    found = of([WIN, WIN, LOSS, TIE])
    assert found.length_controlled_win_rate == found.win_rate


def lengths_of(seed: int, count: int, more: int) -> list[tuple[int, int]]:
    drawn = np.random.default_rng(seed).integers(10, 200, (count, 2)) + [more, 0]
    return [(int(one), int(other)) for one, other in drawn]


@pytest.mark.parametrize("seed", range(4))
def test_the_length_controlled_rate_is_that_of_a_regression_by_scipy(seed):
    rng, lengths = np.random.default_rng(seed), lengths_of(seed, 60, 40)
    differences = np.array([one - other for one, other in lengths], np.float64)
    x = np.tanh(differences / differences.std())
    y = (rng.random(60) < 1 / (1 + np.exp(-(0.6 * seed - 0.8 + 1.5 * x)))).astype(float)
    y[:5] = 0.5

    def loss(parameters):
        logits = parameters[0] + parameters[1] * x
        return (np.logaddexp(0, logits) - y * logits).sum() + RIDGE / 2 * parameters[1] ** 2

    expected = 1 / (1 + np.exp(-minimize(loss, [0.0, 0.0], tol=1e-10).x[0]))
    verdicts = [{1.0: WIN, 0.0: LOSS, 0.5: TIE}[float(value)] for value in y]
    found = of(verdicts, lengths).length_controlled_win_rate
    assert found.value == pytest.approx(expected, abs=1e-5)
    assert found.low is not None and found.high is not None and found.low < expected < found.high


def test_one_that_prefers_the_longer_answer_is_told_from_one_that_prefers_the_candidate():
    # A candidate that is mostly longer, and a judge that sees nothing but length.
    lengths = lengths_of(1, 60, 60)
    found = of([WIN if one > other else LOSS for one, other in lengths], lengths)
    assert found.win_rate.value is not None and found.length_controlled_win_rate.value is not None
    assert found.win_rate.value > 0.75
    assert found.length_controlled_win_rate.value == pytest.approx(0.5, abs=0.15)
    # A judge that prefers the candidate at any length.
    found = of([WIN] * 60, lengths)
    assert (found.win_rate.value, found.length_controlled_win_rate.value) == (1.0, 1.0)


def test_one_that_is_always_longer_and_always_wins_has_no_length_controlled_rate():
    found = of([WIN] * 9, [(20 + number, 10) for number in range(9)])
    assert found.win_rate.value == 1.0
    assert str(found.length_controlled_win_rate).startswith("undefined: every answer of the candidate is longer")
    found = of([LOSS] * 9, [(10, 20 + number) for number in range(9)])
    assert "is shorter than the baseline's and loses" in str(found.length_controlled_win_rate)
    found = of([WIN, LOSS, WIN, LOSS], [(20, 10)] * 4)
    assert "longer than the baseline's by the same length" in str(found.length_controlled_win_rate)


def test_a_rate_beyond_the_lengths_that_were_seen_says_so():
    lengths = [(20 + number, 10) for number in range(12)]
    found = of([WIN if number % 3 else LOSS for number in range(12)], lengths).length_controlled_win_rate
    assert found.value is not None and "extrapolated: every answer of the candidate is longer" in str(found)
