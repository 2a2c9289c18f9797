"""The text of single tokens, as people read it."""

from collections.abc import Iterator

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_dpo_jax.printable import printable


def pieces_of(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase, tokens: range) -> Iterator[tuple[str, range]]:
    """(visible text, tokens) of each piece of `tokens`: of one, or of several that hold parts of one character."""
    start = tokens.start
    for end in range(tokens.start + 1, tokens.stop + 1):
        # Decoded with the token before it, for tokenizers that drop the space of the first token.
        context = ids[max(start - 1, 0) : start]
        piece = _decode(ids[max(start - 1, 0) : end], tokenizer)[len(_decode(context, tokenizer)) :]
        if not piece.endswith("\ufffd") or end == tokens.stop:
            yield visible(piece), range(start, end)
            start = end


def visible(text: str) -> str:
    """Marks line ends, so that those at the end of a text are visible. Control characters are written out."""
    return printable(text.replace("\n", "\u21b5\n"))


def _decode(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)  # type: ignore
