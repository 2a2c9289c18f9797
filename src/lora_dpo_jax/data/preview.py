"""Prints tokenized examples so that a person can check masks and templates."""

import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_dpo_jax.columns import DESIRABLE, LABEL, MISMATCHED, UNDESIRABLE
from lora_dpo_jax.data.cache import TokenizedExamples
from lora_dpo_jax.data.examples import TokenizedExample
from lora_dpo_jax.data.pieces import pieces_of
from lora_dpo_jax.data.table import ExampleTable
from lora_dpo_jax.printable import printable

RESET = "\x1b[0m"
# Two shades for each role. Tokens alternate between them, so that token boundaries are visible.
SHADES = {
    "prompt": ("\x1b[38;5;250m", "\x1b[38;5;244m"),
    "chosen": ("\x1b[38;5;46m", "\x1b[38;5;34m"),
    "rejected": ("\x1b[38;5;209m", "\x1b[38;5;166m"),
}
LABELS = {DESIRABLE: "desirable", UNDESIRABLE: "undesirable", MISMATCHED: "mismatched"}
SHADES |= {
    "desirable": SHADES["chosen"],
    "undesirable": SHADES["rejected"],
    "mismatched": ("\x1b[38;5;75m", "\x1b[38;5;68m"),
}


def preview(
    examples: TokenizedExamples | ExampleTable,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    file: TextIO | None = None,  # sys.stdout
    color: bool | None = None,
) -> None:
    """Prints the first `count` examples, in colour or in labelled blocks of text. `color` None: colour on terminals."""
    out = sys.stdout if file is None else file
    if color is None:
        color = out.isatty() and "NO_COLOR" not in os.environ
    for index in range(min(count, len(examples))):
        example = examples[index]
        what = "pair" if example.is_pair else "answer" if LABEL in example.columns else "example"
        print(f"=== {what} {index + 1} of {len(examples):,}: {printable(examples.origin(index))}", file=out)
        scored = [None] * len(example.responses) if example.scored is None else example.scored
        for role, ids, mask in zip(_roles(example), example.parts, [None, *scored], strict=True):
            for title, stretch, shades in _stretches(role, len(ids), mask):
                print(f"--- {title}", file=out)
                pieces = [text for text, _ in pieces_of(ids, tokenizer, stretch)]
                print(_colored(pieces, shades) if color else "".join(pieces), file=out)
        print(file=out)


def _roles(example: TokenizedExample) -> list[str]:
    if example.is_pair:
        return ["prompt", "chosen", "rejected"]
    if labels := example.columns.get(LABEL):
        return ["prompt", *(LABELS[label] for label in np.atleast_1d(labels).tolist())]
    return ["prompt", *(f"response {number}" for number in range(1, len(example.responses) + 1))]


def _stretches(role: str, tokens: int, scored: np.ndarray | None) -> Iterator[tuple[str, range, tuple[str, str]]]:
    """(title, tokens, shades) of each stretch of a part that is scored or is not. Mostly this is the whole part."""
    if role == "prompt":
        yield f"prompt ({tokens:,} tokens, not scored)", range(tokens), SHADES["prompt"]
        return
    shades = SHADES.get(role, SHADES["chosen"])
    if scored is None or scored.all():
        yield f"{role} ({tokens:,} tokens, scored)", range(tokens), shades
        return
    edges = [0, *(np.flatnonzero(np.diff(scored)) + 1).tolist(), tokens]
    for start, stop in itertools.pairwise(edges):
        which = f"{role}, tokens {start + 1:,} to {stop:,} of {tokens:,}"
        if scored[start]:
            yield f"{which} (scored)", range(start, stop), shades
        else:
            yield f"{which} (not scored)", range(start, stop), SHADES["prompt"]


def _colored(pieces: Sequence[str], shades: tuple[str, str]) -> str:
    return "".join(f"{shades[i % 2]}{piece}" for i, piece in enumerate(pieces)) + RESET
