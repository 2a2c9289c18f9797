import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_dpo_jax.data.config import FormatConfig
from lora_dpo_jax.data.rows import read_example
from lora_dpo_jax.judging.pairing import (
    OF_COMPARISONS,
    Completion,
    PairingConfig,
    best_worst,
    outcome_of,
    pair,
    rank_and_pair,
    round_robin,
    usable,
    win_shares,
)

SCORES = [2.0, 7.0, 9.0, 7.0]
SOME_SCORES = st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=6)
OUTCOMES = st.sampled_from(["first", "second", "tie", "inconsistent"])


def scored(*scores: float) -> list[Completion]:
    return [Completion(f"answer {number}", score=score) for number, score in enumerate(scores)]


def test_the_best_goes_with_the_worst_each_with_the_next_or_each_with_each_worse_one():
    assert best_worst(SCORES) == ([(2, 0)], Counter())
    assert rank_and_pair(SCORES, "adjacent") == ([(2, 1), (3, 0)], Counter(same_score=1))
    assert rank_and_pair(SCORES) == ([(2, 1), (2, 3), (2, 0), (1, 0), (3, 0)], Counter(same_score=1))
    pairs, dropped = rank_and_pair(SCORES, min_margin=3.0)
    assert (pairs, dropped) == ([(2, 0), (1, 0), (3, 0)], Counter(same_score=1, small_margin=2))


@settings(deadline=None)
@given(SOME_SCORES, st.integers(0, 4).map(float))
def test_all_comparisons_are_those_of_a_greater_score_by_the_margin_and_nothing_is_lost(scores, margin):
    pairs, dropped = rank_and_pair(scores, "all", min_margin=margin)
    numbers = range(len(scores))
    differences = {(a, b): scores[a] - scores[b] for a, b in itertools.permutations(numbers, 2)}
    assert sorted(pairs) == sorted(ab for ab, gap in differences.items() if gap > 0 and gap >= margin)
    assert len(pairs) + sum(dropped.values()) == len(scores) * (len(scores) - 1) // 2
    chosen = best_worst(scores, min_margin=margin)[0]
    assert {*chosen} <= {*pairs} and bool(chosen) == bool(pairs)
    adjacent, left_out = rank_and_pair(scores, "adjacent", min_margin=margin)
    assert {*adjacent} <= {*pairs} and len(adjacent) + sum(left_out.values()) == len(scores) - 1


@settings(deadline=None)
@given(SOME_SCORES, st.data())
def test_a_judges_verdict_on_the_two_themselves_must_agree_with_their_scores(scores, data):
    outcomes = {ab: data.draw(OUTCOMES) for ab in round_robin(len(scores))}
    pairs, dropped = rank_and_pair(scores, outcomes=outcomes)
    for better, worse in pairs:
        assert outcomes.get((better, worse)) == "first" or outcomes.get((worse, better)) == "second"
        assert scores[better] > scores[worse]
    counts = Counter(outcomes.values())
    assert (dropped["inconsistent"], dropped["judged_equal"]) == (counts["inconsistent"], counts["tie"])
    assert len(pairs) + sum(dropped.values()) == len(outcomes)
    assert {*dropped} <= {*OF_COMPARISONS}


def test_a_win_counts_only_if_both_orders_agree():
    assert outcome_of("first", "second") == "first" and outcome_of("second", "first") == "second"
    assert outcome_of("tie", "tie") == "tie"
    for one, other in [("first", "first"), ("second", "second"), ("tie", "first"), ("second", "tie"), (None, None)]:
        assert outcome_of(one, other) == "inconsistent"
    assert outcome_of(None, "first") == outcome_of("first", None) == "inconsistent"


def test_a_judges_scores_are_shares_of_wins():
    outcomes = {(0, 1): "first", (0, 2): "second", (1, 2): "inconsistent"}
    assert win_shares(3, outcomes) == [0.5, 0.25, 0.75]
    assert win_shares(2, {(0, 1): "tie"}) == [0.5, 0.5]
    assert round_robin(3) == [*outcomes] and len(round_robin(8)) == 28
    shares = win_shares(3, outcomes)
    assert rank_and_pair(shares, outcomes=outcomes) == ([(2, 0), (0, 1)], Counter(inconsistent=1))
    # A circle: whichever two are compared, no score says more than the other.
    circle = {(0, 1): "first", (1, 2): "first", (0, 2): "second"}
    assert rank_and_pair(win_shares(3, circle), outcomes=circle) == ([], Counter(same_score=3))
    assert rank_and_pair([1.0, 0.0], outcomes={(0, 1): "second"}) == ([], Counter(contradicted=1))


def test_what_may_not_be_scored_is_dropped_for_its_reason():
    completions = [Completion("a"), Completion(" \n"), Completion("b", False), Completion("a"), Completion("c")]
    assert usable(completions) == ([0, 4], Counter(empty=1, truncated=1, same_text=1))
    assert usable(completions, keep_truncated=True) == ([0, 2, 4], Counter(empty=1, same_text=1))


@pytest.mark.parametrize("comparisons", ["best_worst", "all", "adjacent"])
@pytest.mark.parametrize("as_messages", [True, False])
def test_ranked_rows_are_read_with_the_comparisons_that_rows_of_pairs_hold(comparisons, as_messages):
    completions = scored(*SCORES)
    of_pairs = pair("Why?", completions, PairingConfig(comparisons=comparisons), as_messages=as_messages).rows
    (ranked,) = pair("Why?", completions, PairingConfig(rows="ranked"), as_messages=as_messages).rows
    read = [read_example(row, FormatConfig(), "row") for row in of_pairs]
    (whole,) = [read_example(ranked, FormatConfig(type="ranked", comparisons=comparisons), "row")]
    assert [example.responses for example in read] == [
        (whole.responses[chosen], whole.responses[rejected]) for chosen, rejected in whole.comparisons
    ]
    assert {repr(example.prompt) for example in read} == {repr(whole.prompt)}
    assert (whole.prompt == "Why?") != as_messages
    assert [row["score_chosen"] > row["score_rejected"] for row in of_pairs] == [True] * len(of_pairs)


def test_a_prompt_without_a_row_is_counted():
    one = pair("Why?", scored(1.0), PairingConfig(), as_messages=True)
    assert (one.rows, one.dropped) == ([], Counter(too_few=1))
    equal = pair("Why?", scored(1.0, 1.0), PairingConfig(), as_messages=True)
    assert (equal.rows, equal.dropped) == ([], Counter(same_score=1, no_row=1))
    near = pair("Why?", scored(1.0, 1.5), PairingConfig(rows="ranked", min_margin=1.0), as_messages=True)
    assert (near.rows, near.dropped) == ([], Counter(small_margin=1, no_row=1))


def test_errors_name_the_setting():
    with pytest.raises(ValueError, match="pairing.min_margin=-1"):
        PairingConfig(min_margin=-1)
    with pytest.raises(ValueError, match="pairing.comparisons=all is for pairing.rows=pairs"):
        PairingConfig(rows="ranked", comparisons="all")
    with pytest.raises(ValueError, match="pairing.rows='list'"):
        PairingConfig(rows="list")  # type: ignore
