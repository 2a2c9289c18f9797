"""Tokenized examples on disk, under a key made of everything that shaped them.

    <cache_dir>/examples/<fingerprint>/
      tokens.bin           int32: prompt and responses of example 0, then of example 1, ...
      <array>.npy          the arrays of ExampleArrays, such as response_tokens
      column-<k>.npy       float32: the k-th column of the data
      origins.npy          int32 [n, 2]: table, row
      prompt_hashes.npy    uint64 [n]
      meta.json            fingerprint, names of the tables and columns, report, size and checksum of the files above

A folder gets its final name only when it is complete, so any number of processes may share it.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lora_dpo_jax.data.chat import ExampleTokenizer, backend_of, fit_to_length
from lora_dpo_jax.data.config import ComponentConfig, FormatConfig, PreferenceDataConfig
from lora_dpo_jax.data.examples import Column, ExampleArrays, TokenizedExample
from lora_dpo_jax.data.messages import holds_fills
from lora_dpo_jax.data.rows import Example, read_example
from lora_dpo_jax.data.sources import (
    RowError,
    RowTable,
    SourceError,
    Split,
    UnreadableRowError,
    attempt,
    read_tables,
)
from lora_dpo_jax.files import cache_folder, new_folder, size_and_crc32
from lora_dpo_jax.printable import printable
from lora_dpo_jax.redaction import redacted

logger = logging.getLogger(__name__)

VERSION = 5  # increase it when the same rows would give other tokens, or the files have another layout
ROWS_PER_BATCH = 256
# The counts of a report beside `rows`, `kept` and `exact`, in words.
NOTES = {
    "empty": "empty",
    "malformed": "malformed",
    "identical": "with identical responses",
    "boundary": "without an exact end of the prompt",
    "too_long": "too long",
    "tied": "whose responses all have the same score",
    "truncated": "truncated",
    "merged": "with a response tokenized by itself, as tokens would merge over the end of the prompt",
    "plain": "kept as plain strings although the tokenizer has a chat template, which servers apply: set "
    "format.strings to chat, or to plain if this is intended",
    "filled": "with tools that have null for a parameter, because tables fill in missing keys (docs/data.md: Nulls)",
    "template": "whose generation prompt ends in text that the template leaves out of whole conversations",
}
WARNED_OF = ("plain", "filled", "template")  # although these rows are kept
PATHS = ("name_or_path", "vocab_file", "tokenizer_file", "merges_file")
ARRAYS = tuple(field.name for field in dataclasses.fields(ExampleArrays) if field.name != "columns")


class TokenizedExamples:
    """A sequence of TokenizedExample on disk, memory-mapped."""

    fingerprint: str  # hex; of everything that shaped the examples
    arrays: ExampleArrays
    prompt_hashes: np.ndarray  # uint64 [n]; of the prompt's tokens before any were cut
    checksums: dict[str, int]  # CRC-32; the same for the same examples, wherever they came from
    report: dict[str, int]  # counts of all rows, rows kept, rows tokenized exactly as in TRL, and of NOTES

    def __init__(self, folder: Path):
        """Raises OSError, ValueError or KeyError if the folder is incomplete or damaged."""
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["fingerprint"] != folder.name:
            raise ValueError(f"{folder / 'meta.json'} is damaged")
        for name, (size, checksum) in meta["files"].items():
            if size_and_crc32(folder / name) != (size, checksum):
                raise ValueError(f"{folder / name} is damaged")
        self.fingerprint, self.report, self._tables = meta["fingerprint"], meta["report"], meta["tables"]
        self.checksums = {name: crc32 for name, (_, crc32) in meta["files"].items() if name != "origins.npy"}

        def load(name: str) -> np.ndarray:
            return np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)

        columns = {
            name: Column(load(f"column-{number}"), per_response)
            for number, (name, per_response) in enumerate(meta["columns"])
        }
        self.arrays = ExampleArrays(**{name: load(name) for name in ARRAYS}, columns=columns)
        self._origins, self.prompt_hashes = load("origins"), load("prompt_hashes")
        self._tokens = np.asarray(np.memmap(folder / "tokens.bin", np.int32, mode="r"))
        self._starts = np.concatenate([[0], np.cumsum(self.arrays.sizes.tokens, dtype=np.int64)])

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int) -> TokenizedExample:
        index = range(len(self))[index]
        return self.arrays.example(index, self._tokens[self._starts[index] : self._starts[index + 1]])

    def __iter__(self) -> Iterator[TokenizedExample]:
        return (self[index] for index in range(len(self)))

    def origin(self, index: int) -> str:
        table, row = self._origins[index]
        return _origin(self._tables[table], row)


def load_examples(
    config: PreferenceDataConfig, tokenizer: PreTrainedTokenizerBase, *, split: Split, train_seq_len: int
) -> dict[str, TokenizedExamples]:
    """The tokenized examples of the components that have this split, by component name."""
    return {
        name: tokenize_component(
            component, tokenizer, split=split, train_seq_len=train_seq_len, cache_dir=config.cache_dir, name=name
        )
        for name, component in config.components.items()
        if component.source.has_split(split)
    }


def tokenize_component(
    component: ComponentConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: Split,
    train_seq_len: int,
    cache_dir: str | os.PathLike | None = None,
    name: str = "data",
) -> TokenizedExamples:
    """The tokenized examples of a component, from the cache if they are there; else tokenized and cached.

    Raises SourceError for a file that cannot be read, RowError for an invalid row that the format forbids to drop, and
    ValueError if no example is left.
    """
    with _names_component(name):
        tables = component.source.tables(split)
        fingerprint = _fingerprint(component, tables, tokenizer, train_seq_len)
    folder = cache_folder(cache_dir) / "examples" / fingerprint
    examples = _open(folder)
    if examples is None:
        try:
            with new_folder(folder, is_whole=lambda folder: _open(folder) is not None) as building:
                with _Writer(building) as writer, _names_component(name):
                    report = _tokenize(component, tables, tokenizer, train_seq_len, writer, f"{name} ({split})")
                writer.finish(fingerprint=fingerprint, tables=redacted([table.name for table in tables]), report=report)
            examples = TokenizedExamples(folder)
        except OSError as error:  # of the cache; OSErrors of sources were turned into SourceErrors
            raise OSError(
                f"data.cache_dir: the tokenized examples could not be written to {folder.parent} ({error}). Make room, "
                "or set it to another folder"
            ) from error
    as_is = examples.report["kept"] == examples.report["rows"] and not any(examples.report[note] for note in WARNED_OF)
    level = logging.INFO if as_is else logging.WARNING
    logger.log(level, "data.components.%s", describe(examples.report, f"{name} ({split})"))
    return examples


@contextmanager
def _names_component(name: str) -> Iterator[None]:
    """Adds the component's name to errors, because a source does not know its component."""
    try:
        yield
    except SourceError as error:
        raise SourceError(f"data.components.{name}.source: {error}") from error
    except UnreadableRowError as error:
        setting = f"data.components.{name}.format.invalid_rows"
        raise RowError(error.reason, str(error), f"fix the row, or set {setting} to drop") from error


def describe(report: dict[str, int], name: str) -> str:
    """A sentence for people: how many rows were kept and dropped, and the counts of NOTES."""
    notes = [f"{report[reason]:,} {text}" for reason, text in NOTES.items() if report[reason]]
    dropped = report["rows"] - report["kept"]
    sentence = f"{name}: {report['kept']:,} of {report['rows']:,} rows kept, {dropped:,} dropped"
    return f"{sentence}: {'; '.join(notes)}" if notes else sentence


def _tokenize(
    component: ComponentConfig,
    tables: Sequence[RowTable],
    tokenizer: PreTrainedTokenizerBase,
    train_seq_len: int,
    writer: "_Writer",
    name: str,
) -> dict[str, int]:
    """Writes the examples of all tables and returns the report."""
    format = component.format
    example_tokenizer = ExampleTokenizer(tokenizer, format.template_text(), format)
    counts = Counter(dict.fromkeys(("rows", "kept", "exact", *NOTES), 0))
    columns: set[str] = set()
    warns_of_strings = format.strings == "auto" and tokenizer.chat_template is not None
    description = printable(f"tokenizing {name}")
    progress = iter(tqdm(read_tables(tables), desc=description, unit=" rows", disable=not sys.stderr.isatty()))
    while batch := list(itertools.islice(progress, ROWS_PER_BATCH)):
        counts["rows"] += len(batch)
        origins = [_origin(tables[index].name, number) for index, number, _ in batch]
        columns.update(*(row for _, _, row in batch if isinstance(row, dict)))
        examples = [
            row if isinstance(row, RowError) else attempt(read_example, row, format, origin)
            for (_, _, row), origin in zip(batch, origins, strict=True)
        ]
        results = example_tokenizer.tokenize(examples)
        for (index, number, _), example, result in zip(batch, examples, results, strict=True):
            if not isinstance(result, RowError):
                assert isinstance(example, Example)  # the example of a RowError is one too
                whole, boundary = result
                result = attempt(_usable, whole, train_seq_len, format, example, tokenizer.bos_token_id)
            if isinstance(result, RowError):
                if format.refuses(result.reason):
                    raise result
                counts[result.reason] += 1
                continue
            counts.update(kept=1, truncated=int(result.size < whole.size), **{boundary: 1})
            if isinstance(example, Example):
                counts["plain"] += warns_of_strings and isinstance(example.prompt, str)
                counts["filled"] += holds_fills(example.tools or [])
            writer.add(result, index, number, whole.prompt_hash)
    _check_columns(format, columns, name)
    if not counts["kept"]:
        raise ValueError(f"No row is left in data.components.{describe(counts, name)}")
    return dict(counts)


def _usable(
    example: TokenizedExample, train_seq_len: int, format: FormatConfig, row: Example, bos_token_id: Any
) -> TokenizedExample:
    names, origin = row.names, row.origin
    example = fit_to_length(example, train_seq_len, format.slice_strategy, origin, bos_token_id, names)
    for chosen, rejected in example.comparisons:
        response = example.responses[chosen]
        if np.array_equal(response, example.responses[rejected]):
            both = f"{names[chosen]} and {names[rejected]}"
            raise RowError("identical", origin, f"{both} are the same {len(response)} tokens")
    return example


def _check_columns(format: FormatConfig, columns: set[str], name: str) -> None:
    """Raises ValueError if no row has a column that the config names (defaults may be missing)."""
    for setting, column in format.named_columns.items():
        if column not in columns:
            raise ValueError(
                f"data.components.{name}: format.{setting}={column!r} names a column that no row has; "
                f"the columns are {sorted(columns)}"
            )


class _Writer:
    """Writes examples into a folder, one at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._tokens = open(folder / "tokens.bin", "wb")
        self._parts: list[ExampleArrays] = []
        self._waiting: list[TokenizedExample] = []
        self._origins, self._prompt_hashes = array("i"), array("Q")

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *exception) -> None:
        self._tokens.close()

    def add(self, example: TokenizedExample, table: int, row: int, prompt_hash: int) -> None:
        for part in example.parts:
            self._tokens.write(part.tobytes())
        self._waiting.append(example)
        if len(self._waiting) == ROWS_PER_BATCH:
            self._flush()
        self._origins.extend((table, row))
        self._prompt_hashes.append(prompt_hash)

    def _flush(self) -> None:
        """Keeps the sizes of the waiting examples, and frees their tokens."""
        if self._waiting:
            self._parts.append(ExampleArrays.of(self._waiting, str))
            self._waiting = []

    def finish(self, **meta) -> None:
        self._flush()
        arrays = ExampleArrays.joined(self._parts)
        files = {name: getattr(arrays, name) for name in ARRAYS}
        files |= {f"column-{number}": column.values for number, column in enumerate(arrays.columns.values())}
        files["origins"] = np.asarray(self._origins, np.int32).reshape(-1, 2)
        files["prompt_hashes"] = np.asarray(self._prompt_hashes, np.uint64)
        for name, values in files.items():
            np.save(self.folder / f"{name}.npy", values)
        meta["columns"] = [[name, column.per_response] for name, column in arrays.columns.items()]
        meta["files"] = {
            name: size_and_crc32(self.folder / name) for name in ["tokens.bin", *(f"{name}.npy" for name in files)]
        }
        (self.folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _open(folder: Path) -> TokenizedExamples | None:
    if not folder.exists():
        return None
    try:
        return TokenizedExamples(folder)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        logger.warning("The tokenized examples in %s are damaged (%s) and are made again", folder, error)
        return None


def _fingerprint(
    component: ComponentConfig, tables: Sequence[RowTable], tokenizer: PreTrainedTokenizerBase, train_seq_len: int
) -> str:
    shaped_by = {
        "version": VERSION,
        "libraries": [tokenizers.__version__, transformers.__version__],
        "tables": [[table.name, table.identity()] for table in tables],
        "format": {**dataclasses.asdict(component.format), "chat_template": component.format.template_text()},
        "tokenizer": _tokenizer_state(tokenizer),
        "train_seq_len": train_seq_len,
    }
    return hashlib.sha256(json.dumps(shaped_by, sort_keys=True, default=str).encode()).hexdigest()


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Everything that decides the tokens of a tokenizer. The path that it was loaded from is left out."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        model = backend_of(tokenizer).to_str()
    else:
        model = [tokenizer.get_vocab(), {k: v for k, v in tokenizer.init_kwargs.items() if k not in PATHS}]
    return {
        "class": type(tokenizer).__qualname__,
        "model": model,
        "special_tokens": tokenizer.special_tokens_map,
        "split_special_tokens": tokenizer.split_special_tokens,
        "chat_template": tokenizer.chat_template,
    }


def _origin(table: str, row: int) -> str:
    return f"{table}, row {row}"
