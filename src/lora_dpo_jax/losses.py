"""Preference losses: from the log-probabilities of pairs to a loss per pair. Nothing here knows of tokens."""

import abc
import math
from dataclasses import dataclass
from typing import Any

import draccus
import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
from haliax import NamedArray


class PairLogProbs(eqx.Module):
    """log p(response | prompt) in nats, summed over response tokens, and the number of these tokens.

    All four have the same axes, one of which counts pairs.
    """

    chosen: NamedArray
    rejected: NamedArray
    chosen_tokens: NamedArray
    rejected_tokens: NamedArray


class PairLosses(eqx.Module):
    """Per pair: the loss, and the rewards beta * log(policy / reference). Float32, with the axes of the log-probs."""

    loss: NamedArray
    chosen_reward: NamedArray
    rejected_reward: NamedArray


@dataclass(frozen=True)
class PreferenceLoss(draccus.ChoiceRegistry, abc.ABC):
    """A loss chosen by its `type` in the configuration."""

    beta: float = 0.1  # how strongly the policy is held to the reference, in reward units per nat
    reference_free: bool = False  # a uniform reference: its log-ratio of chosen to rejected counts as zero

    @classmethod
    def default_choice_name(cls) -> str:
        return "sigmoid"

    def __post_init__(self):
        if not 0 < self.beta < math.inf:
            raise ValueError(f"loss.beta={self.beta} must be positive and finite")

    @abc.abstractmethod
    def pair_loss(self, chosen: NamedArray, rejected: NamedArray, policy: PairLogProbs) -> NamedArray:
        """The loss of each pair from log(policy / reference) of its responses, in nats."""

    def __call__(self, policy: PairLogProbs, reference: PairLogProbs | None) -> PairLosses:
        """`reference` may be None if the loss is `reference_free`; its rewards are then beta * log(policy)."""
        if self.reference_free:
            chosen, rejected = policy.chosen, policy.rejected
        elif reference is None:
            raise ValueError(f"{type(self).__name__} needs the reference's log-probs unless reference_free is set")
        else:
            chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
        return PairLosses(self.pair_loss(chosen, rejected, policy), self.beta * chosen, self.beta * rejected)


@dataclass(frozen=True)
class _Logistic(PreferenceLoss):
    label_smoothing: float = 0.0  # the probability that a label is wrong (cDPO); 0 <= label_smoothing < 0.5

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 <= np.float32(self.label_smoothing) < 0.5:
            raise ValueError(f"loss.label_smoothing={self.label_smoothing} must be in [0, 0.5), in float32 too")

    def negative_log_likelihood(self, logits: NamedArray) -> NamedArray:
        """Eq. 3 of https://ericmitchell.ai/cdpo.pdf."""
        # softplus(-x) is -log sigmoid(x) without overflow.
        kept = hax.nn.softplus(-logits)
        if self.label_smoothing == 0.0:
            return kept
        return (1 - self.label_smoothing) * kept + self.label_smoothing * hax.nn.softplus(logits)


@PreferenceLoss.register_subclass("sigmoid")
@dataclass(frozen=True)
class Dpo(_Logistic):
    """Eq. 7 of https://arxiv.org/abs/2305.18290."""

    def pair_loss(self, chosen, rejected, policy):
        return self.negative_log_likelihood(self.beta * (chosen - rejected))


@PreferenceLoss.register_subclass("sigmoid_norm")
@dataclass(frozen=True)
class LengthNormalizedDpo(_Logistic):
    """DPO on log-ratios per token: section 5.1.3 of Tulu 3, https://arxiv.org/abs/2411.15124."""

    def pair_loss(self, chosen, rejected, policy):
        # An empty slot of a packed row has no tokens; it is masked later and must not divide by zero now.
        per_chosen = chosen / hax.maximum(policy.chosen_tokens.astype(jnp.float32), 1.0)
        per_rejected = rejected / hax.maximum(policy.rejected_tokens.astype(jnp.float32), 1.0)
        return self.negative_log_likelihood(self.beta * (per_chosen - per_rejected))


def preference_metrics(
    losses: PairLosses,
    policy: PairLogProbs,
    reference: PairLogProbs | None,
    is_pair: NamedArray,
    *,
    all_ties: jax.Array | bool = False,
) -> dict[str, NamedArray]:
    """Sums over the pairs where `is_pair` holds; divided by their number they are the metrics of those names.

    `dpo_accuracy` counts a tie as half, so that it is 0.5 where policy and reference are equal;
    `rewards/accuracies` counts it as wrong, as TRL does. `all_ties` says that the two are the same model: margins are
    then the rounding of two programs, and no pair is won.
    """
    zero = hax.zeros_like(policy.chosen)
    reference_margin = reference.chosen - reference.rejected if reference is not None else zero
    margin = losses.chosen_reward - losses.rejected_reward
    one_model: Any = jnp.asarray(all_ties)
    wins: Any = (margin > 0) & ~one_model
    ties: Any = margin == 0
    ties = ties | one_model
    per_pair = {
        "dpo_loss": losses.loss,
        "dpo_margin_policy": policy.chosen - policy.rejected,
        "dpo_margin_ref": reference_margin,
        "dpo_accuracy": wins.astype(jnp.float32) + 0.5 * ties.astype(jnp.float32),
        "dpo_chosen_reward": losses.chosen_reward,
        "dpo_rejected_reward": losses.rejected_reward,
        "rewards/chosen": losses.chosen_reward,
        "rewards/rejected": losses.rejected_reward,
        "rewards/accuracies": wins.astype(jnp.float32),
        "rewards/margins": margin,
        "logps/chosen": policy.chosen,
        "logps/rejected": policy.rejected,
    }
    return {name: hax.sum(hax.where(is_pair, values, 0.0)) for name, values in per_pair.items()}
