"""Accuracy and margins of comparisons with their standard errors, by which response is longer, beside baselines.

    chosen_longer    chosen_shorter    same_length        of the two responses, by their scored tokens

An accuracy counts a tie as half. A standard error is that of the mean over the prompts: comparisons of one prompt are
not independent, so their deviations are added up first (the sandwich estimator of a weighted mean, with n / (n - 1) for
n prompts). With one comparison a prompt it is the usual one. It is left out where there are fewer than two prompts.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

GROUPS = ("chosen_longer", "chosen_shorter", "same_length")
ACCURACY, MARGIN = "dpo_accuracy", "rewards/margins"  # the names of the means in the training metrics
LONGER, REFERENCE = "longer_response/accuracy", "reference_log_prob/accuracy"
ERROR = "_se"  # after the name of a mean: that of its standard error


@dataclass(frozen=True)
class Comparisons:
    """The comparisons of a table. All arrays are [comparison]."""

    chosen_tokens: np.ndarray  # int: scored tokens of the preferred response
    rejected_tokens: np.ndarray
    weights: np.ndarray  # float: each comparison's share of its example, so that examples count the same
    prompts: np.ndarray  # int: comparisons with the same number have the same prompt

    def __len__(self) -> int:
        return len(self.weights)

    def groups(self) -> Iterator[tuple[str, np.ndarray]]:
        """The name of each group that has comparisons with a weight, and which they are: bool [comparison]."""
        for name, sign in zip(GROUPS, (1, -1, 0), strict=True):
            if (of_group := (np.sign(self.excess) == sign) & self.counts).any():
                yield name, of_group

    @property
    def excess(self) -> np.ndarray:
        """By how many tokens the chosen response is the longer one."""
        return self.chosen_tokens.astype(np.int64) - self.rejected_tokens

    @property
    def counts(self) -> np.ndarray:
        """bool: which comparisons have a weight."""
        return self.weights > 0


def mean_and_error(values: np.ndarray, weights: np.ndarray, prompts: np.ndarray) -> tuple[float, float]:
    """The weighted mean of values [comparison], and its standard error: see above; NaN of fewer than two prompts."""
    values, weights = values.astype(np.float64), weights.astype(np.float64)
    total = weights.sum()
    mean = float((weights * values).sum() / total)
    _, numbers = np.unique(prompts, return_inverse=True)
    deviations = np.bincount(numbers, weights * (values - mean))
    count = len(deviations)
    if count < 2:
        return mean, math.nan
    return mean, float(np.sqrt(count / (count - 1) * (deviations**2).sum()) / total)


def statistics_of(margins: np.ndarray, comparisons: Comparisons) -> dict[str, float]:
    """What an evaluation logs beside its means, from the margins of rewards, float [comparison]; by name."""
    found = {}
    for prefix, chosen in _all_and_groups(comparisons):
        for name, values in ((ACCURACY, _correct(margins)), (MARGIN, margins)):
            of_name = _with_error(f"{prefix}{name}", values, comparisons, chosen)
            if not prefix:  # the mean over all is a metric of the loss
                del of_name[name]
            found |= of_name
    return found


def baselines_of(comparisons: Comparisons, margins_of_reference: np.ndarray | None) -> dict[str, float]:
    """What training does not change: the sizes of the groups, and how often two rules without a reward are right.

    The rules choose the longer response, and the one that the reference gives the higher probability.
    `margins_of_reference`, float [comparison], are its log p(chosen) - log p(rejected) in nats, where they are known.
    """
    found: dict[str, float] = {f"{name}/pairs": int(of_group.sum()) for name, of_group in comparisons.groups()}
    for prefix, chosen in _all_and_groups(comparisons):
        if not prefix:  # in a group it is always right, or always wrong
            found |= _with_error(LONGER, _correct(comparisons.excess), comparisons, chosen)
        if margins_of_reference is not None:
            found |= _with_error(f"{prefix}{REFERENCE}", _correct(margins_of_reference), comparisons, chosen)
    return found


def _all_and_groups(comparisons: Comparisons) -> Iterator[tuple[str, np.ndarray]]:
    """(prefix of names, bool [comparison]): all comparisons with a weight, then each group of them."""
    if comparisons.counts.any():
        yield "", comparisons.counts
    for name, of_group in comparisons.groups():
        yield f"{name}/", of_group


def _correct(margins: np.ndarray) -> np.ndarray:
    """1 where the chosen response wins, 0.5 of a tie, 0 where it loses; NaN where the margin is not a number."""
    return np.where(np.isnan(margins), np.nan, 0.5 * (1 + np.sign(margins)))


def _with_error(name: str, values: np.ndarray, comparisons: Comparisons, chosen: np.ndarray) -> dict[str, float]:
    mean, error = mean_and_error(values[chosen], comparisons.weights[chosen], comparisons.prompts[chosen])
    return {name: mean} | ({} if len(np.unique(comparisons.prompts[chosen])) < 2 else {f"{name}{ERROR}": error})


def in_words(name: str, found: Mapping[str, float], *, percent: bool) -> str:
    """A mean with its standard error, for people."""
    value, error = found[name], found.get(f"{name}{ERROR}")
    text = f"{value:.1%}" if percent else f"{value:.4f}"
    if error is None:
        return text
    return f"{text} ± {error:.1%}" if percent else f"{text} ± {error:.4f}"
