"""Means over held-out comparisons with their standard errors, and two baselines that need no training."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lora_dpo_jax.accuracy import Comparisons, mean_and_error
from lora_dpo_jax.report.record import HeldOut, Scored, array_of

CLEARLY = 2.0  # standard errors


@dataclass(frozen=True)
class Estimate:
    """A mean, and how far it may be off by chance."""

    mean: float
    error: float  # standard error; 0 if all are alike, NaN of a single example
    count: int  # comparisons

    def is_clearly(self, other: float) -> Literal["above", "below", "neither"]:
        """How the mean, of shares, compares with a number: clearly if it is more than CLEARLY standard errors away.

        A few values that are all alike have no spread, and prove little: their error is then taken as if one more
        had been right and one more wrong.
        """
        error = self.error
        if not error > 0:
            share = (abs(self.mean) * self.count + 1) / (self.count + 2)
            error = math.sqrt(share * (1 - share) / (self.count + 2))
        distance = (self.mean - other) / error
        return "above" if distance > CLEARLY else "below" if distance < -CLEARLY else "neither"


def comparisons_in(held_out: HeldOut) -> Comparisons:
    tokens = np.array(held_out.chosen_tokens), np.array(held_out.rejected_tokens)
    return Comparisons(*tokens, array_of(held_out.shares), np.array(held_out.prompts))


def estimate(values: np.ndarray, comparisons: Comparisons, where: np.ndarray | None = None) -> Estimate | None:
    """The mean of `values` [comparison], of those that are finite and have a weight; None if there are none."""
    where = np.isfinite(values) & comparisons.counts & (True if where is None else where)
    if not where.any():
        return None
    mean, error = mean_and_error(values[where], comparisons.weights[where], comparisons.prompts[where])
    return Estimate(mean, error, int(where.sum()))


def right_by(margins: np.ndarray) -> np.ndarray:
    """1 where the margin is positive, half at 0, 0 below; NaN stays."""
    return 0.5 * (1 + np.sign(margins))


def accuracy(held_out: HeldOut, moment: Scored | None, where: np.ndarray | None = None) -> Estimate | None:
    if moment is None:
        return None
    return estimate(right_by(array_of(moment.margins)), comparisons_in(held_out), where)


def margin(held_out: HeldOut, moment: Scored | None) -> Estimate | None:
    return None if moment is None else estimate(array_of(moment.margins), comparisons_in(held_out))


def longer_response(held_out: HeldOut) -> Estimate | None:
    comparisons = comparisons_in(held_out)
    return estimate(right_by(comparisons.excess.astype(float)), comparisons)


def likelier_response(held_out: HeldOut) -> Estimate | None:
    """How often the model of before training finds the chosen response likelier."""
    before = held_out.reference or (held_out.before.differences if held_out.before else [])
    return estimate(right_by(array_of(before)), comparisons_in(held_out)) if before else None
