"""Standard errors, accuracy by length and baselines, against the same by hand."""

import numpy as np
import pytest

from lora_dpo_jax.accuracy import Comparisons, baselines_of, in_words, mean_and_error, statistics_of

RNG = np.random.default_rng(0)


def comparisons(chosen, rejected, *, weights=None, prompts=None) -> Comparisons:
    count = len(chosen)
    weights = np.ones(count) if weights is None else np.asarray(weights, float)
    prompts = np.arange(count) if prompts is None else np.asarray(prompts)
    return Comparisons(np.asarray(chosen), np.asarray(rejected), weights, prompts)


def standard_error(values) -> float:
    return np.std(values, ddof=1) / np.sqrt(len(values))


def test_of_one_pair_a_prompt_it_is_the_usual_standard_error():
    values = RNG.normal(size=40)
    found = mean_and_error(values, np.full(40, 0.3), RNG.permutation(40))
    assert found == pytest.approx((values.mean(), standard_error(values)), rel=1e-12)


def test_pairs_of_one_prompt_count_as_one_observation():
    """Copies of all pairs add no knowledge."""
    values = RNG.normal(size=12)
    copied = mean_and_error(np.tile(values, 5), np.ones(60), np.tile(np.arange(12), 5))
    assert copied == pytest.approx((values.mean(), standard_error(values)), rel=1e-12)


def test_an_example_of_several_comparisons_is_the_mean_of_them():
    """As in the metrics: its weights add up to one."""
    of_examples = [RNG.normal(size=size) for size in (1, 3, 6, 2)]
    weights = np.concatenate([np.full(len(x), 1 / len(x)) for x in of_examples])
    numbers = np.repeat(np.arange(4), [len(x) for x in of_examples])
    means = [x.mean() for x in of_examples]
    found = mean_and_error(np.concatenate(of_examples), weights, numbers)
    assert found == pytest.approx((np.mean(means), standard_error(means)), rel=1e-12)


def test_the_error_says_how_far_means_of_samples_spread():
    """Of prompts with one to four pairs each, by simulation: 4,000 samples of 200 prompts."""
    sizes = np.tile([1, 2, 3, 4], 50)
    numbers = np.repeat(np.arange(200), sizes)
    samples = RNG.normal(size=(4000, 200))[:, numbers] + 0.5 * RNG.normal(size=(4000, len(numbers)))
    found = np.array([mean_and_error(x, np.ones(len(x)), numbers) for x in samples])
    # The spread of 4,000 means is known to 1.1%; it would be 1.5 times too large without the prompts.
    assert found[:, 1].mean() == pytest.approx(found[:, 0].std(), rel=0.04)


def test_statistics_are_those_of_each_group_and_ties_are_told_apart():
    chosen, rejected = np.array([5, 7, 3, 2, 9, 4, 4, 6]), np.array([3, 7, 8, 2, 1, 5, 1, 8])
    margins = np.array([0.5, -1.0, 0.0, 2.0, 1.5, -0.5, -2.0, 0.25], np.float32)
    found = statistics_of(margins, comparisons(chosen, rejected))
    groups = {"": chosen > 0, "chosen_longer/": chosen > rejected, "chosen_shorter/": chosen < rejected}
    groups["same_length/"] = chosen == rejected
    for prefix, of_group in groups.items():
        correct = [1.0 if x > 0 else 0.5 if x == 0 else 0.0 for x in margins[of_group]]
        assert found[f"{prefix}dpo_accuracy_se"] == pytest.approx(standard_error(correct))
        assert found[f"{prefix}rewards/margins_se"] == pytest.approx(standard_error(margins[of_group]))
        if prefix:
            assert found[f"{prefix}dpo_accuracy"] == np.mean(correct)
            assert found[f"{prefix}rewards/margins"] == margins[of_group].mean()
    assert not {"dpo_accuracy", "rewards/margins"} & found.keys(), "these are the loss's own"
    assert len(found) == 2 + 3 * 4


def test_baselines_are_the_longer_response_and_the_likelier_one():
    chosen, rejected = np.array([5, 7, 3, 9]), np.array([3, 7, 8, 1])
    found = baselines_of(comparisons(chosen, rejected), np.array([-4.0, 1.0, 2.0, 0.0]))
    assert found["longer_response/accuracy"] == (1 + 0.5 + 0 + 1) / 4
    assert found["longer_response/accuracy_se"] == pytest.approx(standard_error([1, 0.5, 0, 1]))
    assert found["reference_log_prob/accuracy"] == (0 + 1 + 1 + 0.5) / 4
    assert found["chosen_longer/reference_log_prob/accuracy"] == (0 + 0.5) / 2
    assert {name: found[f"{name}/pairs"] for name in ("chosen_longer", "chosen_shorter", "same_length")} == {
        "chosen_longer": 2,
        "chosen_shorter": 1,
        "same_length": 1,
    }
    unknown = baselines_of(comparisons(chosen, rejected), None)
    assert [*unknown] == [name for name in found if "reference" not in name]


def test_what_cannot_be_known_is_left_out():
    """The mean of no comparison, the error of one prompt; a comparison of weight 0 is none."""
    two = comparisons([5, 6, 1], [1, 1, 9], weights=[1, 1, 0], prompts=[3, 3, 4])
    found = statistics_of(np.array([1.0, -1.0, np.nan]), two)
    assert found == {"chosen_longer/dpo_accuracy": 0.5, "chosen_longer/rewards/margins": 0.0}
    assert statistics_of(np.zeros(0), comparisons([], [])) == baselines_of(comparisons([], []), np.zeros(0)) == {}


def test_a_margin_that_is_no_number_is_no_loss():
    found = statistics_of(np.array([np.nan, 1.0, 1.0]), comparisons([2, 1, 1], [1, 2, 2]))
    assert np.isnan(found["dpo_accuracy_se"]) and np.isnan(found["chosen_longer/dpo_accuracy"])
    assert found["chosen_shorter/dpo_accuracy"] == 1.0


def test_a_mean_is_shown_with_its_error():
    found = {"a": 0.7512, "a_se": 0.0234, "b": 1.5}
    assert in_words("a", found, percent=True) == "75.1% ± 2.3%"
    assert (in_words("a", found, percent=False), in_words("b", found, percent=False)) == ("0.7512 ± 0.0234", "1.5000")
