"""Every loss of pairs by hand, in float64, and numbers to compare with."""

import math
from collections.abc import Callable

import haliax as hax
import jax.numpy as jnp
import numpy as np
from tiny_pairs import named

from lora_dpo_jax.data.memory import MemoryExamples
from lora_dpo_jax.losses import LOSSES, Examples, Loss, Scores

PAIRS = 7
Numbers = np.ndarray  # float64 [pair]


def log_sigmoid(x: Numbers) -> Numbers:
    return -np.logaddexp(0, -x)


def sigmoid(x: Numbers) -> Numbers:
    return np.exp(log_sigmoid(x))


def log_odds(x: Numbers) -> Numbers:
    return x - np.log(1 - np.exp(x))


def smoothed(logits: Numbers) -> Numbers:
    return -0.9 * log_sigmoid(logits) - 0.1 * log_sigmoid(-logits)


# By hand, in float64: the loss of each pair from log(policy / reference) of chosen and rejected, c and r.
B = 0.3
OF_RATIOS: dict[str, tuple[dict, Callable]] = {
    "sigmoid": ({}, lambda c, r: -log_sigmoid(B * (c - r))),
    "plackett_luce": ({}, lambda c, r: -log_sigmoid(B * (c - r))),
    "hinge": ({}, lambda c, r: np.maximum(0, 1 - B * (c - r))),
    "exo_pair": (
        {"label_smoothing": 0.01},
        lambda c, r: (
            sigmoid(B * (c - r)) * (log_sigmoid(B * (c - r)) - math.log(0.99))
            + sigmoid(B * (r - c)) * (log_sigmoid(B * (r - c)) - math.log(0.01))
        ),
    ),
    "nca_pair": ({}, lambda c, r: -log_sigmoid(B * c) - 0.5 * log_sigmoid(-B * c) - 0.5 * log_sigmoid(-B * r)),
    "robust": (
        {"label_smoothing": 0.2},
        lambda c, r: (-0.8 * log_sigmoid(B * (c - r)) + 0.2 * log_sigmoid(B * (r - c))) / 0.6,
    ),
    "bco_pair": ({}, lambda c, r: -log_sigmoid(B * c) - log_sigmoid(-B * r)),
    "sppo_hard": ({}, lambda c, r: (c - 0.5 / B) ** 2 + (r + 0.5 / B) ** 2),
    "apo_zero": ({}, lambda c, r: 1 - sigmoid(B * c) + sigmoid(B * r)),
    "apo_down": ({}, lambda c, r: sigmoid(B * c) + 1 - sigmoid(B * (c - r))),
    "discopop": (
        {"discopop_tau": 0.4},
        lambda c, r: (
            -log_sigmoid(B * (c - r)) * (1 - sigmoid(B * (c - r) / 0.4))
            + np.exp(-B * (c - r) + log_sigmoid(B * (c - r) / 0.4))
        ),
    ),
    "dpop": ({"dpop_lambda": 5.0}, lambda c, r: -log_sigmoid(B * (c - r - 5 * np.maximum(0, -c)))),
    "aot_unpaired": (
        {"label_smoothing": 0.1},
        lambda c, r: smoothed(B * (np.sort(c) - np.sort(r))),
    ),
}
# Likewise, from c and r per token, or of the log-probs of the policy per token.
OF_MEAN_RATIOS: dict[str, tuple[dict, Callable]] = {
    "sigmoid_norm": ({}, lambda c, r: -log_sigmoid(B * (c - r))),
    "ipo": ({}, lambda c, r: (c - r - 1 / (2 * B)) ** 2),
}
OF_MEAN_LOG_PROBS: dict[str, tuple[dict, Callable]] = {
    "simpo": ({"gamma": 0.7}, lambda c, r: -log_sigmoid(B * (c - r) - 0.7)),
    "alphapo": (
        {"gamma": 0.7, "alpha": 0.5},
        lambda c, r: -log_sigmoid(B * ((1 - np.exp(c) ** -0.5) - (1 - np.exp(r) ** -0.5)) / 0.5 - 0.7),
    ),
}
SCORES = {"chosen": "c", "rejected": "r"}


def loss_of(name: str, **settings) -> Loss:
    return LOSSES[name](**{"beta": B, **settings})


def random_numbers(seed: int = 0, count: int = PAIRS) -> dict[str, Numbers]:
    """Log-probs of the policy and of the reference, and numbers of tokens, of chosen and rejected."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 30, (2, count))
    reference = -rng.uniform(0.5, 3, (2, count)) * tokens
    policy = np.minimum(reference + rng.normal(0, 3, (2, count)), -0.1)
    names = ["policy_w", "policy_l", "reference_w", "reference_l", "tokens_w", "tokens_l"]
    return dict(zip(names, [*policy, *reference, *tokens], strict=True))


def in_turn(chosen: Numbers, rejected: Numbers, dtype) -> hax.NamedArray:
    return named(jnp.asarray(np.stack([chosen, rejected], -1).reshape(-1), dtype), "response")


def scores(numbers: dict[str, Numbers], model: str, dtype=jnp.float32) -> Scores:
    log_probs = in_turn(numbers[f"{model}_w"], numbers[f"{model}_l"], dtype)
    return Scores(log_probs, in_turn(numbers["tokens_w"], numbers["tokens_l"], jnp.int32))


def examples_of(count: int) -> Examples:
    return MemoryExamples([([1], [2], [3])] * count).arrays.examples


def losses_of(loss: Loss, numbers: dict[str, Numbers]) -> np.ndarray:
    found = loss(scores(numbers, "policy"), scores(numbers, "reference"), examples_of(len(numbers["policy_w"])))
    return np.asarray(found.loss.array)


def ratios(numbers: dict[str, Numbers]) -> tuple[Numbers, Numbers]:
    return numbers["policy_w"] - numbers["reference_w"], numbers["policy_l"] - numbers["reference_l"]


def per_token(chosen: Numbers, rejected: Numbers, numbers: dict[str, Numbers]) -> tuple[Numbers, Numbers]:
    return chosen / numbers["tokens_w"], rejected / numbers["tokens_l"]


def by_hand(name: str, numbers: dict[str, Numbers]) -> tuple[Loss, Numbers]:
    """The loss, and its values by hand."""
    if name in OF_RATIOS:
        settings, formula = OF_RATIOS[name]
        return loss_of(name, **settings), formula(*ratios(numbers))
    if name in OF_MEAN_RATIOS:
        settings, formula = OF_MEAN_RATIOS[name]
        return loss_of(name, **settings), formula(*per_token(*ratios(numbers), numbers))
    if name in OF_MEAN_LOG_PROBS:
        settings, formula = OF_MEAN_LOG_PROBS[name]
        return loss_of(name, **settings), formula(*per_token(numbers["policy_w"], numbers["policy_l"], numbers))
    nll = -numbers["policy_w"] / numbers["tokens_w"].mean()
    chosen, rejected = per_token(numbers["policy_w"], numbers["policy_l"], numbers)
    if name == "sft":
        return loss_of(name), nll
    if name == "cpo":
        return loss_of(name, cpo_alpha=0.4), 0.4 * nll - log_sigmoid(B * (numbers["policy_w"] - numbers["policy_l"]))
    if name == "orpo":
        return loss_of(name, orpo_alpha=0.7), 0.7 * nll - B * log_sigmoid(log_odds(chosen) - log_odds(rejected))
    assert name == "aot", name
    margin = np.sort(numbers["policy_w"] - numbers["policy_l"]) - np.sort(
        numbers["reference_w"] - numbers["reference_l"]
    )
    return loss_of(name), -log_sigmoid(B * margin)


SINGLE = [name for name, loss in LOSSES.items() if loss.needs_comparisons is True]


# Of each loss, and of each divergence with those that take it.
EVERYWHERE = {name: by_hand(name, random_numbers())[0] for name in SINGLE} | {
    f"{name}, {divergence}": loss_of(name, f_divergence_type=divergence)
    for name in ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
    for divergence in ("forward_kl", "js_divergence", "alpha_divergence")
}
