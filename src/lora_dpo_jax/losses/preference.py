"""Losses of comparisons: two responses of one example, one of them preferred."""

import abc
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
from haliax import NamedArray

from lora_dpo_jax.columns import MARGIN
from lora_dpo_jax.losses.divergences import FDivergence, reward_of
from lora_dpo_jax.losses.examples import Examples
from lora_dpo_jax.losses.interface import Loss, mean_of_equal_scores
from lora_dpo_jax.losses.scores import Scores, TokenScores
from lora_dpo_jax.losses.token_weights import LOG_SUM_OF_SQUARES, likelihood_weight, with_lighter_tail
from lora_dpo_jax.objective import ExampleLosses, Mean
from lora_dpo_jax.settings.choices import check_choice

_ROOM = __name__.rpartition("preference")[0]  # the modules of this package


class Compared(eqx.Module):
    """One model's scores of the two responses of each comparison, and the data about them."""

    chosen: NamedArray  # float32 {..., comparison}: log p(response | prompt) in nats
    rejected: NamedArray
    chosen_tokens: NamedArray  # int32 {..., comparison}
    rejected_tokens: NamedArray
    examples: Examples
    per_token: TokenScores | None  # if the loss declares `per_token`

    @staticmethod
    def of(scores: Scores, examples: Examples) -> "Compared":
        chosen, rejected = examples.compared(scores.log_probs.astype(jnp.float32))
        return Compared(chosen, rejected, *examples.compared(scores.tokens), examples, scores.per_token)

    def column(self, name: str) -> NamedArray:
        """A column with one number per example: the number of each comparison's example, float32 {..., comparison}."""
        return self.examples.of_comparisons(self.examples.column(name))

    def columns(self, name: str) -> tuple[NamedArray, NamedArray]:
        """A column with one number per response: those of chosen and rejected responses, float32 {..., comparison}."""
        return self.examples.compared(self.examples.column(name))


@dataclass(frozen=True)
class ComparisonLoss(Loss):
    """A loss of each comparison. An example's loss is the weighted sum over its comparisons."""

    needs_comparisons = True
    name: ClassVar[str | None] = None  # of the metric `<name>_loss`; None: the loss's `type`
    per_token_rewards: ClassVar[bool] = False  # whether a reward is divided by the response's number of tokens

    @abc.abstractmethod
    def pair_loss(self, chosen: NamedArray, rejected: NamedArray, policy: Compared) -> NamedArray:
        """The loss of each comparison from the rewards of its responses in units of beta, all {..., comparison}.

        These are log(policy / reference) in nats or, without a reference, the policy's log-probs, unless the loss has
        rewards of its own.
        """

    def reward(self, log_ratio: NamedArray, tokens: NamedArray) -> NamedArray:
        """The implicit reward of a response in units of beta, {..., comparison}.

        `log_ratio` is log(policy / reference), or log p if there is no reference, in nats.
        """
        return log_ratio / at_least_one(tokens) if self.per_token_rewards else log_ratio

    def rewards(
        self, policy: Scores, reference: Scores | None, examples: Examples
    ) -> tuple[NamedArray, NamedArray, Compared, Compared | None]:
        """(rewards of chosen and rejected responses, both {..., comparison} in units of beta; both models' scores)."""
        ours = Compared.of(policy, examples)
        chosen, rejected = ours.chosen, ours.rejected
        theirs = None
        if self.needs_reference:
            if reference is None:
                raise ValueError(f"{type(self).__name__} needs the reference's log-probs{self._unless}")
            theirs = Compared.of(reference, examples)
            chosen, rejected = chosen - theirs.chosen, rejected - theirs.rejected
        chosen, rejected = self.reward(chosen, ours.chosen_tokens), self.reward(rejected, ours.rejected_tokens)
        return chosen, rejected, ours, theirs

    def margins(self, policy: Scores, reference: Scores | None, examples: Examples) -> NamedArray:
        chosen, rejected, _, _ = self.rewards(policy, reference, examples)
        return self.beta * chosen - self.beta * rejected

    def terms(self, policy: Compared) -> dict[str, tuple[float, NamedArray]]:
        """More terms of the loss: (weight, values {..., comparison}) by the name of their metric."""
        return {}

    def pair_weight(self, policy: Scores, examples: Examples) -> NamedArray | None:
        """The weight of each comparison's loss, {..., comparison} without gradient. None: all weigh the same."""
        return None

    def __call__(
        self, policy: Scores, reference: Scores | None, examples: Examples, *, are_equal: jax.Array | bool = False
    ) -> ExampleLosses:
        examples = self.knowing_batch(policy, reference, examples)
        chosen, rejected, ours, theirs = self.rewards(policy, reference, examples)
        loss = self.pair_loss(self._less_margin(chosen, examples), rejected, ours)
        per_pair = {}
        for name, (weight, values) in self.terms(ours).items():
            per_pair[name] = values
            loss = loss + weight * values
        if (pair_weight := self.pair_weight(policy, examples)) is not None:
            per_pair["pair_weight"] = pair_weight
            loss = pair_weight * loss
        of_examples = examples.sum_of_comparisons(hax.where(examples.weight != 0, examples.weight * loss, 0.0))
        per_pair = {self.loss_name: loss} | per_pair
        per_pair |= preference_metrics(ours, theirs, self.beta * chosen, self.beta * rejected, are_equal=are_equal)
        share = examples.share
        return ExampleLosses(of_examples, {name: Mean.over(values, share) for name, values in per_pair.items()})

    def _less_margin(self, chosen: NamedArray, examples: Examples) -> NamedArray:
        """The rewards of chosen responses less the target margins of the data, in units of beta."""
        if not self.takes_margins or MARGIN not in examples.columns:
            return chosen
        return chosen - examples.of_comparisons(examples.column(MARGIN)) / self.beta

    @property
    def loss_name(self) -> str:
        """The name of the metric that is the loss."""
        return f"{self.name or self.get_choice_name(type(self))}_loss"

    @property
    def _unless(self) -> str:
        return ""


@dataclass(frozen=True)
class PreferenceLoss(ComparisonLoss):
    """A loss of log(policy / reference), with the options that such losses share."""

    reference_free: bool = False  # assume a uniform reference, whose log-ratio of chosen to rejected is zero
    # The reward is the derivative of this divergence between policy and reference at their ratio (f-DPO).
    f_divergence_type: FDivergence = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5  # alpha of f_divergence_type=alpha_divergence; 1 is reverse_kl
    use_weighting: bool = False  # weigh each pair by how likely the policy is to write its responses (WPO)
    # The weight of tokens beyond the length of the example's shortest response (LD-DPO), from 0 to 1; null: 1.
    ld_alpha: float | None = None

    # Whether the loss depends on the rewards through their difference alone. What a uniform reference or another
    # divergence leaves out of a reward depends on the prompt alone, and cancels in the difference.
    is_of_margin: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        check_choice("loss.f_divergence_type", self.f_divergence_type, get_args(FDivergence))
        if not self.is_of_margin:
            self._refuse_without_margin()
        if self.reference_free and self.f_divergence_type != "reverse_kl":
            raise ValueError(
                f"loss.f_divergence_type={self.f_divergence_type} is a divergence from the reference, and "
                "loss.reference_free=true leaves the reference out: give one of them"
            )
        if self.ld_alpha is not None and not 0.0 <= self.ld_alpha <= 1.0:
            raise ValueError(f"loss.ld_alpha={self.ld_alpha} must be in [0, 1], or null")

    @property
    def needs_reference(self) -> bool:
        return not self.reference_free

    @property
    def takes_margins(self) -> bool:
        return self.is_of_margin

    @property
    def all_statistics(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*self.statistics, *([LOG_SUM_OF_SQUARES] if self.use_weighting else [])]))

    @property
    def needs_tokens(self) -> bool:
        return super().needs_tokens or self.ld_alpha is not None

    @property
    def needs_tokens_of_reference(self) -> bool:
        return super().needs_tokens_of_reference or self.needs_reference and self.ld_alpha is not None

    def loss_where_equal(self, examples: Examples) -> float | None:
        """The value at rewards of zero. None for a loss of your own, which may depend on more."""
        is_ours = type(self).pair_loss.__module__.startswith(_ROOM)
        if not is_ours or self.use_weighting or not self.needs_reference:
            return None
        return mean_of_equal_scores(self, examples)

    def reward(self, log_ratio: NamedArray, tokens: NamedArray) -> NamedArray:
        return super().reward(reward_of(log_ratio, self.f_divergence_type, self.f_alpha_divergence_coef), tokens)

    def rewards(self, policy: Scores, reference: Scores | None, examples: Examples):
        if self.ld_alpha is not None:
            policy = with_lighter_tail(policy, examples, self.ld_alpha)
            reference = None if reference is None else with_lighter_tail(reference, examples, self.ld_alpha)
        return super().rewards(policy, reference, examples)

    def pair_weight(self, policy: Scores, examples: Examples) -> NamedArray | None:
        return likelihood_weight(policy, examples) if self.use_weighting else None

    def _refuse_without_margin(self) -> None:
        given = {"f_divergence_type": self.f_divergence_type != "reverse_kl", "reference_free": self.reference_free}
        for name in (name for name, is_given in given.items() if is_given):
            raise ValueError(
                f"loss.{name}={getattr(self, name)} is for losses of the difference of two rewards, in which the part "
                f"of a reward that depends on the prompt alone cancels. loss.type={self.get_choice_name(type(self))} "
                "is no such loss: leave this setting out"
            )

    @property
    def _unless(self) -> str:
        return " unless reference_free is set" if self.is_of_margin else ""


def at_least_one(tokens: NamedArray) -> NamedArray:
    """Numbers of tokens, to divide by. An empty slot of a packed row has none; its values are masked later."""
    return hax.where(tokens > 1, tokens.astype(jnp.float32), 1.0)


def preference_metrics(
    policy: Compared,
    reference: Compared | None,
    chosen_reward: NamedArray,
    rejected_reward: NamedArray,
    *,
    are_equal: jax.Array | bool = False,
) -> dict[str, NamedArray]:
    """Metrics by name, {..., comparison}. Rewards are beta * log(policy / reference).

    `dpo_accuracy` counts a tie as half, so that it is 0.5 if policy and reference are equal; `rewards/accuracies`
    counts it as wrong, as TRL does. `are_equal`: policy and reference are the same model. Margins are then only
    rounding differences between two programs, and every comparison is a tie.
    """
    margin = chosen_reward - rejected_reward
    one_model: Any = jnp.asarray(are_equal)
    wins: Any = (margin > 0) & ~one_model
    ties: Any = margin == 0
    ties = ties | one_model
    return {
        "dpo_margin_policy": policy.chosen - policy.rejected,
        "dpo_margin_ref": hax.zeros_like(margin) if reference is None else reference.chosen - reference.rejected,
        "dpo_accuracy": wins.astype(jnp.float32) + 0.5 * ties.astype(jnp.float32),
        "dpo_chosen_reward": chosen_reward,
        "dpo_rejected_reward": rejected_reward,
        "rewards/chosen": chosen_reward,
        "rewards/rejected": rejected_reward,
        "rewards/accuracies": wins.astype(jnp.float32),
        "rewards/margins": margin,
        "logps/chosen": policy.chosen,
        "logps/rejected": policy.rejected,
    }
