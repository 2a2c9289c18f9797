"""Means over held-out comparisons with their standard errors, and two baselines that need no training."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

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


@dataclass(frozen=True)
class Comparisons:
    """Held-out comparisons, float64 [comparison] each; some of them after a choice by `where`."""

    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray
    examples: np.ndarray
    shares: np.ndarray

    @staticmethod
    def of(held_out: HeldOut) -> "Comparisons":
        tokens = np.array(held_out.chosen_tokens), np.array(held_out.rejected_tokens)
        return Comparisons(*tokens, np.array(held_out.examples), array_of(held_out.shares))

    def mean(self, values: np.ndarray, where: np.ndarray | None = None) -> Estimate | None:
        """The mean of `values` [comparison], each example counted once; of examples as a whole, its error too.

        None if there is nothing to take the mean of.
        """
        where = np.isfinite(values) & (self.shares > 0) & (True if where is None else where)
        if not where.any():
            return None
        values, shares, examples = values[where], self.shares[where], self.examples[where]
        mean = float((shares * values).sum() / shares.sum())
        _, example = np.unique(examples, return_inverse=True)
        # Comparisons of one example are not independent of each other, so the deviations are summed by example.
        deviations = np.bincount(example, shares * (values - mean))
        count = len(deviations)
        error = math.nan
        if count > 1:
            error = math.sqrt(float((deviations**2).sum()) * count / (count - 1)) / float(shares.sum())
        return Estimate(mean, error, len(values))

    @property
    def longer_is_right(self) -> np.ndarray:
        """Whether the longer response is the chosen one; half where both are as long."""
        return right_by((self.chosen_tokens - self.rejected_tokens).astype(float))


def right_by(margins: np.ndarray) -> np.ndarray:
    """1 where the margin is positive, half at 0, 0 below; NaN stays."""
    return np.where(np.isnan(margins), np.nan, (margins > 0) + 0.5 * (margins == 0))


def accuracy(held_out: HeldOut, moment: Scored | None, where: np.ndarray | None = None) -> Estimate | None:
    if moment is None:
        return None
    return Comparisons.of(held_out).mean(right_by(array_of(moment.margins)), where)


def margin(held_out: HeldOut, moment: Scored | None) -> Estimate | None:
    return None if moment is None else Comparisons.of(held_out).mean(array_of(moment.margins))


def longer_response(held_out: HeldOut) -> Estimate | None:
    comparisons = Comparisons.of(held_out)
    return comparisons.mean(comparisons.longer_is_right)


def likelier_response(held_out: HeldOut) -> Estimate | None:
    """How often the model of before training finds the chosen response likelier."""
    before = held_out.reference or (held_out.before.differences if held_out.before else [])
    return Comparisons.of(held_out).mean(right_by(array_of(before))) if before else None
