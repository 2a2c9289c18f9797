"""Weights of tokens and pairs from the scores of single tokens: LD-DPO and WPO."""

import dataclasses

import haliax as hax
import jax
import jax.numpy as jnp
from haliax import NamedArray

from lora_dpo_jax.losses.examples import Examples
from lora_dpo_jax.losses.scores import Scores, TokenScores

LOG_SUM_OF_SQUARES = "log_sum_of_squares"  # the statistic that `likelihood_weight` reads


def with_lighter_tail(scores: Scores, examples: Examples, ld_alpha: float) -> Scores:
    """The scores with log-probs in which tokens beyond the shortest response of their example count `ld_alpha`.

    LD-DPO, https://arxiv.org/abs/2409.06411, for pairs.
    """
    tokens = _tokens_of(scores)
    is_beyond = tokens.index >= tokens.of_tokens(examples.least_of_responses(scores.tokens))
    weighted = hax.where(is_beyond, ld_alpha * tokens.log_probs, tokens.log_probs)
    return dataclasses.replace(scores, log_probs=tokens.summed(weighted, examples))


def likelihood_weight(policy: Scores, examples: Examples) -> NamedArray:
    """WPO's weight of each comparison, without gradient: float32 {..., comparison}.

    A response's weight is exp of the mean over its tokens of log p(token) - log sum_v p(v)^2: how likely the policy is
    to write it. The weight of a comparison is the product of both. Eq. 2 of https://arxiv.org/abs/2406.11827, with its
    "sampled" alignment of weights.
    """
    tokens = _tokens_of(policy)
    aligned = tokens.summed(tokens.log_probs - tokens.statistics[LOG_SUM_OF_SQUARES], examples)
    mean = aligned / hax.maximum(policy.tokens.astype(jnp.float32), 1.0)
    chosen, rejected = examples.compared(jax.lax.stop_gradient(mean))
    return hax.exp(chosen + rejected)


def _tokens_of(scores: Scores) -> TokenScores:
    if scores.per_token is None:
        raise ValueError("ld_alpha and use_weighting need the scores of single tokens; found: sums over responses")
    return scores.per_token
