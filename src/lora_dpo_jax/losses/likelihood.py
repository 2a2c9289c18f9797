"""Losses without a reference: of the policy's own log-probs, and of the likelihood of the chosen responses."""

import math
from dataclasses import dataclass
from typing import Literal

import haliax as hax
import jax
import jax.numpy as jnp
from haliax import NamedArray

from lora_dpo_jax.columns import WEIGHT
from lora_dpo_jax.losses.divergences import power_reward
from lora_dpo_jax.losses.examples import Examples
from lora_dpo_jax.losses.preference import Compared, ComparisonLoss
from lora_dpo_jax.losses.scores import Scores
from lora_dpo_jax.losses.smoothing import check_label_smoothing, smoothed_log_loss
from lora_dpo_jax.objective import ExampleLosses, Mean


@dataclass(frozen=True)
class _ReferenceFree(ComparisonLoss):
    hub_tag = "cpo"  # TRL has them in one trainer

    @property
    def needs_reference(self) -> bool:
        return False


@dataclass(frozen=True)
class SimPo(_ReferenceFree):
    """A logistic loss of log-probs per token with a target margin: Eq. 6 of https://arxiv.org/abs/2405.14734."""

    beta: float = 2.0  # reward units per nat and token
    gamma: float = 1.0  # the target margin of the rewards; TRL's simpo_gamma
    label_smoothing: float = 0.0  # the probability that a label is wrong; 0 <= label_smoothing < 0.5

    per_token_rewards = True

    def __post_init__(self):
        super().__post_init__()
        check_label_smoothing(self.label_smoothing)
        if not math.isfinite(self.gamma):
            raise ValueError(f"loss.gamma={self.gamma} must be finite")

    @property
    def takes_margins(self) -> bool:
        return True

    def pair_loss(self, chosen, rejected, policy):
        return smoothed_log_loss(self.beta * (chosen - rejected) - self.gamma, self.label_smoothing)


@dataclass(frozen=True)
class AlphaPo(SimPo):
    """SimPO with the reward (1 - p^-alpha) / alpha, where p is the geometric mean of the tokens' probabilities.

    https://arxiv.org/abs/2501.03884.
    """

    alpha: float = 0.25  # 0 is simpo

    def __post_init__(self):
        super().__post_init__()
        if not math.isfinite(self.alpha):
            raise ValueError(f"loss.alpha={self.alpha} must be finite")

    def reward(self, log_ratio: NamedArray, tokens: NamedArray) -> NamedArray:
        return power_reward(super().reward(log_ratio, tokens), -self.alpha)


@dataclass(frozen=True)
class _WithLikelihood(_ReferenceFree):
    """The negative log-likelihood of the chosen responses is the mean over all their tokens in the batch."""

    @property
    def needs_of_batch(self) -> Literal["nothing", "tokens", "scores"]:
        return "tokens"

    def of_batch(self, policy: Scores, reference: Scores | None, examples: Examples) -> dict[str, NamedArray]:
        mean = self.tokens_to_imitate(policy, examples).value
        return {"mean_chosen_tokens": hax.named(jnp.maximum(mean, 1.0), ())}

    def tokens_to_imitate(self, policy: Scores, examples: Examples) -> Mean:
        """The mean number of tokens of a response whose likelihood is a term of the loss."""
        tokens, _ = examples.compared(policy.tokens.astype(jnp.float32))
        return Mean.over(tokens, examples.share)

    def negative_log_likelihood(self, policy: Compared) -> NamedArray:
        """{..., comparison}. Its mean over the batch is the mean over all tokens of chosen responses."""
        return -policy.chosen / policy.examples.of_batch["mean_chosen_tokens"]


@dataclass(frozen=True)
class Sft(_WithLikelihood):
    """The negative log-likelihood per token, of chosen responses and of those that are compared with none.

    Of single responses this is instruction tuning, of pairs the term of RPO and MPO. Of single answers with labels, the
    desirable ones count alone. Eq. 1 of
    https://arxiv.org/abs/2404.19733 has a mean for each response. Here, as in TRL, each token counts the same. `beta`
    scales the logged rewards alone.
    """

    name = "nll"
    needs_comparisons = False
    hub_tag = "sft"

    def pair_loss(self, chosen, rejected, policy):
        return self.negative_log_likelihood(policy)

    @property
    def takes_labels(self) -> bool:
        return True

    def tokens_to_imitate(self, policy: Scores, examples: Examples) -> Mean:
        of_single = Mean.over(policy.tokens.astype(jnp.float32), examples.is_imitated.astype(jnp.float32))
        return jax.tree.map(jnp.add, of_single, super().tokens_to_imitate(policy, examples))

    def __call__(
        self, policy: Scores, reference: Scores | None, examples: Examples, *, are_equal: jax.Array | bool = False
    ) -> ExampleLosses:
        examples = self.knowing_batch(policy, reference, examples)
        is_imitated = examples.is_imitated
        values = -policy.log_probs.astype(jnp.float32) / examples.of_batch["mean_chosen_tokens"]
        nll = Mean.over(values, is_imitated.astype(jnp.float32))
        if WEIGHT in examples.columns:
            values = examples.of_responses(examples.column(WEIGHT)) * values
        loss = examples.sum_of_responses(hax.where(is_imitated, values, 0.0))
        if not examples.chosen.axes[-1].size:
            return ExampleLosses(loss, {self.loss_name: nll})
        of_pairs = super().__call__(policy, reference, examples, are_equal=are_equal)
        nll = jax.tree.map(jnp.add, nll, of_pairs.metrics[self.loss_name])
        return ExampleLosses(loss + of_pairs.loss, of_pairs.metrics | {self.loss_name: nll})


@dataclass(frozen=True)
class Cpo(_WithLikelihood):
    """DPO with a uniform reference, and the likelihood of the chosen responses: Eq. 3 of
    https://arxiv.org/abs/2401.08417."""

    label_smoothing: float = 0.0  # the probability that a label is wrong; 0 <= label_smoothing < 0.5
    cpo_alpha: float = 1.0  # the weight of the likelihood

    def __post_init__(self):
        super().__post_init__()
        check_label_smoothing(self.label_smoothing)
        _check_weight("cpo_alpha", self.cpo_alpha)

    @property
    def takes_margins(self) -> bool:
        return True

    def pair_loss(self, chosen, rejected, policy):
        return smoothed_log_loss(self.beta * (chosen - rejected), self.label_smoothing)

    def terms(self, policy: Compared) -> dict[str, tuple[float, NamedArray]]:
        return {"nll_loss": (self.cpo_alpha, self.negative_log_likelihood(policy))}


@dataclass(frozen=True)
class Orpo(_WithLikelihood):
    """`orpo_alpha` times the likelihood of the chosen responses, and `beta` times the logistic loss of the odds ratio.

    Eqs. 4, 6 and 7 of https://arxiv.org/abs/2403.07691, where beta is lambda. TRL's likelihood is that of the prompt
    too; here, as in the paper, it is that of the response.
    """

    orpo_alpha: float = 1.0  # the weight of the likelihood; the paper has 1

    per_token_rewards = True
    hub_tag = "orpo"

    def __post_init__(self):
        super().__post_init__()
        _check_weight("orpo_alpha", self.orpo_alpha)

    def pair_loss(self, chosen, rejected, policy):
        log_odds_ratio = chosen - rejected - (_log1mexp(chosen) - _log1mexp(rejected))
        return self.beta * hax.nn.softplus(-log_odds_ratio)

    def terms(self, policy: Compared) -> dict[str, tuple[float, NamedArray]]:
        return {"nll_loss": (self.orpo_alpha, self.negative_log_likelihood(policy))}


def _check_weight(name: str, weight: float) -> None:
    if not 0.0 <= weight < math.inf:
        raise ValueError(f"loss.{name}={weight} must be at least 0, and finite")


def _log1mexp(log_prob: NamedArray) -> NamedArray:
    """log(1 - e^x) of x <= 0. Of x above -1e-6 it is that of -1e-6, because at 0 it is infinite."""
    return hax.log(-hax.expm1(hax.where(log_prob < -1e-6, log_prob, -1e-6)))
