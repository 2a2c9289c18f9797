"""Losses of single answers are their published formulas, finite everywhere, and their KL term is of the whole batch."""

import dataclasses

import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_pairs import named

from lora_dpo_jax.data.examples import TokenizedExample
from lora_dpo_jax.data.memory import MemoryExamples
from lora_dpo_jax.losses import LOSSES, Examples, Loss, Scores
from lora_dpo_jax.losses.whole_batch import ScoredPart, of_whole_batch
from lora_dpo_jax.objective import ExampleLosses

B, COUNT = 0.3, 9
NAMES = ["kto", "apo_zero_unpaired"]
SETTINGS = {"beta": B, "desirable_weight": 1.5, "undesirable_weight": 0.25}


def examples_of(labels: np.ndarray, weights: np.ndarray | None = None) -> Examples:
    """Of answers with a mismatched one each."""
    weights = np.ones(len(labels)) if weights is None else weights
    one = np.ones(1, np.int32)
    made = [
        TokenizedExample(one, (one, one), columns={"label": [float(x), -1.0], "example_weight": float(w)})
        for x, w in zip(labels, weights, strict=True)
    ]
    return MemoryExamples(made).arrays.examples


def scores(log_probs, dtype=jnp.float32) -> Scores:
    """From numbers of answers and mismatched ones in turn, [2 * answer]."""
    return Scores(named(jnp.asarray(log_probs, dtype), "response"), named(np.full(len(log_probs), 4), "response"))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def random_batch(seed: int = 0, shift: float = 0.5) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(policy, reference, labels, weights); the mismatched log-ratios have a mean of about `shift`."""
    rng = np.random.default_rng(seed)
    reference = -rng.uniform(5, 40, 2 * COUNT)
    ratios = rng.normal(0, 2, 2 * COUNT) + np.tile([0.0, shift], COUNT)
    labels, weights = rng.integers(0, 2, COUNT), rng.uniform(0.2, 2, COUNT)
    labels[:2], weights[3] = [0, 1], 0.0
    return reference + ratios, reference, labels, weights


def by_hand(name: str, ratios: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, float]:
    """(losses, KL) in float64, by the formulas of TRL's documentation."""
    answers, mismatched = ratios[::2], ratios[1::2]
    kl = max(0.0, mismatched[weights > 0].mean()) if name == "kto" else 0.0
    desirable, undesirable = 1 - sigmoid(B * (answers - kl)), 1 - sigmoid(B * (kl - answers))
    return weights * np.where(labels == 1, 1.5 * desirable, 0.25 * undesirable), kl


@pytest.mark.parametrize("shift", [0.5, -3.0], ids=["KL above 0", "KL at 0"])
@pytest.mark.parametrize("name", NAMES)
def test_each_loss_is_its_formula(name, shift):
    policy, reference, labels, weights = random_batch(shift=shift)
    found = LOSSES[name](**SETTINGS)(scores(policy), scores(reference), examples_of(labels, weights))
    expected, kl = by_hand(name, policy - reference, labels, weights)
    np.testing.assert_allclose(found.loss.array, expected, rtol=2e-5, atol=1e-6)
    values = {metric: float(value.value) for metric, value in found.metrics.items()}
    assert values["kl"] == pytest.approx(kl, rel=1e-5)
    counted, rewards = weights > 0, B * (policy - reference)[::2]
    chosen, rejected = counted & (labels == 1), counted & (labels == 0)
    assert values["rewards/chosen"] == pytest.approx(rewards[chosen].mean(), rel=1e-5)
    assert values["rewards/rejected"] == pytest.approx(rewards[rejected].mean(), rel=1e-5)
    assert values["rewards/margins"] == pytest.approx(rewards[chosen].mean() - rewards[rejected].mean(), rel=1e-5)
    assert values["logps/chosen"] == pytest.approx(policy[::2][chosen].mean(), rel=1e-6)
    assert values["logps/rejected"] == pytest.approx(policy[::2][rejected].mean(), rel=1e-6)
    assert (values["count/chosen"], values["count/rejected"]) == (chosen.sum(), rejected.sum())
    right = ((rewards > B * kl) == (labels == 1))[counted].mean()
    assert values["dpo_accuracy"] == values["rewards/accuracies"] == pytest.approx(right)


def test_no_gradient_flows_through_the_mismatched_answers():
    policy, reference, labels, _ = random_batch()
    loss = LOSSES["kto"](**SETTINGS)

    def total(log_probs: jax.Array) -> jax.Array:
        return loss(scores(log_probs), scores(reference), examples_of(labels)).loss.sum().scalar()

    slopes = jax.jit(jax.grad(total))(jnp.asarray(policy, jnp.float32))
    _, kl = by_hand("kto", policy - reference, labels, np.ones(COUNT))
    answers = (policy - reference)[::2]
    s = sigmoid(B * (answers - kl))
    expected = np.where(labels == 1, -1.5, 0.25) * B * s * (1 - s)
    assert kl > 0 and not np.any(slopes[1::2])
    np.testing.assert_allclose(slopes[::2], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_one_label_has_a_loss_and_no_margin(name, label):
    policy, reference, *_ = random_batch()
    labels = np.full(COUNT, label)
    found = LOSSES[name](**SETTINGS)(scores(policy), scores(reference), examples_of(labels))
    expected, _ = by_hand(name, policy - reference, labels, np.ones(COUNT))
    np.testing.assert_allclose(found.loss.array, expected, rtol=2e-5)
    values = {metric: float(value.value) for metric, value in found.metrics.items()}
    assert np.isfinite(list(values.values())).all() and values["rewards/margins"] == 0.0
    assert values["rewards/rejected" if label else "rewards/chosen"] == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_of_equal_models_is_half_the_weights_of_the_batch(name):
    policy, _, labels, weights = random_batch()
    loss, examples = LOSSES[name](**SETTINGS), examples_of(labels, weights)
    expected = (0.5 * weights * np.where(labels == 1, 1.5, 0.25)).mean()
    assert loss.loss_where_equal(examples) == pytest.approx(expected, rel=1e-6)
    equal = loss(scores(policy), scores(policy), examples, are_equal=True)
    assert float(equal.loss.array.mean()) == pytest.approx(expected, rel=1e-6)
    assert float(equal.metrics["dpo_accuracy"].value) == 0.5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_are_finite(name, dtype):
    """At these log-ratios, with each of them as the KL too."""
    values = np.array([0.0, 1e-4, -1e-4, 30.0, -30.0, 1e4, -1e4])
    loss, examples = LOSSES[name](**SETTINGS), examples_of(np.tile([0, 1], 7))

    @jax.jit
    def slope(ratios: jax.Array, kl: jax.Array) -> tuple[jax.Array, jax.Array]:
        def total(ratios):
            both = jnp.stack([ratios, jnp.full_like(ratios, kl)], -1).reshape(-1)
            zeros = jnp.zeros_like(both)
            return loss(scores(both, dtype), scores(zeros, dtype), examples).loss.sum().scalar()

        return jax.value_and_grad(total)(ratios)

    for kl in values:
        value, slopes = slope(jnp.asarray(np.repeat(values, 2), dtype), jnp.asarray(kl, dtype))
        assert np.isfinite(float(value)) and np.isfinite(np.asarray(slopes, np.float32)).all()


def part_of(numbers: np.ndarray, examples: Examples, first: int, last: int, width: int) -> tuple[Scores, Examples]:
    """Answers `first` to `last` in one row of `width` slots."""

    def row(values: np.ndarray, per: int, empty: float, name: str) -> hax.NamedArray:
        filled = np.full(width * per, empty, values.dtype)
        filled[: per * (last - first)] = values
        return named(filled[None], "row", name)

    labels = np.asarray(examples.columns["label"].array)[2 * first : 2 * last]
    count = last - first
    made = Examples(
        ids=row(np.arange(count), 1, -1, "example"),
        example_of_response=row(np.repeat(np.arange(count), 2), 2, -1, "response"),
        **{name: named(np.zeros((1, 0), np.int32), "row", "comparison") for name in ("chosen", "rejected")},
        example_of_comparison=named(np.zeros((1, 0), np.int32), "row", "comparison"),
        weight=named(np.zeros((1, 0), np.float32), "row", "comparison"),
        columns={
            "label": row(labels, 2, 0.0, "response"),
            "example_weight": row(np.ones(count, np.float32), 1, 0.0, "example"),
        },
    )
    tokens = row(np.full(2 * count, 4), 2, 0, "response")
    return Scores(row(numbers[2 * first : 2 * last].astype(np.float32), 2, 0.0, "response"), tokens), made


def test_parts_of_other_widths_know_the_kl_of_the_batch():
    policy, reference, labels, _ = random_batch()
    examples = examples_of(labels)
    loss: Loss = LOSSES["mix"](losses=[LOSSES["kto"](**SETTINGS), LOSSES["apo_zero_unpaired"]()])
    whole = loss(scores(policy), scores(reference), examples)
    bounds = [(0, 2, 3), (2, 6, 6), (6, COUNT, 4)]
    parts = [ScoredPart(part_of(policy, examples, *at)[0], *part_of(reference, examples, *at)) for at in bounds]
    found: list[ExampleLosses] = [
        loss(policy, reference, dataclasses.replace(mine, of_batch=known))
        for (policy, reference, mine), known in zip(parts, of_whole_batch(loss, parts), strict=True)
    ]
    losses = [x.loss.array[0, : last - first] for x, (first, last, _) in zip(found, bounds, strict=True)]
    np.testing.assert_allclose(np.concatenate(losses), whole.loss.array, rtol=1e-5)
    added = jax.tree.map(lambda *parts: sum(parts), *(x.metrics for x in found))
    for name, metric in whole.metrics.items():
        assert float(added[name].value) == pytest.approx(float(metric.value), rel=1e-5), name
    alone, (policy_0, reference_0, mine_0) = LOSSES["kto"](**SETTINGS), parts[0]
    assert float(alone(policy_0, reference_0, mine_0).metrics["kl"].value) != pytest.approx(
        float(whole.metrics["kl"].value), rel=1e-2
    )


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("kto", {"desirable_weight": -1.0}, r"loss\.desirable_weight=-1\.0 must be at least 0"),
        ("apo_zero_unpaired", {"undesirable_weight": np.inf}, r"loss\.undesirable_weight=inf must be at least 0"),
        ("mix", {"losses": [LOSSES["kto"](), LOSSES["sigmoid"]()]}, "no data have both"),
    ],
)
def test_settings_of_no_sense_are_rejected(name, settings, message):
    with pytest.raises(ValueError, match=message):
        LOSSES[name](**settings)
