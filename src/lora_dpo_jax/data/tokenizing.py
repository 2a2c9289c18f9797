"""From some raw rows to their tokens, sizes and counts: the same in each of the processes that tokenize."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lora_dpo_jax.data.chat import ExampleTokenizer, backend_of, fit_to_length
from lora_dpo_jax.data.config import FormatConfig
from lora_dpo_jax.data.examples import ExampleArrays, TokenizedExample
from lora_dpo_jax.data.messages import holds_fills
from lora_dpo_jax.data.rows import Example, read_example
from lora_dpo_jax.data.sources import RowError, attempt

NumberedRow = tuple[int, int, Any]  # the number of a table, that of a row in it, and the row
PATHS = ("name_or_path", "vocab_file", "tokenizer_file", "merges_file")


@dataclass(frozen=True)
class RowSettings:
    """What is done to the rows of one component."""

    format: FormatConfig
    template: str | None  # the text of format.chat_template
    train_seq_len: int
    tables: tuple[str, ...]  # their names


@dataclass(frozen=True)
class TokenizedRows:
    """What is left of some rows."""

    tokens: bytes  # int32: prompt and responses of the first example, then of the next, ...
    arrays: ExampleArrays | None  # None if no row was kept
    origins: np.ndarray  # int32 [example, 2]: table, row
    prompt_hashes: np.ndarray  # uint64 [example]
    counts: Counter[str]  # of rows, of rows kept, and of what befell them
    columns: set[str]  # of any of the rows


class RowTokenizer:
    """Tokenizes rows of one component."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: RowSettings):
        self._settings = settings
        self._bos_token_id: Any = tokenizer.bos_token_id
        self._tokenizer = ExampleTokenizer(tokenizer, settings.template, settings.format)
        self._warns_of_strings = settings.format.strings == "auto" and tokenizer.chat_template is not None

    def __call__(self, rows: Sequence[NumberedRow]) -> TokenizedRows:
        """Raises RowError for the first invalid row that the format forbids to drop."""
        format = self._settings.format
        origins = [row_origin(self._settings.tables[table], number) for table, number, _ in rows]
        examples = [
            row if isinstance(row, RowError) else attempt(read_example, row, format, origin)
            for (_, _, row), origin in zip(rows, origins, strict=True)
        ]
        counts, kept = Counter(rows=len(rows)), []
        for (table, number, _), example, result in zip(rows, examples, self._tokenizer.tokenize(examples), strict=True):
            if not isinstance(result, RowError):
                assert isinstance(example, Example)  # the example of a RowError is one too
                whole, boundary = result
                result = attempt(self._usable, whole, example)
            if isinstance(result, RowError):
                if format.refuses(result.reason):
                    raise result
                counts[result.reason] += 1
                continue
            counts.update(kept=1, truncated=int(result.size < whole.size), **{boundary: 1})
            if isinstance(example, Example):
                counts["plain"] += self._warns_of_strings and isinstance(example.prompt, str)
                counts["filled"] += holds_fills(example.tools or [])
            kept.append((result, (table, number), whole.prompt_hash))
        columns = {column for _, _, row in rows if isinstance(row, dict) for column in row}
        return _joined(kept, counts, columns)

    def _usable(self, example: TokenizedExample, row: Example) -> TokenizedExample:
        """The example, cut to train_seq_len. Raises RowError if it cannot be used."""
        settings, names, origin = self._settings, row.names, row.origin
        strategy = settings.format.slice_strategy
        example = fit_to_length(example, settings.train_seq_len, strategy, origin, self._bos_token_id, names)
        for chosen, rejected in example.comparisons:
            response = example.responses[chosen]
            if np.array_equal(response, example.responses[rejected]):
                both = f"{names[chosen]} and {names[rejected]}"
                raise RowError("identical", origin, f"{both} are the same {len(response)} tokens")
        return example


def _joined(
    kept: Sequence[tuple[TokenizedExample, tuple[int, int], int]], counts: Counter[str], columns: set[str]
) -> TokenizedRows:
    """From (example, (table, row), hash of its prompt) of each row that was kept."""
    examples = [example for example, _, _ in kept]
    return TokenizedRows(
        b"".join(part.tobytes() for example in examples for part in example.parts),
        ExampleArrays.of(examples, str) if examples else None,
        np.asarray([origin for _, origin, _ in kept], np.int32).reshape(-1, 2),
        np.asarray([prompt_hash for _, _, prompt_hash in kept], np.uint64),
        counts,
        columns,
    )


def row_origin(table: str, row: int) -> str:
    return f"{table}, row {row}"


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex digest of all that decides the tokens of a tokenizer. The path that it was loaded from is left out."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        model = backend_of(tokenizer).to_str()
    else:
        model = [tokenizer.get_vocab(), {k: v for k, v in tokenizer.init_kwargs.items() if k not in PATHS}]
    state = {
        "class": type(tokenizer).__qualname__,
        "model": model,
        "special_tokens": tokenizer.special_tokens_map,
        "split_special_tokens": tokenizer.split_special_tokens,
        "chat_template": tokenizer.chat_template,
    }
    return hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode()).hexdigest()
