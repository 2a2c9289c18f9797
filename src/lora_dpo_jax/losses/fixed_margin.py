"""Losses that ask for a fixed margin: beyond it there is nothing to gain, or something to lose."""

from dataclasses import dataclass

import haliax as hax

from lora_dpo_jax.losses.preference import PreferenceLoss


@dataclass(frozen=True)
class Hinge(PreferenceLoss):
    """SLiC's calibration loss on log-ratios, https://arxiv.org/abs/2305.10425: a margin of 1 / beta nats is enough."""

    def pair_loss(self, chosen, rejected, policy):
        return hax.nn.relu(1 - self.beta * (chosen - rejected))


@dataclass(frozen=True)
class Ipo(PreferenceLoss):
    """The squared distance of the margin per token from 1 / (2 beta): Eq. 17 of https://arxiv.org/abs/2310.12036.

    The paper's formula has sums over tokens. Its authors confirmed to TRL that their results are of means.
    """

    per_token_rewards = True

    def pair_loss(self, chosen, rejected, policy):
        return (chosen - rejected - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class Sppo(PreferenceLoss):
    """The squared distances of both log-ratios from 1 / (2 beta) and -1 / (2 beta).

    Eq. 4.7 of https://arxiv.org/abs/2405.00675, where the chosen response wins with probability 1.
    """

    is_of_margin = False

    def pair_loss(self, chosen, rejected, policy):
        return (chosen - 0.5 / self.beta) ** 2 + (rejected + 0.5 / self.beta) ** 2
