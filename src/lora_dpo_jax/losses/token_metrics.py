"""Metrics of single tokens under the policy, by TRL's names: entropy, mean_token_accuracy; and log-probs per token."""

import haliax as hax
import jax.numpy as jnp
from haliax import NamedArray

from lora_dpo_jax.axes import RESPONSE
from lora_dpo_jax.losses.examples import Examples, add_up
from lora_dpo_jax.losses.preference import at_least_one
from lora_dpo_jax.losses.scores import Scores
from lora_dpo_jax.objective import Mean

STATISTICS = ("entropy", "is_likeliest")  # that `token_metrics` reads, by their names in log_probs.STATISTICS


def token_metrics(policy: Scores, examples: Examples) -> dict[str, Mean]:
    """Means over scored tokens. `policy` has the STATISTICS of its tokens.

    `entropy`, of the next token in nats, is that of all responses. `mean_token_accuracy` is how often no other token is
    likelier, in the responses to imitate: chosen ones, and those that are compared with none and have no other label
    than desirable.
    `logps/*_per_token` is the mean over comparisons of log p(response) / its number of tokens.
    """
    if policy.per_token is None:
        raise ValueError("metrics of tokens need the scores of single tokens; found: sums over responses")
    tokens, found = policy.per_token, policy.per_token.statistics
    metrics = {
        "entropy": Mean.over(found["entropy"], (tokens.response >= 0).astype(jnp.float32)),
        "mean_token_accuracy": Mean.over(found["is_likeliest"], tokens.of_tokens(_imitated(examples))),
    }
    if not examples.chosen.axes[-1].size:
        return metrics
    chosen, rejected = examples.compared(policy.log_probs.astype(jnp.float32) / at_least_one(policy.tokens))
    return metrics | {
        "logps/chosen_per_token": Mean.over(chosen, examples.share),
        "logps/rejected_per_token": Mean.over(rejected, examples.share),
    }


def _imitated(examples: Examples) -> NamedArray:
    """float32 {..., response}: the share of its example's comparisons that a response wins; 1 of a single one."""
    wins = add_up(examples.share, examples.chosen, examples.example_of_response.resolve_axis(RESPONSE))
    return hax.where(examples.is_response, wins + examples.is_imitated.astype(jnp.float32), 0.0)
