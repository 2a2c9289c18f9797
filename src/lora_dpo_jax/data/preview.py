"""Prints tokenized pairs so that a person can check masks and templates."""

import os
import sys
from typing import TextIO

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_dpo_jax.data.batches import PairTable
from lora_dpo_jax.data.cache import TokenizedPairs
from lora_dpo_jax.printable import printable

RESET = "\x1b[0m"
# Two shades for each role, token by token in turn, so that the ends of tokens can be seen.
SHADES = {
    "prompt": ("\x1b[38;5;250m", "\x1b[38;5;244m"),
    "chosen": ("\x1b[38;5;46m", "\x1b[38;5;34m"),
    "rejected": ("\x1b[38;5;209m", "\x1b[38;5;166m"),
}


def preview(
    pairs: TokenizedPairs | PairTable,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    file: TextIO | None = None,  # sys.stdout
    color: bool | None = None,
) -> None:
    """The first `count` pairs; in colour on a terminal or if told, in labelled blocks of plain text elsewhere."""
    out = sys.stdout if file is None else file
    if color is None:
        color = out.isatty() and "NO_COLOR" not in os.environ
    for index in range(min(count, len(pairs))):
        pair = pairs[index]
        print(f"=== pair {index + 1} of {len(pairs):,}: {printable(pairs.origin(index))}", file=out)
        for role, ids in pair._asdict().items():
            scored = "not scored" if role == "prompt" else "scored"
            print(f"--- {role} ({len(ids):,} tokens, {scored})", file=out)
            print(_colored(ids, role, tokenizer) if color else _visible(_decode(ids, tokenizer)), file=out)
        print(file=out)


def _colored(ids: np.ndarray, role: str, tokenizer: PreTrainedTokenizerBase) -> str:
    shades = SHADES[role]
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
    """Line ends marked, so that those at the end of the prompt can be seen; no control character reaches a terminal."""
    return printable(text.replace("\n", "\u21b5\n"))


def _decode(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)  # type: ignore
