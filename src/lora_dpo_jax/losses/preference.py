"""Losses of comparisons: two responses of one example, one of them preferred."""

import abc
from dataclasses import dataclass
from typing import Any, ClassVar

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
from haliax import NamedArray

from lora_dpo_jax.losses.examples import Examples
from lora_dpo_jax.losses.interface import Loss
from lora_dpo_jax.losses.scores import Scores, TokenScores
from lora_dpo_jax.objective import ExampleLosses, Mean


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
        chosen, rejected = examples.compared(scores.log_probs)
        return Compared(chosen, rejected, *examples.compared(scores.tokens), examples, scores.per_token)

    def column(self, name: str) -> NamedArray:
        """A column with one number per example: the number of each comparison's example, float32 {..., comparison}."""
        return self.examples.of_comparisons(self.examples.column(name))

    def columns(self, name: str) -> tuple[NamedArray, NamedArray]:
        """A column with one number per response: those of chosen and rejected responses, float32 {..., comparison}."""
        return self.examples.compared(self.examples.column(name))


@dataclass(frozen=True)
class PreferenceLoss(Loss):
    """A loss of each comparison. An example's loss is the weighted sum over its comparisons."""

    reference_free: bool = False  # assume a uniform reference, whose log-ratio of chosen to rejected is zero

    needs_comparisons = True
    name: ClassVar[str | None] = None  # of the metric `<name>_loss`; None: the loss's `type`

    @property
    def needs_reference(self) -> bool:
        return not self.reference_free

    @abc.abstractmethod
    def pair_loss(self, chosen: NamedArray, rejected: NamedArray, policy: Compared) -> NamedArray:
        """The loss of each comparison from log(policy / reference) of its responses in nats, all {..., comparison}.

        Without a reference, `chosen` and `rejected` are the policy's log-probs.
        """

    def __call__(
        self, policy: Scores, reference: Scores | None, examples: Examples, *, are_equal: jax.Array | bool = False
    ) -> ExampleLosses:
        ours = Compared.of(policy, examples)
        chosen, rejected = ours.chosen, ours.rejected
        theirs = None
        if self.needs_reference:
            if reference is None:
                raise ValueError(f"{type(self).__name__} needs the reference's log-probs unless reference_free is set")
            theirs = Compared.of(reference, examples)
            chosen, rejected = chosen - theirs.chosen, rejected - theirs.rejected
        loss = self.pair_loss(chosen, rejected, ours)
        of_examples = examples.sum_of_comparisons(hax.where(examples.weight != 0, examples.weight * loss, 0.0))
        per_pair = {self._loss_name: loss}
        per_pair |= preference_metrics(ours, theirs, self.beta * chosen, self.beta * rejected, are_equal=are_equal)
        share = examples.share
        return ExampleLosses(of_examples, {name: Mean.over(values, share) for name, values in per_pair.items()})

    @property
    def _loss_name(self) -> str:
        return f"{self.name or self.get_choice_name(type(self))}_loss"


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
