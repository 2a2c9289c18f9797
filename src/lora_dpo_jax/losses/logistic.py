"""DPO and similar losses: the log-likelihood of the preferences under a logistic model of the rewards."""

import math
from dataclasses import dataclass

import haliax as hax
import jax.numpy as jnp
import numpy as np
from haliax import NamedArray

from lora_dpo_jax.losses.preference import PreferenceLoss


@dataclass(frozen=True)
class _Logistic(PreferenceLoss):
    label_smoothing: float = 0.0  # the probability that a label is wrong (cDPO); 0 <= label_smoothing < 0.5

    name = "dpo"

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 <= np.float32(self.label_smoothing) < 0.5:
            raise ValueError(f"loss.label_smoothing={self.label_smoothing} must be in [0, 0.5), in float32 too")

    def loss_where_equal(self) -> float | None:
        is_ours = type(self).pair_loss.__module__ == __name__  # a subclass may compute another loss
        return math.log(2) if is_ours and not self.reference_free else None

    def negative_log_likelihood(self, logits: NamedArray) -> NamedArray:
        """Eq. 3 of https://ericmitchell.ai/cdpo.pdf."""
        # softplus(-x) is -log sigmoid(x) without overflow.
        kept = hax.nn.softplus(-logits)
        if self.label_smoothing == 0.0:
            return kept
        return (1 - self.label_smoothing) * kept + self.label_smoothing * hax.nn.softplus(logits)


@dataclass(frozen=True)
class Dpo(_Logistic):
    """Eq. 7 of https://arxiv.org/abs/2305.18290."""

    def pair_loss(self, chosen, rejected, policy):
        return self.negative_log_likelihood(self.beta * (chosen - rejected))


@dataclass(frozen=True)
class LengthNormalizedDpo(_Logistic):
    """DPO on log-ratios per token: section 5.1.3 of Tulu 3, https://arxiv.org/abs/2411.15124."""

    def pair_loss(self, chosen, rejected, policy):
        # An empty slot of a packed row has no tokens; it is masked later and must not divide by zero now.
        per_chosen = chosen / hax.maximum(policy.chosen_tokens.astype(jnp.float32), 1.0)
        per_rejected = rejected / hax.maximum(policy.rejected_tokens.astype(jnp.float32), 1.0)
        return self.negative_log_likelihood(self.beta * (per_chosen - per_rejected))
