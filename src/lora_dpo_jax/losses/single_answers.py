"""Losses of single answers, each of which has a label: desirable or not."""

import abc
import math
from dataclasses import dataclass
from typing import Any, Literal

import haliax as hax
import jax
import jax.numpy as jnp
from haliax import NamedArray

from lora_dpo_jax.columns import DESIRABLE, LABEL, MISMATCHED, WEIGHT
from lora_dpo_jax.losses.examples import Examples
from lora_dpo_jax.losses.interface import Loss, mean_of_equal_scores
from lora_dpo_jax.losses.scores import Scores
from lora_dpo_jax.objective import Count, DifferenceOfMeans, ExampleLosses, Mean


@dataclass(frozen=True)
class _SingleAnswers(Loss):
    """The sigmoid of how far an answer is on the wrong side of a reference point, times the weight of its label.

    The weight that the data give an example multiplies its loss.
    """

    desirable_weight: float = 1.0  # of answers with a true label
    undesirable_weight: float = 1.0  # of answers with a false label

    columns = (LABEL, WEIGHT)
    hub_tag = "kto"

    def __post_init__(self):
        super().__post_init__()
        for name in ("desirable_weight", "undesirable_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"loss.{name}={getattr(self, name)} must be at least 0, and finite")

    @abc.abstractmethod
    def reference_point(self, examples: Examples) -> NamedArray:
        """The log(policy / reference) in nats that divides desirable answers from others: a scalar, or {row}."""

    def loss_where_equal(self, examples: Examples) -> float | None:
        return mean_of_equal_scores(self, examples)

    def __call__(
        self, policy: Scores, reference: Scores | None, examples: Examples, *, are_equal: jax.Array | bool = False
    ) -> ExampleLosses:
        examples = self.knowing_batch(policy, reference, examples)
        log_ratio, point = log_ratios(policy, reference), self.reference_point(examples)
        is_desirable: Any = examples.column(LABEL) == DESIRABLE
        counts = _has_weight(examples) & (examples.column(LABEL) != MISMATCHED)
        beyond = self.beta * (log_ratio - point)
        wrong = hax.nn.sigmoid(hax.where(is_desirable, -beyond, beyond))
        loss = hax.where(is_desirable, self.desirable_weight, self.undesirable_weight) * wrong
        weighted = hax.where(counts, examples.of_responses(examples.column(WEIGHT)) * loss, 0.0)
        values = {
            f"{self.get_choice_name(type(self))}_loss": loss,
            "kl": hax.broadcast_to(point, log_ratio.axes),
            **_accuracies(beyond, is_desirable, are_equal),
        }
        metrics: dict[str, Any] = {name: Mean.over(x, counts.astype(jnp.float32)) for name, x in values.items()}
        metrics |= _by_label(self.beta * log_ratio, policy.log_probs, counts, is_desirable)
        return ExampleLosses(examples.sum_of_responses(weighted), metrics)


@dataclass(frozen=True)
class Kto(_SingleAnswers):
    """Human-aware loss of single answers: https://arxiv.org/abs/2402.01306.

    The reference point is an estimate of the KL divergence of the policy from the reference: the mean of the
    log-ratios of answers to other prompts, over the whole batch, without gradient, and at least 0.
    """

    @property
    def needs_mismatched(self) -> bool:
        return True

    @property
    def needs_of_batch(self) -> Literal["nothing", "tokens", "scores"]:
        return "scores"

    def of_batch(self, policy: Scores, reference: Scores | None, examples: Examples) -> dict[str, NamedArray]:
        is_mismatched = _has_weight(examples) & (examples.column(LABEL) == MISMATCHED)
        mean = Mean.over(log_ratios(policy, reference), is_mismatched.astype(jnp.float32)).value
        return {"kl": hax.named(jax.lax.stop_gradient(jnp.maximum(mean, 0.0)), ())}

    def reference_point(self, examples: Examples) -> NamedArray:
        return examples.of_batch["kl"]


@dataclass(frozen=True)
class ApoZeroUnpaired(_SingleAnswers):
    """Raises desirable answers and lowers the others: Eq. 7 of https://arxiv.org/abs/2408.06266, of single answers."""

    def reference_point(self, examples: Examples) -> NamedArray:
        return hax.named(jnp.zeros(()), ())


def log_ratios(policy: Scores, reference: Scores | None) -> NamedArray:
    """log(policy / reference) of each response in nats, float32 {..., response}."""
    if reference is None:
        raise ValueError("a loss of single answers needs the reference's log-probs")
    return policy.log_probs.astype(jnp.float32) - reference.log_probs.astype(jnp.float32)


def _has_weight(examples: Examples) -> NamedArray:
    """bool {..., response}: whether its example counts at all."""
    return examples.is_response & (examples.of_responses(examples.column(WEIGHT)) > 0)


def _accuracies(beyond: NamedArray, is_desirable: NamedArray, are_equal: jax.Array | bool) -> dict[str, NamedArray]:
    """Whether each answer is on the side of the reference point that its label says, {..., response}.

    As of comparisons: `dpo_accuracy` counts an answer at the point as half, and `rewards/accuracies` as wrong.
    """
    one_model: Any = jnp.asarray(are_equal)
    at_point = (beyond == 0) | one_model
    right = hax.where(is_desirable, beyond > 0, beyond < 0) & ~at_point
    return {
        "dpo_accuracy": right.astype(jnp.float32) + 0.5 * at_point.astype(jnp.float32),
        "rewards/accuracies": right.astype(jnp.float32),
    }


def _by_label(rewards: NamedArray, log_probs: NamedArray, counts: NamedArray, is_desirable: NamedArray) -> dict:
    """Metrics of the answers with each label, by TRL's names: `chosen` is desirable, `rejected` is not."""
    chosen, rejected = ((counts & x).astype(jnp.float32) for x in (is_desirable, ~is_desirable))
    of_chosen, of_rejected = Mean.over(rewards, chosen), Mean.over(rewards, rejected)
    return {
        "rewards/chosen": of_chosen,
        "rewards/rejected": of_rejected,
        "rewards/margins": DifferenceOfMeans(of_chosen, of_rejected),
        "logps/chosen": Mean.over(log_probs, chosen),
        "logps/rejected": Mean.over(log_probs, rejected),
        "count/chosen": Count(jnp.sum(chosen.array)),
        "count/rejected": Count(jnp.sum(rejected.array)),
    }
