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
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tokenizers
import transformers
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from lora_dpo_jax.data.config import ComponentConfig, FormatConfig, PreferenceDataConfig
from lora_dpo_jax.data.examples import Column, ExampleArrays, TokenizedExample
from lora_dpo_jax.data.sources import RowError, RowTable, SourceError, Split, UnreadableRowError, read_tables
from lora_dpo_jax.data.tokenizing import NumberedRow, RowSettings, TokenizedRows, row_origin
from lora_dpo_jax.data.workers import Workers
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
        return row_origin(self._tables[table], row)


def load_examples(
    config: PreferenceDataConfig, tokenizer: PreTrainedTokenizerBase, *, train_seq_len: int
) -> tuple[dict[str, TokenizedExamples], dict[str, TokenizedExamples]]:
    """(train, validation): the tokenized examples of the components that have this split, by component name."""

    def load(split: Split, workers: Workers) -> dict[str, TokenizedExamples]:
        return {
            name: _load(component, workers, split, train_seq_len, config.cache_dir, name)
            for name, component in config.components.items()
            if component.source.has_split(split)
        }

    with Workers(tokenizer, config.num_proc) as workers:
        return load("train", workers), load("validation", workers)


def tokenize_component(
    component: ComponentConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: Split,
    train_seq_len: int,
    cache_dir: str | os.PathLike | None = None,
    name: str = "data",
    num_proc: int | None = None,
) -> TokenizedExamples:
    """The tokenized examples of a component, from the cache if they are there; else tokenized and cached.

    `num_proc` is the number of processes that tokenize; None: see `Workers`. The examples are the same
    for any number. Raises SourceError for a file that cannot be read, RowError for an invalid row that the format
    forbids to drop, ValueError if no example is left, and RuntimeError if one of the processes was killed.
    """
    with Workers(tokenizer, num_proc) as workers:
        return _load(component, workers, split, train_seq_len, cache_dir, name)


def _load(
    component: ComponentConfig,
    workers: Workers,
    split: Split,
    train_seq_len: int,
    cache_dir: str | os.PathLike | None,
    name: str,
) -> TokenizedExamples:
    with _names_component(name):
        tables = component.source.tables(split)
        settings = RowSettings(
            component.format, component.format.template_text(), train_seq_len, tuple(table.name for table in tables)
        )
        fingerprint = _fingerprint(settings, tables, workers.tokenizer_digest)
    folder = cache_folder(cache_dir) / "examples" / fingerprint
    examples = _open(folder)
    if examples is None:
        try:
            with new_folder(folder, is_whole=lambda folder: _open(folder) is not None) as building:
                with _Writer(building) as writer, _names_component(name):
                    report = _tokenize(settings, tables, workers, writer, f"{name} ({split})")
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
    settings: RowSettings, tables: Sequence[RowTable], workers: Workers, writer: "_Writer", name: str
) -> dict[str, int]:
    """Writes the examples of all tables and returns the report."""
    counts = Counter(dict.fromkeys(("rows", "kept", "exact", *NOTES), 0))
    columns: set[str] = set()
    for rows in workers.tokenized(settings, _batches(tables, name)):
        counts.update(rows.counts)
        columns |= rows.columns
        writer.add(rows)
    _check_columns(settings.format, columns, name)
    if not counts["kept"]:
        raise ValueError(f"No row is left in data.components.{describe(counts, name)}")
    return dict(counts)


def _batches(tables: Sequence[RowTable], name: str) -> Iterator[list[NumberedRow]]:
    description = printable(f"tokenizing {name}")
    progress = iter(tqdm(read_tables(tables), desc=description, unit=" rows", disable=not sys.stderr.isatty()))
    while batch := list(itertools.islice(progress, ROWS_PER_BATCH)):
        yield batch


def _check_columns(format: FormatConfig, columns: set[str], name: str) -> None:
    """Raises ValueError if no row has a column that the config names (defaults may be missing)."""
    for setting, column in format.named_columns.items():
        if column not in columns:
            raise ValueError(
                f"data.components.{name}: format.{setting}={column!r} names a column that no row has; "
                f"the columns are {sorted(columns)}"
            )


class _Writer:
    """Writes examples into a folder, some rows at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._tokens = open(folder / "tokens.bin", "wb")
        self._parts: list[ExampleArrays] = []
        self._origins: list[np.ndarray] = []
        self._prompt_hashes: list[np.ndarray] = []

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *exception) -> None:
        self._tokens.close()

    def add(self, rows: TokenizedRows) -> None:
        if rows.arrays is not None:
            self._tokens.write(rows.tokens)
            self._parts.append(rows.arrays)
            self._origins.append(rows.origins)
            self._prompt_hashes.append(rows.prompt_hashes)

    def finish(self, **meta) -> None:
        arrays = ExampleArrays.joined(self._parts)
        files = {name: getattr(arrays, name) for name in ARRAYS}
        files |= {f"column-{number}": column.values for number, column in enumerate(arrays.columns.values())}
        files["origins"] = np.concatenate(self._origins)
        files["prompt_hashes"] = np.concatenate(self._prompt_hashes)
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


def _fingerprint(settings: RowSettings, tables: Sequence[RowTable], tokenizer_digest: str) -> str:
    shaped_by = {
        "version": VERSION,
        "libraries": [tokenizers.__version__, transformers.__version__],
        "tables": [[table.name, table.identity()] for table in tables],
        "format": {**dataclasses.asdict(settings.format), "chat_template": settings.template},
        "tokenizer": tokenizer_digest,
        "train_seq_len": settings.train_seq_len,
    }
    return hashlib.sha256(json.dumps(shaped_by, sort_keys=True, default=str).encode()).hexdigest()
