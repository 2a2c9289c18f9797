"""The reward that an f-divergence between policy and reference implies, from the log-ratio u = log(policy / reference).

A loss of a margin of rewards may take the derivative f'(e^u) in the place of u, the one of the reverse KL divergence:
Theorem 1 of https://arxiv.org/abs/2309.16240.
"""

import math
from typing import Literal

import haliax as hax
from haliax import NamedArray

FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]

# e^x is taken of no larger x. It is then finite in float32, and so is its square, which the loss `ipo` takes.
LARGEST_EXPONENT = 40.0


def reward_of(log_ratio: NamedArray, divergence: FDivergence, alpha: float) -> NamedArray:
    """f'(e^u) up to a constant, of u in nats. `alpha` is for the alpha divergence alone."""
    if divergence == "forward_kl":
        return power_reward(log_ratio, -1.0)
    if divergence == "js_divergence":
        return math.log(2) - hax.nn.softplus(-log_ratio)
    if divergence == "alpha_divergence":
        return power_reward(log_ratio, alpha - 1.0)
    return log_ratio


def power_reward(log_ratio: NamedArray, exponent: float) -> NamedArray:
    """(e^(exponent * u) - 1) / exponent, which is u in the limit of exponent 0."""
    if abs(exponent) < 1e-6:
        return log_ratio
    scaled = exponent * log_ratio
    return hax.expm1(hax.where(scaled < LARGEST_EXPONENT, scaled, LARGEST_EXPONENT)) / exponent
