"""Rates of verdicts: how often the candidate wins, with intervals, and how often the first place wins.

    both orders    outcome of a prompt
    A B, B A
    1 2            win            the candidate is preferred in both places
    2 1            loss           the baseline is
    tie tie        tie
    1 1, 1 tie...  inconsistent   the two orders disagree
    any unreadable unparsed

Intervals hold 95% of the rates of 2,000 samples of the prompts, drawn with replacement.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lora_dpo_jax.judging.interface import Preferred

Outcome = Literal["win", "loss", "tie", "inconsistent", "unparsed"]
OUTCOMES: tuple[Outcome, ...] = ("win", "loss", "tie", "inconsistent", "unparsed")
SAMPLES = 2000  # of the bootstrap
INTERVAL = (2.5, 97.5)  # percentiles
# The weight of half the square of the length's coefficient. It is weak, and keeps the coefficient finite if length
# alone decides.
RIDGE = 0.1
MOST_UPDATES = 200  # of Newton's method; about ten are needed
AT_ONCE = 250  # samples that are fitted together; bounds memory


@dataclass(frozen=True)
class Rate:
    """A share in [0, 1] with its interval. If it is undefined, `value` is None and `why` is the reason."""

    value: float | None
    low: float | None = None
    high: float | None = None
    why: str | None = None  # also a remark about a value that is defined

    def __str__(self) -> str:
        if self.value is None:
            return f"undefined: {self.why}"
        interval = "" if self.low is None or self.high is None else f"   [{self.low:.1%}, {self.high:.1%}]"
        return f"{self.value:>6.1%}{interval}" + (f"   ({self.why})" if self.why else "")


@dataclass(frozen=True)
class Rates:
    """What verdicts in both orders say about two systems."""

    counts: dict[str, int]  # of prompts, by outcome
    rates: dict[str, Rate]  # the same as shares of all prompts
    win_rate: Rate  # (wins + ties / 2) of the prompts on which both orders agree
    length_controlled_win_rate: Rate  # the same for answers of equal length
    prefers_first: Rate  # of the judge: of all verdicts that prefer one place. Without bias: half


_AGREEING: dict[tuple[Preferred, Preferred], Outcome] = {
    ("first", "second"): "win",
    ("second", "first"): "loss",
    ("tie", "tie"): "tie",
}


def outcome(forward: Preferred | None, swapped: Preferred | None) -> Outcome:
    """The outcome of a prompt. The candidate's answer is the first one of `forward` and the second of `swapped`."""
    if forward is None or swapped is None:
        return "unparsed"
    return _AGREEING.get((forward, swapped), "inconsistent")


def rates_of(
    verdicts: Sequence[tuple[Preferred | None, Preferred | None]], lengths: Sequence[tuple[int, int]], *, seed: int
) -> Rates:
    """The rates of at least one prompt. `seed` draws the samples of the intervals.

    `verdicts` in both orders and `lengths` (characters) of candidate and baseline: of each prompt.
    """
    outcomes: list[Outcome] = [outcome(*both) for both in verdicts]
    counts = np.array([[found == name for name in OUTCOMES] for found in outcomes], np.float64)  # [prompt, outcome]
    samples = _samples(len(outcomes), seed)
    shares = counts.mean(0), samples @ counts / len(outcomes)
    places = _places(verdicts)
    return Rates(
        {name: int(total) for name, total in zip(OUTCOMES, counts.sum(0), strict=True)},
        {name: _rate(float(shares[0][i]), shares[1][:, i]) for i, name in enumerate(OUTCOMES)},
        _win_rate(counts, samples),
        _length_controlled(outcomes, lengths, samples),
        _ratio(places, samples, "no verdict prefers one of the places"),
    )


def length_controlled(differences: np.ndarray, preferences: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """float64 [sample]: the win rates at equal length; NaN where the data do not say it.

    The logistic regression of length-controlled AlpacaEval (https://arxiv.org/abs/2404.04475, eq. 2) for one pair of
    systems, without the difficulty of prompts, which needs many systems:
    p(win) = sigmoid(quality + slope * tanh(difference / its standard deviation)). The rate is sigmoid(quality).

    `differences` [prompt]: lengths of the candidate's answers minus those of the baseline's. `preferences` [prompt]: 1
    for a win, 0 for a loss, between them for ties. `weights` [sample, prompt]: how often a sample holds the prompt.
    """
    spread = differences.std()
    x = np.tanh(differences / spread) if spread else np.sign(differences)
    totals = weights.sum(1)
    with np.errstate(invalid="ignore"):
        plain = weights @ preferences / totals
    has_longer, has_shorter = weights @ (x > 0) > 0, weights @ (x < 0) > 0
    all_equal_length = ~has_longer & ~has_shorter
    # Where all prefer the same, the likeliest quality is infinite, unless length explains the preference as well.
    is_one = (plain == 0) | (plain == 1)
    both_ways = has_longer & has_shorter | all_equal_length | (weights @ (x == 0) > 0)
    rates = np.where(all_equal_length | (is_one & both_ways), plain, np.nan)
    open_ones = ~all_equal_length & ~is_one & (totals > 0) & (_distinct(x, weights) > 1)
    rates[open_ones] = _fitted(x, preferences, weights[open_ones])
    return rates


def _fitted(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """float64 [sample]: sigmoid(quality) by Newton's method, of samples with preferences of both kinds."""
    if len(weights) > AT_ONCE:
        parts = [weights[first : first + AT_ONCE] for first in range(0, len(weights), AT_ONCE)]
        return np.concatenate([_fitted(x, y, part) for part in parts])
    quality, slope = np.zeros(len(weights)), np.zeros(len(weights))
    for _ in range(MOST_UPDATES if len(weights) else 0):
        p = _sigmoid(quality[:, None] + slope[:, None] * x)
        residual, curvature = weights * (y - p), weights * p * (1 - p)
        g0, g1 = residual.sum(1), residual @ x - RIDGE * slope
        h00, h01, h11 = curvature.sum(1), curvature @ x, curvature @ (x * x) + RIDGE
        determinant = h00 * h11 - h01 * h01
        step0, step1 = (h11 * g0 - h01 * g1) / determinant, (h00 * g1 - h01 * g0) / determinant
        # A long step may overshoot where the curve is flat.
        scale = 1.0 / np.maximum(1.0, np.maximum(abs(step0), abs(step1)))
        quality, slope = quality + scale * step0, slope + scale * step1
        if max(abs(step0).max(), abs(step1).max()) < 1e-9:
            break
    return _sigmoid(quality)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _distinct(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """int [sample]: 1 if all differences of a sample are the same, else 2."""
    is_in = weights > 0
    lowest, highest = np.where(is_in, x, np.inf).min(1), np.where(is_in, x, -np.inf).max(1)
    return np.where(lowest < highest, 2, 1)


def _length_controlled(outcomes: Sequence[Outcome], lengths: Sequence[tuple[int, int]], samples: np.ndarray) -> Rate:
    preference = {"win": 1.0, "loss": 0.0, "tie": 0.5}
    agreed = np.array([found in preference for found in outcomes], bool)
    if not agreed.any():
        return Rate(None, why=NONE_AGREE)
    y = np.array([preference[found] for found in outcomes if found in preference])
    differences = np.array([a - b for a, b in lengths], np.float64)[agreed]
    value = float(length_controlled(differences, y, np.ones((1, len(y))))[0])
    longer, shorter = bool((differences > 0).any()), bool((differences < 0).any())
    one_side = f"every answer of the candidate is {'longer' if longer else 'shorter'} than the baseline's"
    if np.isnan(value):
        if len(np.unique(differences)) == 1:
            return Rate(None, why=f"{one_side} by the same length, so nothing shows how length counts")
        which = "wins" if y[0] == 1 else "loses"
        return Rate(None, why=f"{one_side} and {which}, so length explains each verdict as well as quality does")
    remark = f"extrapolated: {one_side}" if longer != shorter and not (differences == 0).any() else None
    return _rate(value, length_controlled(differences, y, samples[:, agreed]), remark)


NONE_AGREE = "the judge's two orders agree on no prompt"


def _win_rate(counts: np.ndarray, samples: np.ndarray) -> Rate:
    wins, agreed = counts @ [1, 0, 0.5, 0, 0], counts @ [1, 1, 1, 0, 0]
    return _ratio(np.stack([wins, agreed], 1), samples, NONE_AGREE)


def _places(verdicts: Sequence[tuple[Preferred | None, Preferred | None]]) -> np.ndarray:
    """float64 [prompt, 2]: verdicts that prefer the first place, and verdicts that prefer any."""
    rows = [[sum(one == "first" for one in both), sum(one in ("first", "second") for one in both)] for both in verdicts]
    return np.array(rows, np.float64)


def _ratio(parts: np.ndarray, samples: np.ndarray, why_none: str) -> Rate:
    """The rate of [prompt, (count, of how many)], which is undefined if there are none."""
    count, total = parts.sum(0)
    if not total:
        return Rate(None, why=why_none)
    sums = samples @ parts
    with np.errstate(invalid="ignore"):
        return _rate(float(count / total), sums[:, 0] / sums[:, 1])


def _rate(value: float, of_samples: np.ndarray, remark: str | None = None) -> Rate:
    """Without an interval if the rate is undefined for most samples."""
    defined = of_samples[~np.isnan(of_samples)]
    if 2 * len(defined) < len(of_samples):
        return Rate(value, why=remark or "no interval: it is undefined for most samples of the prompts")
    low, high = np.percentile(defined, INTERVAL)
    return Rate(value, float(low), float(high), remark)


def _samples(count: int, seed: int) -> np.ndarray:
    """float64 [sample, prompt]: how often each sample holds each prompt."""
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=SAMPLES)
    return drawn.astype(np.float64)
