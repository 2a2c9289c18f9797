"""Losses and metrics of pairs, against the published formulas and against TRL's own function, live."""

import functools
import math
import warnings
from collections import defaultdict
from types import SimpleNamespace

import draccus
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from tiny_pairs import named

from lora_dpo_jax.data.memory import MemoryExamples
from lora_dpo_jax.losses import Dpo, Examples, LengthNormalizedDpo, Loss, PreferenceLoss, Scores

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl import DPOTrainer

LOSSES = {
    "sigmoid": Dpo(beta=0.1),
    "sigmoid, other beta": Dpo(beta=0.7),
    "cDPO": Dpo(beta=0.3, label_smoothing=0.2),
    "reference-free": Dpo(beta=0.1, reference_free=True),
    "sigmoid_norm": LengthNormalizedDpo(beta=2.0),
    "sigmoid_norm, smoothed": LengthNormalizedDpo(beta=2.0, label_smoothing=0.1),
}


def log_probs(chosen, rejected, chosen_tokens=None, rejected_tokens=None) -> Scores:
    """Of pairs: the responses are chosen and rejected in turn."""

    def in_turn(chosen, rejected) -> hax.NamedArray:
        return named(jnp.stack([jnp.asarray(chosen), jnp.asarray(rejected)], axis=-1).reshape(-1), "response")

    tokens = np.ones(np.shape(chosen), np.int32)
    return Scores(
        in_turn(chosen, rejected).astype(jnp.float32),
        in_turn(
            tokens if chosen_tokens is None else chosen_tokens, tokens if rejected_tokens is None else rejected_tokens
        ).astype(jnp.int32),
    )


def pairs(count: int) -> Examples:
    return MemoryExamples([([1], [2], [3])] * count).arrays.examples


def of(scores: Scores) -> list[np.ndarray]:
    """Log-probs of chosen and rejected, then their tokens, each [pair]."""
    log_probs, tokens = np.asarray(scores.log_probs.array), np.asarray(scores.tokens.array)
    return [log_probs[::2], log_probs[1::2], tokens[::2], tokens[1::2]]


def random_log_probs(count: int = 6, seed: int = 0) -> tuple[Scores, Scores]:
    """(policy, reference), a few nats apart."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 40, (2, count))
    reference = -rng.uniform(1, 80, (2, count))
    policy = np.minimum(reference + rng.normal(0, 4, (2, count)), 0)
    return log_probs(*policy, *tokens), log_probs(*reference, *tokens)


def swapped(scores: Scores) -> Scores:
    chosen, rejected, chosen_tokens, rejected_tokens = of(scores)
    return log_probs(rejected, chosen, rejected_tokens, chosen_tokens)


def losses_of(loss: PreferenceLoss, policy: Scores, reference: Scores | None) -> np.ndarray:
    return np.asarray(loss(policy, reference, pairs(policy.log_probs.size // 2)).loss.array)


def metrics_of(loss: PreferenceLoss, policy, reference, **options) -> dict[str, float]:
    """Means over the pairs."""
    found = loss(policy, reference, pairs(policy.log_probs.size // 2), **options)
    return {name: float(metric.value) for name, metric in found.metrics.items()}


def torch_loss(loss: PreferenceLoss, policy: Scores, reference: Scores) -> np.ndarray:
    """The published formulas, per pair, in float64."""
    lw, ll, nw, nl, rw, rl = (torch.tensor(np.array(x), dtype=torch.float64) for x in (*of(policy), *of(reference)[:2]))
    chosen, rejected = (lw, ll) if loss.reference_free else (lw - rw, ll - rl)
    if isinstance(loss, LengthNormalizedDpo):
        chosen, rejected = chosen / nw.clamp(min=1), rejected / nl.clamp(min=1)
    delta, e = chosen - rejected, loss.label_smoothing
    return (-(1 - e) * F.logsigmoid(loss.beta * delta) - e * F.logsigmoid(-loss.beta * delta)).numpy()


def trl_loss(loss_type: str, loss, policy: Scores, reference: Scores) -> tuple[float, dict[str, float]]:
    """The mean loss and the metrics that TRL's DPOTrainer makes of log-probs; its model is replaced by these."""
    chosen, rejected, *tokens = of(policy)
    sums, tokens = np.concatenate([chosen, rejected]), np.concatenate(tokens)
    width = tokens.max() + 1
    completion_mask = torch.tensor(np.arange(width)[None] >= 1) & torch.tensor(np.arange(width) <= tokens[:, None])
    per_token = torch.zeros(completion_mask.shape)[:, 1:]
    per_token[:, 0] = torch.tensor(sums)
    inputs = dict(
        input_ids=torch.zeros(completion_mask.shape, dtype=torch.long),
        attention_mask=torch.ones(completion_mask.shape),
        completion_mask=completion_mask.long(),
        ref_chosen_logps=torch.tensor(of(reference)[0].copy()),
        ref_rejected_logps=torch.tensor(of(reference)[1].copy()),
    )
    zeros = torch.zeros_like(per_token)
    outputs = SimpleNamespace(log_probs=per_token, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        beta=loss.beta,
        label_smoothing=loss.label_smoothing,
        loss_types=[loss_type],
        loss_weights=[1.0],
        f_divergence_type="reverse_kl",
        precompute_ref_logps=True,
        ld_alpha=None,
        use_weighting=False,
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    value = DPOTrainer._compute_loss(trainer, lambda **kwargs: outputs, inputs, return_outputs=False)
    return float(value), {name: values[-1] for name, values in trainer._metrics["train"].items()}


def one_pair(scores: Scores, index: int) -> Scores:
    return log_probs(*(array[index : index + 1] for array in of(scores)))


def test_the_worked_example():
    policy, reference = log_probs([-2.0], [-5.0]), log_probs([-2.5], [-4.5])
    metrics = metrics_of(Dpo(beta=0.1), policy, reference)
    expected = {
        "rewards/chosen": 0.05,
        "rewards/rejected": -0.05,
        "rewards/margins": 0.10,
        "rewards/accuracies": 1.0,
        "dpo_loss": 0.6444,
        "dpo_accuracy": 1.0,
        "dpo_margin_policy": 3.0,
        "dpo_margin_ref": 2.0,
        "dpo_chosen_reward": 0.05,
        "dpo_rejected_reward": -0.05,
        "logps/chosen": -2.0,
        "logps/rejected": -5.0,
    }
    assert metrics == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_the_published_formulas(name):
    policy, reference = random_log_probs()
    ours = losses_of(LOSSES[name], policy, None if LOSSES[name].reference_free else reference)
    np.testing.assert_allclose(ours, torch_loss(LOSSES[name], policy, reference), rtol=1e-5)


# TRL's `sigmoid` ignores label_smoothing; its `aot` of a single pair has nothing to sort and is cDPO.
@pytest.mark.parametrize(
    "name, loss_type",
    [("sigmoid", "sigmoid"), ("sigmoid, other beta", "sigmoid"), ("sigmoid_norm", "sigmoid_norm"), ("cDPO", "aot")],
)
def test_losses_are_those_of_trl(name, loss_type):
    policy, reference = random_log_probs(seed=1)
    ours = losses_of(LOSSES[name], policy, reference)
    for index in range(len(ours)):
        theirs, _ = trl_loss(loss_type, LOSSES[name], one_pair(policy, index), one_pair(reference, index))
        np.testing.assert_allclose(ours[index], theirs, rtol=1e-5)


def test_metrics_are_those_of_trl():
    policy, reference = random_log_probs(seed=2)
    loss, theirs = trl_loss("sigmoid", Dpo(beta=0.1), policy, reference)
    ours = metrics_of(Dpo(beta=0.1), policy, reference)
    assert ours["dpo_loss"] == pytest.approx(loss, rel=1e-5)
    shared = {name: theirs[name] for name in ours if "/" in name}
    assert len(shared) == 6
    assert {name: ours[name] for name in shared} == pytest.approx(shared, rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_swapping_a_pair_flips_its_label(name):
    loss = LOSSES[name]
    policy, reference = random_log_probs(seed=3)
    right, wrong = metrics_of(loss, policy, reference), metrics_of(loss, swapped(policy), swapped(reference))
    for metric in ("dpo_accuracy", "rewards/accuracies"):
        assert wrong[metric] == pytest.approx(1 - right[metric])
    for metric in ("rewards/margins", "dpo_margin_policy", "dpo_margin_ref"):
        assert wrong[metric] == pytest.approx(-right[metric], rel=1e-5)
    for one, other in [("rewards/chosen", "rewards/rejected"), ("logps/chosen", "logps/rejected")]:
        assert wrong[one] == right[other] and wrong[other] == right[one]


def test_a_smoothed_loss_expects_some_labels_to_be_swapped():
    """cDPO with probability e of a wrong label is (1 - e) * loss + e * loss of the swapped pair."""
    policy, reference = random_log_probs(seed=4)
    right, wrong = (
        losses_of(Dpo(beta=0.3), *both) for both in ((policy, reference), map(swapped, (policy, reference)))
    )
    smoothed = losses_of(Dpo(beta=0.3, label_smoothing=0.2), policy, reference)
    np.testing.assert_allclose(smoothed, 0.8 * right + 0.2 * wrong, rtol=1e-5)


def test_a_smoothed_loss_is_least_at_the_margin_where_the_model_is_as_sure_as_the_labels():
    loss = Dpo(beta=0.5, label_smoothing=0.2)
    best = math.log(0.8 / 0.2) / 0.5
    reference = log_probs(np.zeros(1), np.zeros(1))
    slope = jax.grad(lambda chosen: loss(log_probs(chosen, jnp.zeros(1)), reference, pairs(1)).loss.sum().scalar())
    assert abs(slope(jnp.array([best]))[0]) < 1e-6
    assert slope(jnp.array([best - 0.1]))[0] < 0 < slope(jnp.array([best + 0.1]))[0]


def test_where_policy_and_reference_agree_the_loss_is_ln_2_and_all_is_a_tie():
    policy, _ = random_log_probs()
    for name in ("sigmoid", "cDPO", "sigmoid_norm"):
        metrics = metrics_of(LOSSES[name], policy, policy)
        assert metrics["dpo_loss"] == pytest.approx(math.log(2), rel=1e-6)
        assert metrics["dpo_accuracy"] == 0.5
        assert metrics["rewards/accuracies"] == 0.0
        assert metrics["rewards/margins"] == 0.0


def test_where_policy_and_reference_are_one_model_the_rounding_of_two_programs_is_no_win():
    policy, _ = random_log_probs(count=64)
    chosen, *others = of(policy)
    rounded = log_probs(chosen + 1e-4, *others)
    for are_equal, accuracies in ((False, (1.0, 1.0)), (True, (0.5, 0.0))):
        found = metrics_of(Dpo(), rounded, policy, are_equal=are_equal)
        assert (found["dpo_accuracy"], found["rewards/accuracies"]) == accuracies


def test_a_reference_free_loss_ignores_the_reference():
    policy, reference = random_log_probs()
    loss = LOSSES["reference-free"]
    np.testing.assert_array_equal(losses_of(loss, policy, None), losses_of(loss, policy, reference))
    metrics = metrics_of(loss, policy, None)
    assert metrics["rewards/chosen"] == pytest.approx(0.1 * of(policy)[0].mean(), rel=1e-6)
    assert metrics["dpo_margin_ref"] == 0.0


@functools.cache
def gradients_of(name: str):
    def total(scores, tokens):
        policy, reference = log_probs(*scores[:2], *tokens), log_probs(*scores[2:], *tokens)
        return LOSSES[name](policy, reference, pairs(3)).loss.sum().scalar()

    return jax.jit(jax.value_and_grad(total))


NATS = st_numpy.arrays(np.float32, (4, 3), elements=st.floats(-1e4, 0, width=32))
COUNTS = st_numpy.arrays(np.int32, (2, 3), elements=st.integers(0, 5000))


@pytest.mark.parametrize("name", LOSSES)
@settings(deadline=None, max_examples=100)
@given(scores=NATS, tokens=COUNTS)
@example(scores=np.array([[0.0], [-1e4], [-1e4], [0.0]], np.float32).repeat(3, 1), tokens=np.zeros((2, 3), np.int32))
@example(scores=np.array([[-1e4], [0.0], [0.0], [-1e4]], np.float32).repeat(3, 1), tokens=np.ones((2, 3), np.int32))
def test_losses_and_gradients_are_finite(name, scores, tokens):
    value, gradients = gradients_of(name)(scores, tokens)
    assert np.isfinite(value) and np.all(np.isfinite(gradients))
    # More chosen, less rejected: never a greater loss, unless a label may be wrong.
    assert LOSSES[name].label_smoothing or (np.all(gradients[0] <= 0) and np.all(gradients[1] >= 0))


def test_the_gradient_does_not_vanish_where_a_pair_is_badly_wrong():
    """-beta, from the chosen response: a naive log(sigmoid(x)) underflows here."""
    scores = np.array([[-1e4], [0.0], [0.0], [-1e4]], np.float32).repeat(3, 1)
    value, gradients = gradients_of("sigmoid")(scores, np.ones((2, 3), np.int32))
    np.testing.assert_allclose(gradients, 0.1 * np.array([[-1.0], [1.0], [1.0], [-1.0]]).repeat(3, 1), rtol=1e-6)
    assert value == pytest.approx(3 * 0.1 * 2e4, rel=1e-6)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Dpo(beta=0.0), r"loss\.beta=0\.0 must be positive"),
        (lambda: LengthNormalizedDpo(beta=-1.0), r"loss\.beta=-1\.0 must be positive"),
        (lambda: Dpo(beta=float("nan")), r"loss\.beta=nan must be positive"),
        (lambda: Dpo(label_smoothing=0.5), r"loss\.label_smoothing=0\.5 must be in \[0, 0\.5\)"),
        (lambda: Dpo(label_smoothing=-0.1), r"loss\.label_smoothing=-0\.1 must be in"),
        (
            lambda: Dpo()(log_probs([0.0], [0.0]), None, pairs(1)),
            "Dpo needs the reference's log-probs unless reference_free",
        ),
    ],
)
def test_what_cannot_be_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "text, loss",
    [
        ("{type: sigmoid, beta: 0.2}", Dpo(beta=0.2)),
        ("{beta: 0.2, label_smoothing: 0.1}", Dpo(beta=0.2, label_smoothing=0.1)),
        ("{type: sigmoid_norm, beta: 5.0}", LengthNormalizedDpo(beta=5.0)),
        ("{reference_free: true}", Dpo(reference_free=True)),
    ],
)
def test_a_loss_is_chosen_by_its_type(text, loss):
    assert draccus.loads(Loss, text) == loss
