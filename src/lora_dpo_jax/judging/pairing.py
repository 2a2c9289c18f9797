"""From the completions of a prompt, scored or compared by a judge, to rows that training reads; counts what is dropped.

    completions   usable       scored           compared                            rows
    A B C D E  -> A B C D   -> B 9 A 7 D 7 C 2 -> best_worst: (B, C)              -> pairs, or all four as one
                  E empty                         adjacent: (B, A) (D, C)            ranked row
                                                            (A, D) have one score

Nothing here reads a file or a model.
"""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_dpo_jax.data.config import Comparisons
from lora_dpo_jax.data.messages import Text
from lora_dpo_jax.data.rows import compared
from lora_dpo_jax.settings.choices import check_choices

# A judge's verdict on two completions, asked in both orders. inconsistent: the orders gave different answers, or none.
Outcome = Literal["first", "second", "tie", "inconsistent"]

# Why something is left out, in words.
OF_COMPLETIONS = {
    "empty": "no text",
    "truncated": "no end within max_new_tokens",
    "same_text": "the text of another completion of its prompt",
}
OF_COMPARISONS = {
    "inconsistent": "the judge's two orders disagree",
    "judged_equal": "the judge finds them equally good",
    "contradicted": "the judge prefers the one with the lower score",
    "same_score": "the same score",
    "small_margin": "scores nearer than pairing.min_margin",
}
OF_PROMPTS = {
    "too_few": "fewer than two completions left",
    "no_row": "no comparison left",
}
REASONS = {**OF_COMPLETIONS, **OF_COMPARISONS, **OF_PROMPTS}


@dataclass(frozen=True)
class PairingConfig:
    """Which rows the completions of a prompt become."""

    # pairs: a row for each comparison. ranked: a row for each prompt, with all its completions and their scores
    rows: Literal["pairs", "ranked"] = "pairs"
    # Of pairs, as format.comparisons. best_worst: the best completion with the worst one. all: each with each worse
    # one. adjacent: each with the next in order
    comparisons: Comparisons = "best_worst"
    min_margin: float = 0.0  # the least difference of two scores that are compared, or of the ends of a ranked row
    keep_truncated: bool = False  # use completions that had not ended after max_new_tokens

    def __post_init__(self):
        check_choices(self, "pairing")
        if not 0.0 <= self.min_margin < math.inf:
            raise ValueError(f"pairing.min_margin={self.min_margin} must be a number of at least 0")
        if self.rows == "ranked" and self.comparisons != PairingConfig.comparisons:
            raise ValueError(
                f"pairing.comparisons={self.comparisons} is for pairing.rows=pairs: of ranked rows, format.comparisons "
                "of the run that trains on them says what is compared"
            )


@dataclass(frozen=True)
class Completion:
    """One completion of a prompt."""

    text: str
    is_finished: bool = True  # whether it ended by itself
    score: float = math.nan  # more is better


@dataclass(frozen=True)
class Pairing:
    """The rows of one prompt, and how much was left out for which reason (see REASONS)."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


def usable(completions: Sequence[Completion], *, keep_truncated: bool = False) -> tuple[list[int], Counter[str]]:
    """(numbers of the completions that may be scored, counts of the others by reason)."""
    kept: list[int] = []
    dropped: Counter[str] = Counter()
    seen: set[str] = set()
    for number, completion in enumerate(completions):
        reason = None
        if not completion.text.strip():
            reason = "empty"
        elif not (completion.is_finished or keep_truncated):
            reason = "truncated"
        elif completion.text in seen:
            reason = "same_text"
        if reason is None:
            seen.add(completion.text)
            kept.append(number)
        else:
            dropped[reason] += 1
    return kept, dropped


def outcome_of(preferred: str | None, preferred_when_swapped: str | None) -> Outcome:
    """The verdict of two orders. Arguments: `Verdict.preferred` of (first, second) and of (second, first)."""
    swapped = {"first": "second", "second": "first", "tie": "tie"}.get(preferred_when_swapped or "")
    return preferred if preferred is not None and preferred == swapped else "inconsistent"  # type: ignore


def win_shares(count: int, outcomes: Mapping[tuple[int, int], Outcome]) -> list[float]:
    """The score of each of `count` completions: the share of its comparisons that it wins, between 0 and 1.

    Half a win is a tie, and an inconsistent verdict, which says nothing about either. `outcomes` are those of some
    (first, second).
    """
    wins, compared_with = [0.0] * count, [0] * count
    for (first, second), outcome in outcomes.items():
        share = {"first": 1.0, "second": 0.0}.get(outcome, 0.5)
        wins[first] += share
        wins[second] += 1.0 - share
        compared_with[first] += 1
        compared_with[second] += 1
    return [won / max(games, 1) for won, games in zip(wins, compared_with, strict=True)]


def round_robin(count: int) -> list[tuple[int, int]]:
    """Every two of `count` completions. A judge is asked twice about each: count * (count - 1) questions in all."""
    return list(itertools.combinations(range(count), 2))


def rank_and_pair(
    scores: Sequence[float],
    comparisons: Comparisons = "all",
    *,
    min_margin: float = 0.0,
    outcomes: Mapping[tuple[int, int], Outcome] | None = None,
) -> tuple[list[tuple[int, int]], Counter[str]]:
    """((chosen, rejected) of each comparison that holds, counts of the others by reason).

    Completions are put in the order of their scores, which are finite; equal ones stay in the order that they have.
    `comparisons` says which two of this order are compared. With `outcomes` of a judge, by (first, second), its
    verdict on the two themselves must agree with their scores.
    """
    order = sorted(range(len(scores)), key=lambda number: -scores[number])
    pairs: list[tuple[int, int]] = []
    dropped: Counter[str] = Counter()
    for better, worse in compared(order, comparisons):
        reason = _doubt(scores[better] - scores[worse], min_margin, _verdict(outcomes, better, worse))
        if reason is None:
            pairs.append((better, worse))
        else:
            dropped[reason] += 1
    return pairs, dropped


def best_worst(scores: Sequence[float], **options: Any) -> tuple[list[tuple[int, int]], Counter[str]]:
    """The best of n with the worst of n, if that comparison holds; see `rank_and_pair`."""
    return rank_and_pair(scores, "best_worst", **options)


def pair(
    prompt: Text,
    completions: Sequence[Completion],
    config: PairingConfig,
    *,
    as_messages: bool,
    outcomes: Mapping[tuple[int, int], Outcome] | None = None,
) -> Pairing:
    """The rows of the usable, scored completions of a prompt.

    `as_messages`: completions are turns of the assistant, and a prompt that is a text is the user's turn. `outcomes`:
    of a judge, by (first, second), if it compared them.
    """
    if len(completions) < 2:
        return Pairing(dropped=Counter(too_few=1))
    scores = [completion.score for completion in completions]
    start: Any = [{"role": "user", "content": prompt}] if as_messages and isinstance(prompt, str) else prompt
    answers: list[Any] = [completion.text for completion in completions]
    if as_messages:
        answers = [[{"role": "assistant", "content": text}] for text in answers]
    if config.rows == "ranked":
        if reason := _doubt(max(scores) - min(scores), config.min_margin, None):
            return Pairing(dropped=Counter({reason: 1, "no_row": 1}))
        return Pairing([{"prompt": start, "responses": answers, "scores": scores}])
    pairs, dropped = rank_and_pair(scores, config.comparisons, min_margin=config.min_margin, outcomes=outcomes)
    rows = [
        {
            "prompt": start,
            "chosen": answers[chosen],
            "rejected": answers[rejected],
            "score_chosen": scores[chosen],
            "score_rejected": scores[rejected],
        }
        for chosen, rejected in pairs
    ]
    return Pairing(rows, dropped if rows else dropped + Counter(no_row=1))


def _verdict(outcomes: Mapping[tuple[int, int], Outcome] | None, better: int, worse: int) -> str | None:
    """The outcome of two completions as one of `better`, `worse`, `tie` and `inconsistent`; None: nobody was asked."""
    if outcomes is None:
        return None
    if (better, worse) in outcomes:
        names = {"first": "better", "second": "worse"}
        return names.get(outcomes[better, worse], outcomes[better, worse])
    names = {"second": "better", "first": "worse"}
    return names.get(outcomes[worse, better], outcomes[worse, better])


def _doubt(margin: float, min_margin: float, verdict: str | None) -> str | None:
    """Why two completions are not compared; None if they are."""
    if verdict == "inconsistent":
        return "inconsistent"
    if verdict == "tie":
        return "judged_equal"
    if margin <= 0.0:
        return "same_score"
    if verdict == "worse":
        return "contradicted"
    return "small_margin" if margin < min_margin else None
