"""Losses that compare each response with the reference, and not only with the other response."""

from dataclasses import dataclass

import haliax as hax

from lora_dpo_jax.losses.preference import PreferenceLoss


@dataclass(frozen=True)
class Bco(PreferenceLoss):
    """Binary classification of chosen and rejected: https://arxiv.org/abs/2404.04656, with no reward shift."""

    is_of_margin = False

    def pair_loss(self, chosen, rejected, policy):
        return hax.nn.softplus(-self.beta * chosen) + hax.nn.softplus(self.beta * rejected)


@dataclass(frozen=True)
class Nca(PreferenceLoss):
    """Noise contrastive alignment of a pair: https://arxiv.org/abs/2402.05369."""

    is_of_margin = False

    def pair_loss(self, chosen, rejected, policy):
        chosen, rejected = self.beta * chosen, self.beta * rejected
        return hax.nn.softplus(-chosen) + 0.5 * (hax.nn.softplus(chosen) + hax.nn.softplus(rejected))


@dataclass(frozen=True)
class ApoZero(PreferenceLoss):
    """Raises the chosen response and lowers the rejected one: Eq. 7 of https://arxiv.org/abs/2408.06266."""

    is_of_margin = False

    def pair_loss(self, chosen, rejected, policy):
        return hax.nn.sigmoid(-self.beta * chosen) + hax.nn.sigmoid(self.beta * rejected)


@dataclass(frozen=True)
class ApoDown(PreferenceLoss):
    """Lowers both responses, the rejected one further: Eq. 8 of https://arxiv.org/abs/2408.06266."""

    is_of_margin = False

    def pair_loss(self, chosen, rejected, policy):
        return hax.nn.sigmoid(self.beta * chosen) + hax.nn.sigmoid(-self.beta * (chosen - rejected))
