"""Weights and target margins of the data, through each loss."""

import numpy as np
import pytest
from losses_by_hand import EVERYWHERE, PAIRS, B, Numbers, by_hand, loss_of, random_numbers, scores

from lora_dpo_jax.data.examples import TokenizedExample
from lora_dpo_jax.data.memory import MemoryExamples
from lora_dpo_jax.losses import LOSSES, Examples, Loss

OF_MARGIN = [name for name in LOSSES if name != "mix" and loss_of(name).takes_margins]
ONE = np.ones(1, np.int32)


def pairs(*, weights: Numbers | None = None, margins: Numbers | None = None) -> Examples:
    made = [
        TokenizedExample(
            ONE,
            (ONE, ONE),
            ((0, 1),),
            None if weights is None else (float(weights[number]),),
            {} if margins is None else {"target_margin": float(margins[number])},
        )
        for number in range(PAIRS)
    ]
    return MemoryExamples(made).arrays.examples


def found_of(loss: Loss, numbers: dict[str, Numbers], examples: Examples):
    return loss(scores(numbers, "policy"), scores(numbers, "reference"), examples)


def test_margins_are_of_the_losses_whose_rewards_are_compared():
    assert set(OF_MARGIN) == {
        *("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"),
        *("simpo", "alphapo", "cpo"),
    }


@pytest.mark.parametrize("name", OF_MARGIN)
def test_a_target_margin_is_subtracted_from_the_difference_of_rewards(name):
    """By hand, from log-probs of which the chosen one has less by what makes the reward less by the margin."""
    numbers = random_numbers(11)
    loss, _ = by_hand(name, numbers)
    margins = np.random.default_rng(0).uniform(0, 2, PAIRS)
    if name == "alphapo":  # its reward is (1 - p^-alpha) / alpha
        mean = numbers["policy_w"] / numbers["tokens_w"]
        less = (1 - np.exp(mean) ** -0.5) / 0.5 - margins / B
        shifted = numbers["tokens_w"] * np.log(1 - 0.5 * less) / -0.5
    else:
        per_token = name in ("sigmoid_norm", "ipo", "simpo")
        shifted = numbers["policy_w"] - margins / B * (numbers["tokens_w"] if per_token else 1)
    _, expected = by_hand(name, numbers | {"policy_w": shifted})
    if name == "cpo":  # its likelihood is that of the data
        expected = expected + 0.4 * (shifted - numbers["policy_w"]) / numbers["tokens_w"].mean()
    found, without = (found_of(loss, numbers, pairs(margins=m)) for m in (margins, None))
    np.testing.assert_allclose(found.loss.array, expected, rtol=2e-5, atol=2e-6)
    for metric in ("rewards/chosen", "rewards/margins", "dpo_accuracy"):
        assert float(found.metrics[metric].value) == float(without.metrics[metric].value)


def test_the_loss_of_equal_models_knows_margins_and_weights():
    margins, weights = np.linspace(0, 2, PAIRS), np.linspace(0.5, 2, PAIRS)
    expected = (weights * np.logaddexp(0, margins)).mean()
    assert LOSSES["sigmoid"]().loss_where_equal(pairs(weights=weights, margins=margins)) == pytest.approx(expected)


def test_in_a_mix_margins_are_of_those_losses_that_take_them():
    numbers, margins = random_numbers(12), np.linspace(0, 2, PAIRS)
    mix = LOSSES["mix"](losses=[loss_of("sigmoid"), loss_of("bco_pair")])
    assert mix.takes_margins and mix.columns_in(["target_margin", "other"]) == ("target_margin",)
    assert not loss_of("bco_pair").takes_margins and loss_of("bco_pair").columns_in(["target_margin"]) == ()
    found = found_of(mix, numbers, pairs(margins=margins)).loss.array
    alone = [found_of(loss_of(name), numbers, pairs(margins=margins)).loss.array for name in ("sigmoid", "bco_pair")]
    np.testing.assert_allclose(found, alone[0] + alone[1], rtol=1e-6)
    np.testing.assert_array_equal(alone[1], found_of(loss_of("bco_pair"), numbers, pairs()).loss.array)


@pytest.mark.parametrize("name", [name for name in EVERYWHERE if "," not in name])
def test_the_weight_of_a_pair_multiplies_its_loss_and_no_other(name):
    numbers, weights = random_numbers(13), np.random.default_rng(1).uniform(0.2, 2, PAIRS)
    loss = EVERYWHERE[name]
    weighted, plain = (found_of(loss, numbers, pairs(weights=w)) for w in (weights, None))
    np.testing.assert_allclose(weighted.loss.array, weights * np.asarray(plain.loss.array), rtol=1e-6)
    for metric in ("rewards/margins", "dpo_accuracy", "logps/chosen"):
        assert float(weighted.metrics[metric].value) == pytest.approx(float(plain.metrics[metric].value), rel=1e-5)


@pytest.mark.parametrize("name", ["sigmoid", "aot", "sft"])
def test_a_pair_of_weight_0_counts_for_nothing(name):
    numbers, weights = random_numbers(14), np.ones(PAIRS)
    weights[2] = 0.0
    others = numbers | {key: np.where(np.arange(PAIRS) == 2, 9.0 * values, values) for key, values in numbers.items()}
    loss = loss_of(name)
    found, same = (found_of(loss, x, pairs(weights=weights)) for x in (numbers, others))
    np.testing.assert_array_equal(found.loss.array, same.loss.array)
    assert found.loss.array[2] == 0.0
    assert {k: float(v.value) for k, v in found.metrics.items()} == {k: float(v.value) for k, v in same.metrics.items()}
