"""Losses of distributions over a batch: the k-th smallest of one against the k-th smallest of the other.

The order is that of the whole batch, so each comparison gets its partners' values as numbers of the batch, without
gradient. For the gradient of its own value this is exact: the order is constant almost everywhere.
"""

from dataclasses import dataclass
from typing import Literal

import haliax as hax
import jax
import jax.numpy as jnp
from haliax import NamedArray

from lora_dpo_jax.losses.examples import Examples
from lora_dpo_jax.losses.preference import PreferenceLoss
from lora_dpo_jax.losses.scores import Scores
from lora_dpo_jax.losses.smoothing import check_label_smoothing, smoothed_log_loss


@dataclass(frozen=True)
class _Transport(PreferenceLoss):
    label_smoothing: float = 0.0  # the probability that a label is wrong; 0 <= label_smoothing < 0.5

    is_of_margin = False

    def __post_init__(self):
        super().__post_init__()
        check_label_smoothing(self.label_smoothing)
        if self.use_weighting:
            raise ValueError(
                f"loss.use_weighting=true weighs single pairs, and loss.type={self.get_choice_name(type(self))} "
                "compares sorted values of different pairs: leave use_weighting out"
            )

    @property
    def needs_of_batch(self) -> Literal["nothing", "tokens", "scores"]:
        return "scores"

    def negative_log_likelihood(self, margin: NamedArray) -> NamedArray:
        return smoothed_log_loss(self.beta * margin, self.label_smoothing)


@dataclass(frozen=True)
class Aot(_Transport):
    """The margins of the policy against those of the reference, both sorted.

    https://arxiv.org/abs/2406.05882, paired.
    """

    def of_batch(self, policy: Scores, reference: Scores | None, examples: Examples) -> dict[str, NamedArray]:
        *_, ours, theirs = self.rewards(policy, reference, examples)
        assert theirs is not None
        margins = ours.chosen - ours.rejected, theirs.chosen - theirs.rejected
        return {"partner": of_same_rank(*margins, examples.weight > 0)}

    def pair_loss(self, chosen, rejected, policy):
        margin = policy.chosen - policy.rejected
        return self.negative_log_likelihood(margin - policy.examples.of_batch["partner"])


@dataclass(frozen=True)
class AotUnpaired(_Transport):
    """The log-ratios of chosen responses against those of rejected ones, both sorted.

    https://arxiv.org/abs/2406.05882, unpaired.
    """

    def of_batch(self, policy: Scores, reference: Scores | None, examples: Examples) -> dict[str, NamedArray]:
        chosen, rejected, *_ = self.rewards(policy, reference, examples)
        counts = examples.weight > 0
        return {
            "partner_of_chosen": of_same_rank(chosen, rejected, counts),
            "partner_of_rejected": of_same_rank(rejected, chosen, counts),
        }

    def pair_loss(self, chosen, rejected, policy):
        partners = policy.examples.of_batch
        both = self.negative_log_likelihood(chosen - partners["partner_of_chosen"])
        both = both + self.negative_log_likelihood(partners["partner_of_rejected"] - rejected)
        # Over the batch, both terms have the same sum; each has the gradient by one of the two values of a margin.
        return both - 0.5 * jax.lax.stop_gradient(both)


def of_same_rank(values: NamedArray, others: NamedArray, counts: NamedArray) -> NamedArray:
    """For each of `values`, the one of `others` that has its rank, without gradient; axes of `values`.

    Only entries for which `counts` is true are ranked. The others get 0.
    """
    others, counts = others.rearrange(values.axes), counts.rearrange(values.axes)
    flat, sorted_last = values.array.reshape(-1), ~counts.array.reshape(-1)
    order = jnp.lexsort((flat, sorted_last))
    order_of_others = jnp.lexsort((others.array.reshape(-1), sorted_last))
    found = jnp.zeros_like(flat).at[order].set(others.array.reshape(-1)[order_of_others])
    return hax.where(counts, jax.lax.stop_gradient(hax.named(found.reshape(values.array.shape), values.axes)), 0.0)
