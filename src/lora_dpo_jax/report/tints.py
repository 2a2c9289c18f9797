"""Texts of prompts and responses: cut if they are long, and tinted by how much likelier training has made them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_dpo_jax.report.charts import number
from lora_dpo_jax.report.record import ShownPair, ShownResponse

TINTS = 4  # shades on either side of none
MOST_TEXT = 4000  # characters of a completion or a prompt


@dataclass(frozen=True)
class Piece:
    """A piece of a response, tinted from -TINTS to TINTS by its log-ratio."""

    text: str
    tint: int
    log_ratio: str


@dataclass(frozen=True)
class TintedResponse:
    title: str
    pieces: list[Piece]
    log_ratio: str
    strongest: str  # the pieces that weigh most, in words
    left_out: int


def tinted(pairs: Sequence[ShownPair]) -> list[dict[str, Any]]:
    """For each pair: where it is from, its prompt, its margin, and both responses."""
    largest = max(
        (abs(x) for pair in pairs for side in (pair.chosen, pair.rejected) for x in side.log_ratios if x is not None),
        default=0.0,
    )
    return [
        {
            "origin": pair.origin,
            "prompt": pair.prompt,
            "margin": number(pair.margin),
            "log_ratio": number(_less(pair.chosen.log_ratio, pair.rejected.log_ratio)),
            "responses": [
                _tinted_response(title, response, largest)
                for title, response in (("chosen", pair.chosen), ("rejected", pair.rejected))
            ],
        }
        for pair in pairs
    ]


def _less(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _tinted_response(title: str, response: ShownResponse, largest: float) -> TintedResponse:
    values = [0.0 if x is None else x for x in response.log_ratios]
    pieces = [
        Piece(text, _tint(value, largest), f"{value:+.3f}") for text, value in zip(response.pieces, values, strict=True)
    ]
    top = sorted(range(len(values)), key=lambda i: -abs(values[i]))[:3]
    strongest = ", ".join(f"“{response.pieces[i].strip() or '␣'}” {values[i]:+.2f}" for i in top if values[i])
    return TintedResponse(title, pieces, number(response.log_ratio), strongest, response.left_out)


def _tint(value: float, largest: float) -> int:
    """By the square root, so that middling values show too."""
    if not largest:
        return 0
    return round(math.copysign(math.sqrt(abs(value) / largest) * TINTS, value))


def cut(text: str) -> str:
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]} … ({len(text) - MOST_TEXT:,} more characters)"
