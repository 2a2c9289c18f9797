"""Every pair loss is its published formula, finite everywhere, and the same however its batch is cut."""

import math
from dataclasses import dataclass, replace

import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from losses_by_hand import (
    EVERYWHERE,
    OF_MEAN_RATIOS,
    OF_RATIOS,
    PAIRS,
    SINGLE,
    B,
    Numbers,
    by_hand,
    examples_of,
    loss_of,
    losses_of,
    per_token,
    random_numbers,
    ratios,
    scores,
)
from tiny_pairs import named

from lora_dpo_jax.losses import LOSSES, Examples, Loss, Scores, TokenScores
from lora_dpo_jax.losses.whole_batch import ScoredPart, of_whole_batch
from lora_dpo_jax.settings.decoding import config_of


@dataclass(frozen=True)
class Settings:
    loss: Loss


def from_yaml(text: str) -> Loss:
    """The loss of a config file."""
    return config_of(Settings, {"loss": yaml.safe_load(text)}).loss


SORTED = ["aot", "aot_unpaired"]


@pytest.mark.parametrize("name", SINGLE)
def test_each_loss_is_its_formula(name):
    numbers = random_numbers()
    loss, expected = by_hand(name, numbers)
    found = losses_of(loss, numbers)
    if name in SORTED:  # a margin of sorted values belongs to no single pair
        found, expected = found.mean(), expected.mean()
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)  # robust is a difference


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"])
def test_a_divergence_changes_the_rewards(name, divergence):
    numbers = random_numbers(1)
    rewards = {
        "reverse_kl": lambda u: u,
        "forward_kl": lambda u: 1 - np.exp(-u),
        "js_divergence": lambda u: np.log(2 / (1 + np.exp(-u))),
        "alpha_divergence": lambda u: (np.exp(u) ** -0.7 - 1) / -0.7,
    }
    chosen, rejected = (rewards[divergence](ratio) for ratio in ratios(numbers))
    is_mean = name in OF_MEAN_RATIOS
    if is_mean:
        chosen, rejected = per_token(chosen, rejected, numbers)
    settings, formula = (OF_MEAN_RATIOS if is_mean else OF_RATIOS)[name]
    loss = loss_of(name, f_divergence_type=divergence, f_alpha_divergence_coef=0.3, **settings)
    np.testing.assert_allclose(losses_of(loss, numbers), formula(chosen, rejected), rtol=1e-4, atol=2e-6)
    found = loss(scores(numbers, "policy"), scores(numbers, "reference"), examples_of(PAIRS)).metrics
    assert float(found["rewards/chosen"].value) == pytest.approx(B * chosen.mean(), rel=1e-4)


@pytest.mark.parametrize("alpha", [1.0, 1.0 + 1e-8])
def test_the_alpha_divergence_of_1_is_the_reverse_one(alpha):
    numbers = random_numbers()
    loss = loss_of("sigmoid", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=alpha)
    np.testing.assert_array_equal(losses_of(loss, numbers), losses_of(loss_of("sigmoid"), numbers))


@pytest.mark.parametrize("name", SINGLE)
def test_the_loss_where_policy_and_reference_agree_is_known(name):
    numbers = random_numbers()
    numbers |= {"reference_w": numbers["policy_w"], "reference_l": numbers["policy_l"]}
    loss, expected = by_hand(name, numbers)
    known = loss.loss_where_equal(examples_of(PAIRS))
    if name in ("sft", "simpo", "alphapo", "cpo", "orpo", "dpop"):
        assert known is None
    else:
        np.testing.assert_allclose(losses_of(loss, numbers), known, rtol=1e-6)
        np.testing.assert_allclose(expected, known, rtol=1e-6)


@pytest.mark.parametrize(("tau", "warns"), [(0.05, True), (0.1, True), (0.105, False), (0.5, False)])
def test_discopop_warns_where_it_begins_by_lowering_margins(tau, warns):
    numbers = random_numbers()
    for side in "wl":
        numbers[f"reference_{side}"] = numbers[f"policy_{side}"]
    higher = numbers | {"policy_w": numbers["policy_w"] + 1e-2}
    loss = loss_of("discopop", discopop_tau=tau, beta=0.1)
    rises = float(np.mean(losses_of(loss, higher)) - np.mean(losses_of(loss, numbers))) > 0
    assert rises == warns
    for each in (loss, LOSSES["mix"](losses=[loss_of("sigmoid"), loss])):
        assert ("loss.discopop_tau=" in (each.warning or "")) == warns
    assert loss_of("sigmoid").warning is None


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", EVERYWHERE)
def test_losses_and_gradients_are_finite(name, dtype):
    """At all pairs of these log-ratios. A loss without a reference sees them as log-probs of one token and of many."""
    values = np.array([0.0, 1e-4, -1e-4, 30.0, -30.0, 1e4, -1e4])
    chosen, rejected = (grid.reshape(-1) for grid in np.meshgrid(values, values))
    loss = EVERYWHERE[name]
    if not loss.needs_reference:
        chosen, rejected = -np.abs(chosen), -np.abs(rejected)

    def total(chosen, rejected, count: int):
        interleaved = jnp.stack([chosen, rejected], -1).reshape(-1)
        tokens = named(jnp.full(interleaved.shape, count, jnp.int32), "response")
        policy = Scores(named(interleaved, "response"), tokens)
        reference = Scores(named(jnp.zeros_like(interleaved), "response"), tokens)
        return loss(policy, reference, examples_of(len(chosen))).loss.sum().scalar()

    for count in (1, 500):
        value, slopes = jax.value_and_grad(total, (0, 1))(
            jnp.asarray(chosen, dtype), jnp.asarray(rejected, dtype), count
        )
        assert np.isfinite(float(value))
        assert all(np.all(np.isfinite(np.asarray(slope, np.float32))) for slope in slopes)


@pytest.mark.parametrize("name", SINGLE)
def test_swapping_a_pair_flips_its_reward_margin(name):
    numbers = random_numbers(3)
    other = {x: numbers[x[:-1] + ("l" if x.endswith("w") else "w")] for x in numbers}
    loss = by_hand(name, numbers)[0]
    margins = [
        float(loss(scores(x, "policy"), scores(x, "reference"), examples_of(PAIRS)).metrics["rewards/margins"].value)
        for x in (numbers, other)
    ]
    assert margins[0] == pytest.approx(-margins[1], rel=1e-5) and abs(margins[0]) > 1e-3


@pytest.mark.parametrize("name", SINGLE)
def test_rewards_are_those_that_the_loss_uses(name):
    numbers = random_numbers(2)
    loss = by_hand(name, numbers)[0]
    chosen, rejected = (numbers["policy_w"], numbers["policy_l"]) if not loss.needs_reference else ratios(numbers)
    if name in ("sigmoid_norm", "ipo", "simpo", "alphapo", "orpo"):
        chosen, rejected = per_token(chosen, rejected, numbers)
    if name == "alphapo":
        chosen, rejected = ((1 - np.exp(x) ** -0.5) / 0.5 for x in (chosen, rejected))
    found = loss(scores(numbers, "policy"), scores(numbers, "reference"), examples_of(PAIRS)).metrics
    values = {metric: float(found[metric].value) for metric in found}
    assert values["rewards/chosen"] == pytest.approx(B * chosen.mean(), rel=1e-5)
    assert values["rewards/rejected"] == pytest.approx(B * rejected.mean(), rel=1e-5)
    assert values["rewards/margins"] == pytest.approx(B * (chosen - rejected).mean(), rel=1e-4)
    assert values["rewards/accuracies"] == pytest.approx((chosen > rejected).mean())
    assert values["logps/chosen"] == pytest.approx(numbers["policy_w"].mean(), rel=1e-6)
    if name in ("sft", "cpo", "orpo"):
        nll = -numbers["policy_w"].sum() / numbers["tokens_w"].sum()
        assert values["nll_loss"] == pytest.approx(nll, rel=1e-6)


MIX = """
type: mix
losses: [{type: sigmoid, beta: 0.2}, bco_pair, sft, {type: sigmoid, beta: 0.6}]
weights: [2, 3, 4, 5]
"""


def test_a_mix_is_the_weighted_sum():
    numbers = random_numbers(4)
    mix = from_yaml(MIX)
    parts = [loss_of("sigmoid", beta=0.2), loss_of("bco_pair", beta=0.1), loss_of("sft"), loss_of("sigmoid", beta=0.6)]
    each = [losses_of(loss, numbers) for loss in parts]
    np.testing.assert_allclose(
        losses_of(mix, numbers), sum(w * x for w, x in zip((2, 3, 4, 5), each, strict=True)), rtol=1e-6
    )
    found = mix(scores(numbers, "policy"), scores(numbers, "reference"), examples_of(PAIRS)).metrics
    names = ["sigmoid_loss", "bco_pair_loss", "sft_loss", "sigmoid_2_loss"]
    for name, values in zip(names, each, strict=True):
        assert float(found[name].value) == pytest.approx(values.mean(), rel=1e-6)
    assert float(found["nll_loss"].value) == pytest.approx(each[2].mean(), rel=1e-6)
    assert float(found["rewards/chosen"].value) == pytest.approx(0.2 * ratios(numbers)[0].mean(), rel=1e-5)


def test_a_mix_needs_what_its_losses_need():
    def mix(*losses: dict, **settings) -> Loss:
        return LOSSES["mix"](losses=[loss_of(x.pop("type"), **x) for x in losses], **settings)

    free = mix({"type": "simpo"}, {"type": "sft"})
    assert (free.needs_reference, free.needs_tokens, free.needs_of_batch) == (False, False, "tokens")
    assert mix({"type": "sigmoid"}, {"type": "aot"}, {"type": "sft"}).needs_of_batch == "scores"
    weighted = mix({"type": "simpo"}, {"type": "sigmoid", "use_weighting": True})
    assert weighted.needs_reference and weighted.all_statistics == ("log_sum_of_squares",)
    assert not weighted.needs_tokens_of_reference
    assert mix({"type": "hinge", "ld_alpha": 0.5}).needs_tokens_of_reference
    both = mix({"type": "sigmoid"}, {"type": "hinge"}, weights=[2.0, 3.0])
    assert both.loss_where_equal(examples_of(1)) == pytest.approx(2 * math.log(2) + 3)
    shared = LOSSES["mix"](beta=0.7, losses=[LOSSES["sigmoid"](), LOSSES["simpo"]()])
    assert [loss.beta for _, loss in shared.parts] == [0.7, 0.7]


def cut(batch: Scores, examples: Examples, at: int) -> list[tuple[Scores, Examples]]:
    """Two batches of pairs, {response}, from one."""

    def part(first: int, last: int) -> tuple[Scores, Examples]:
        taken = [named(x.array[2 * first : 2 * last], "response") for x in (batch.log_probs, batch.tokens)]
        return Scores(*taken), examples_of(last - first)

    return [part(0, at), part(at, examples.ids.size)]


@pytest.mark.parametrize("name", [*SORTED, "sft", "cpo", "orpo", "mix"])
def test_a_loss_over_the_batch_is_the_same_in_parts(name):
    """With what the parts know of the batch; each alone is another loss."""
    numbers = random_numbers(5, count=12)
    loss = from_yaml(MIX.replace("bco_pair", "aot")) if name == "mix" else by_hand(name, numbers)[0]
    # Another order of the policy's log-probs, so that ranks are not those of the reference.
    numbers |= {"policy_w": numbers["policy_w"][::-1].copy()}
    policy, reference, examples = scores(numbers, "policy"), scores(numbers, "reference"), examples_of(12)
    parts = list(zip(cut(policy, examples, 5), cut(reference, examples, 5), strict=True))
    known = of_whole_batch(loss, [ScoredPart(ours, theirs, mine) for (ours, mine), (theirs, _) in parts])

    def total(policy, reference, examples):
        return loss(policy, reference, examples).loss.sum().scalar()

    def in_parts(shift):
        return sum(
            total(
                replace(ours, log_probs=ours.log_probs + shift * ours.log_probs),
                theirs,
                replace(mine, of_batch=of_part),
            )
            for ((ours, mine), (theirs, _)), of_part in zip(parts, known, strict=True)
        )

    def whole(shift):
        return total(replace(policy, log_probs=policy.log_probs + shift * policy.log_probs), reference, examples)

    np.testing.assert_allclose(jax.value_and_grad(in_parts)(0.0), jax.value_and_grad(whole)(0.0), rtol=1e-5)
    alone = sum(float(total(ours, theirs, mine)) for (ours, mine), (theirs, _) in parts)
    assert abs(alone - float(whole(0.0))) > 1e-3 * abs(alone)


@pytest.mark.parametrize("name", SORTED)
def test_the_gradient_of_a_sorted_loss_is_that_of_its_formula(name):
    """Against differences of the formula in float64."""
    numbers = random_numbers(6)
    loss = by_hand(name, numbers)[0]

    def total(chosen):
        interleaved = jnp.stack([chosen, jnp.asarray(numbers["policy_l"], jnp.float32)], -1).reshape(-1)
        policy = replace(scores(numbers, "policy"), log_probs=named(interleaved, "response"))
        return loss(policy, scores(numbers, "reference"), examples_of(PAIRS)).loss.sum().scalar()

    slopes = jax.grad(total)(jnp.asarray(numbers["policy_w"], jnp.float32))
    for pair in range(PAIRS):
        up, down = (numbers | {"policy_w": numbers["policy_w"] + sign * 1e-6 * np.eye(PAIRS)[pair]} for sign in (1, -1))
        slope = (by_hand(name, up)[1].sum() - by_hand(name, down)[1].sum()) / 2e-6
        np.testing.assert_allclose(slopes[pair], slope, rtol=1e-3, atol=1e-6)


def with_tokens(
    numbers: dict[str, Numbers], model: str, seed: int
) -> tuple[Scores, list[np.ndarray], list[np.ndarray]]:
    """Scores {row, ...} of one row with those of each token; log-probs and a statistic of each response by hand."""
    rng = np.random.default_rng(seed)
    counts = np.stack([numbers["tokens_w"], numbers["tokens_l"]], -1).reshape(-1).astype(int)
    log_probs = [-rng.uniform(0.1, 3, count) for count in counts]
    squares = [-rng.uniform(0.1, 3, count) for count in counts]

    def row(values) -> hax.NamedArray:
        return named(np.concatenate([np.asarray(x) for x in values])[None], "row", "target")

    tokens = TokenScores(
        row(log_probs).astype(jnp.float32),
        row([np.full(count, number) for number, count in enumerate(counts)]).astype(jnp.int32),
        row([np.arange(count) for count in counts]).astype(jnp.int32),
        {"log_sum_of_squares": row(squares).astype(jnp.float32)},
    )
    sums = named(np.array([x.sum() for x in log_probs], np.float32)[None], "row", "response")
    return Scores(sums, named(counts[None].astype(np.int32), "row", "response"), tokens), log_probs, squares


def in_a_row(count: int) -> Examples:
    return jax.tree.map(
        lambda x: hax.named(x.array[None], (hax.Axis("row", 1), *x.axes)),
        examples_of(count),
        is_leaf=lambda x: isinstance(x, hax.NamedArray),
    )


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "ipo", "bco_pair"])
def test_tokens_beyond_the_shorter_response_count_less(name):
    numbers = random_numbers(7)
    policy, ours, _ = with_tokens(numbers, "policy", 1)
    reference, theirs, _ = with_tokens(numbers, "reference", 2)
    alpha, shortest = 0.3, np.minimum(numbers["tokens_w"], numbers["tokens_l"])

    def weighted(tokens: list[np.ndarray]) -> list[Numbers]:
        sums = [x[: shortest[n // 2]].sum() + alpha * x[shortest[n // 2] :].sum() for n, x in enumerate(tokens)]
        return [np.array(sums[::2]), np.array(sums[1::2])]

    by_weight = dict(zip(["policy_w", "policy_l"], weighted(ours), strict=True))
    by_weight |= dict(zip(["reference_w", "reference_l"], weighted(theirs), strict=True))
    loss, expected = by_hand(name, numbers | by_weight)
    loss = replace(loss, ld_alpha=alpha)
    assert loss.needs_tokens and loss.needs_tokens_of_reference
    found = loss(policy, reference, in_a_row(PAIRS))
    np.testing.assert_allclose(found.loss.array[0], expected, rtol=1e-4)
    assert float(found.metrics["logps/chosen"].value) == pytest.approx(by_weight["policy_w"].mean(), rel=1e-5)


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "apo_zero"])
def test_weighting_multiplies_each_loss_by_the_likelihood_of_its_pair(name):
    numbers = random_numbers(8)
    policy, ours, squares = with_tokens(numbers, "policy", 3)
    reference, theirs, _ = with_tokens(numbers, "reference", 4)
    sums = {"policy": [x.sum() for x in ours], "reference": [x.sum() for x in theirs]}
    by_sums = {f"{model}_{x}": np.array(s[first::2]) for model, s in sums.items() for first, x in enumerate("wl")}
    loss, expected = by_hand(name, numbers | by_sums)
    weights = np.exp([(x - y).mean() for x, y in zip(ours, squares, strict=True)])
    weight = weights[::2] * weights[1::2]
    loss = replace(loss, use_weighting=True)
    assert loss.all_statistics == ("log_sum_of_squares",) and not loss.needs_tokens_of_reference
    assert loss.loss_where_equal(examples_of(1)) is None

    def losses(shift):
        per_token = replace(policy.per_token, log_probs=policy.per_token.log_probs + shift)
        return loss(replace(policy, per_token=per_token), reference, in_a_row(PAIRS))

    np.testing.assert_allclose(losses(0.0).loss.array[0], weight * expected, rtol=1e-4)
    assert float(losses(0.0).metrics["pair_weight"].value) == pytest.approx(weight.mean(), rel=1e-4)
    assert jax.grad(lambda shift: losses(shift).loss.sum().scalar())(0.0) == 0.0, "no gradient through weights"


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "{type: bco_pair, f_divergence_type: forward_kl}",
            r"loss\.f_divergence_type=forward_kl is for losses of the diff",
        ),
        ("{type: aot, f_divergence_type: js_divergence}", r"loss\.type=aot is no such loss"),
        ("{type: nca_pair, reference_free: true}", r"loss\.reference_free=True is for losses of the difference"),
        (
            "{f_divergence_type: forward_kl, reference_free: true}",
            r"loss\.f_divergence_type=forward_kl is a divergence",
        ),
        ("{type: aot, use_weighting: true}", r"loss\.use_weighting=true weighs single pairs"),
        ("{type: aot_unpaired, use_weighting: true}", r"loss\.type=aot_unpaired compares sorted"),
        ("{type: exo_pair, label_smoothing: 0.0}", r"loss\.label_smoothing=0\.0 makes the loss exo_pair infinite"),
        ("{type: robust, label_smoothing: 0.5}", r"loss\.label_smoothing=0\.5 must be in"),
        ("{ld_alpha: 1.5}", r"loss\.ld_alpha=1\.5 must be in \[0, 1\]"),
        ("{type: discopop, discopop_tau: 2.0}", r"loss\.discopop_tau=2\.0 must be in \(0, 1\]"),
        ("{type: dpop, dpop_lambda: -1.0}", r"loss\.dpop_lambda=-1\.0 must be at least 0"),
        ("{type: cpo, cpo_alpha: -1.0}", r"loss\.cpo_alpha=-1\.0 must be at least 0"),
        ("{type: orpo, orpo_alpha: -1.0}", r"loss\.orpo_alpha=-1\.0 must be at least 0"),
        ("{type: simpo, gamma: .nan}", r"loss\.gamma=nan must be a finite"),
        ("{type: mix}", r"loss\.losses must list at least one loss"),
        ("{type: mix, losses: [sigmoid], weights: [1.0, 2.0]}", r"loss\.weights has 2 weights for the 1 losses"),
        ("{type: mix, losses: [sigmoid], weights: [-1.0]}", r"loss\.weights=\[-1\.0\] must be at least 0"),
        ("{type: mix, beta: 0.3, losses: [{type: ipo, beta: 0.2}]}", r"loss\.losses\.0\.beta=0\.2 disagree"),
    ],
)
def test_what_does_not_go_together_is_rejected_by_its_setting(text, message):
    with pytest.raises(ValueError, match=message):
        from_yaml(text)
