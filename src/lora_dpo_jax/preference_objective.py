"""The objective of preference losses: from a model and a packed micro-batch to a loss for each example.

Only this module decides whether the reference is computed live, was computed before, or is not needed.
"""

from dataclasses import dataclass
from typing import Any

import jax

from lora_dpo_jax.cost.flops import useful_flops
from lora_dpo_jax.data.packing import PreferenceBatch
from lora_dpo_jax.log_probs import score_responses, score_with_reference
from lora_dpo_jax.lora import equals_reference
from lora_dpo_jax.losses import Loss, Scores
from lora_dpo_jax.models import CausalLM
from lora_dpo_jax.objective import ExampleLosses


@dataclass(frozen=True)
class PreferenceObjective:
    """An `objective.Objective` of `PreferenceBatch`es."""

    loss: Loss

    def __call__(self, model: CausalLM, reference: Any, micro: PreferenceBatch, /, *, key=None) -> ExampleLosses:
        policy, theirs = self.scores(model, reference, micro, key=key)
        are_equal: Any = False
        if theirs is not None:
            are_equal = equals_reference(model, reference, training=True)
        return self.loss(policy, theirs, micro.examples, are_equal=are_equal)

    def scores(
        self, model: CausalLM, reference: Any, micro: PreferenceBatch, *, key=None
    ) -> tuple[Scores, Scores | None]:
        """The scores of the policy and, if the loss needs them, of the reference; both {row, response}."""
        loss = self.loss
        asked: Any = {"per_token": loss.needs_tokens, "statistics": loss.statistics}
        if self.computes_reference(micro):
            of_reference = loss.needs_tokens_of_reference
            return score_with_reference(model, reference, micro, key=key, per_token_of_reference=of_reference, **asked)
        policy = score_responses(model, micro, key=key, **asked)
        if micro.reference is None or not loss.needs_reference:
            return policy, None
        return policy, Scores(micro.reference, micro.response_tokens)

    def computes_reference(self, batch: PreferenceBatch) -> bool:
        """Whether each step computes the reference's scores."""
        known = batch.reference is not None and not self.loss.needs_tokens_of_reference
        return self.loss.needs_reference and not known

    def flops(self, model: CausalLM, batch: PreferenceBatch) -> jax.Array:
        """Useful floating-point operations of a part of a step; float32 scalar."""
        return useful_flops(model, batch, with_reference=self.computes_reference(batch))
