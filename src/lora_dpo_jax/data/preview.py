"""Prints tokenized examples so that a person can check masks and templates."""

import os
import sys
from typing import TextIO

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_dpo_jax.data.cache import TokenizedExamples
from lora_dpo_jax.data.examples import TokenizedExample
from lora_dpo_jax.data.table import ExampleTable
from lora_dpo_jax.losses.examples import DESIRABLE, LABEL, MISMATCHED, UNDESIRABLE
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
        for role, ids in zip(_roles(example), example.parts, strict=True):
            scored = "not scored" if role == "prompt" else "scored"
            print(f"--- {role} ({len(ids):,} tokens, {scored})", file=out)
            print(_colored(ids, role, tokenizer) if color else _visible(_decode(ids, tokenizer)), file=out)
        print(file=out)


def _roles(example: TokenizedExample) -> list[str]:
    if example.is_pair:
        return ["prompt", "chosen", "rejected"]
    if labels := example.columns.get(LABEL):
        return ["prompt", *(LABELS[label] for label in np.atleast_1d(labels).tolist())]
    return ["prompt", *(f"response {number}" for number in range(1, len(example.responses) + 1))]


def _colored(ids: np.ndarray, role: str, tokenizer: PreTrainedTokenizerBase) -> str:
    shades = SHADES.get(role, SHADES["chosen"])
    pieces = _pieces(ids, tokenizer)
    return "".join(f"{shades[i % 2]}{_visible(piece)}" for i, piece in enumerate(pieces)) + RESET


def _pieces(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token; tokens that hold parts of one character are taken together."""
    pieces, start = [], 0
    for end in range(1, len(ids) + 1):
        # Decoded with the token before it, for tokenizers that drop the space of the first token.
        context = ids[max(start - 1, 0) : start]
        piece = _decode(ids[max(start - 1, 0) : end], tokenizer)[len(_decode(context, tokenizer)) :]
        if not piece.endswith("\ufffd") or end == len(ids):
            pieces.append(piece)
            start = end
    return pieces


def _visible(text: str) -> str:
    """Marks line ends, so that those at the end of the prompt are visible. Control characters reach no terminal."""
    return printable(text.replace("\n", "\u21b5\n"))


def _decode(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)  # type: ignore
