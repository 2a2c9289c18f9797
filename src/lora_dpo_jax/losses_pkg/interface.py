"""What a loss is: a value chosen by its `type` in the configuration, which the objective calls."""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import draccus
import haliax as hax
import jax
import jax.numpy as jnp
from haliax import NamedArray

from lora_dpo_jax.losses.scores import ExampleLosses, Examples, PairLogProbs, Scores, Weighted


@dataclass(frozen=True)
class Needs:
    """What a loss asks for beside the policy's log-probs of whole responses."""

    reference: bool = True
    by_token: bool = False  # Scores.by_token
    statistics: tuple[str, ...] = ()  # names of log_probs.TOKEN_STATISTICS
    columns: tuple[str, ...] = ()  # of the data


@dataclass(frozen=True)
class PreferenceLoss(draccus.ChoiceRegistry, abc.ABC):
    """From scores of the policy and the reference to a loss for each example."""

    @classmethod
    def default_choice_name(cls) -> str:
        return "sigmoid"

    @property
    @abc.abstractmethod
    def needs(self) -> Needs: ...

    @abc.abstractmethod
    def __call__(
        self, policy: Scores, reference: Scores | None, examples: Examples, *, is_reference: jax.Array | bool = False
    ) -> ExampleLosses:
        """`reference` is None where `needs` asks for none.

        `is_reference` says that policy and reference are the same model, so that what differs is rounding.
        """

    @abc.abstractmethod
    def where_equal(self) -> float | None:
        """The loss of any example of which policy and reference give the same scores; None: it depends."""


@dataclass(frozen=True)
class PairLoss(PreferenceLoss):
    """A loss of each comparison by itself; that of an example is their weighted sum."""

    beta: float = 0.1  # how strongly the policy is held to the reference, in reward units per nat
    reference_free: bool = False  # a uniform reference: its log-ratio of chosen to rejected counts as zero

    def __post_init__(self):
        if not self.beta > 0:
            raise ValueError(f"loss.beta={self.beta} must be positive")

    @abc.abstractmethod
    def pair_loss(self, chosen: NamedArray, rejected: NamedArray, policy: PairLogProbs) -> NamedArray:
        """The loss of each comparison from log(policy / reference) of its two responses, in nats."""

    @property
    def needs(self) -> Needs:
        return Needs(reference=not self.reference_free)

    def where_equal(self) -> float | None:
        if self.reference_free:
            return None
        # Of responses of one token each, as no length may matter where nothing differs.
        zero, one = hax.named(jnp.zeros(1), "comparison"), hax.named(jnp.ones(1), "comparison")
        return float(self.pair_loss(zero, zero, PairLogProbs(zero, zero, one, one)).array[0])

    def __call__(
        self, policy: Scores, reference: Scores | None, examples: Examples, *, is_reference: jax.Array | bool = False
    ) -> ExampleLosses:
        pairs = examples.pairs(policy)
        chosen, rejected = pairs.chosen, pairs.rejected
        held_to = None
        if not self.reference_free:
            if reference is None:
                raise ValueError(f"{type(self).__name__} needs the reference's log-probs unless reference_free is set")
            held_to = examples.pairs(reference)
            chosen, rejected = chosen - held_to.chosen, rejected - held_to.rejected
        losses = self.pair_loss(chosen, rejected, pairs)
        metrics = pair_metrics(losses, self.beta * chosen, self.beta * rejected, pairs, held_to, is_reference)
        total = examples.sum_by_example(losses * examples.weight, examples.example_of_comparison)
        return ExampleLosses(total, {name: Weighted(values, _share(examples)) for name, values in metrics.items()})


def pair_metrics(
    losses: NamedArray,
    chosen_reward: NamedArray,
    rejected_reward: NamedArray,
    policy: PairLogProbs,
    reference: PairLogProbs | None,
    is_reference: jax.Array | bool,
) -> dict[str, NamedArray]:
    """Of each comparison. Rewards are beta * log(policy / reference).

    `dpo_accuracy` counts a tie as half, so that it is 0.5 where policy and reference are equal; `rewards/accuracies`
    counts it as wrong, as TRL does.
    """
    no_margin = hax.zeros_like(policy.chosen)
    margin = chosen_reward - rejected_reward
    wins = ((margin > 0) & ~jnp.asarray(is_reference)).astype(jnp.float32)
    ties = ((margin == 0) | is_reference).astype(jnp.float32)
    return {
        "dpo_loss": losses,
        "dpo_margin_policy": policy.chosen - policy.rejected,
        "dpo_margin_ref": no_margin if reference is None else reference.chosen - reference.rejected,
        "dpo_accuracy": wins + 0.5 * ties,
        "dpo_chosen_reward": chosen_reward,
        "dpo_rejected_reward": rejected_reward,
        "rewards/chosen": chosen_reward,
        "rewards/rejected": rejected_reward,
        "rewards/accuracies": wins,
        "rewards/margins": margin,
        "logps/chosen": policy.chosen,
        "logps/rejected": policy.rejected,
    }
