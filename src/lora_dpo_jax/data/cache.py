"""Tokenized pairs on disk, under a key made of everything that shaped them.

    <cache_dir>/pairs/<fingerprint>/
      tokens.bin           int32: prompt, chosen, rejected of pair 0, then of pair 1, ...
      lengths.npy          int32 [n, 3]
      origins.npy          int32 [n, 2]: table, row
      prompt_hashes.npy    uint64 [n]
      meta.json            fingerprint, names of the tables, report, size and checksum of the files above

A folder is written under another name and renamed when it is whole, so that any number of processes may share it.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import shutil
import sys
import time
import uuid
import zlib
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

from lora_dpo_jax.data.chat import PairTokenizer, SliceStrategy, TokenizedPair, backend_of, fit_to_length
from lora_dpo_jax.data.config import (
    ComponentConfig,
    FormatConfig,
    PreferenceDataConfig,
    default_cache_dir,
)
from lora_dpo_jax.data.messages import holds_fills
from lora_dpo_jax.data.rows import PreferencePair, read_pair
from lora_dpo_jax.data.sources import RowError, RowTable, SourceError, Split, attempt, read_tables
from lora_dpo_jax.printable import printable
from lora_dpo_jax.redaction import redacted

logger = logging.getLogger(__name__)

VERSION = 2  # raise it when the same rows would become other tokens, or the files another layout
ROWS_PER_BATCH = 256
LITTER_SECONDS = 24 * 3600
# What a report counts beside `rows`, `kept` and `exact`, in words.
NOTES = {
    "empty": "empty",
    "malformed": "malformed",
    "identical": "with identical responses",
    "boundary": "without an exact end of the prompt",
    "too_long": "too long",
    "truncated": "truncated",
    "merged": "with a response tokenized by itself, as tokens would merge over the end of the prompt",
    "plain": "kept as plain strings although the tokenizer has a chat template, which servers apply: set "
    "format.strings to chat, or to plain if that is meant",
    "filled": "with tools that have null for a parameter, as tables fill them (docs/data.md: Nulls)",
    "template": "whose generation prompt ends in text that the template leaves out of whole conversations",
}
WARNED_OF = ("plain", "filled", "template")  # though the rows are kept
PATHS = ("name_or_path", "vocab_file", "tokenizer_file", "merges_file")
ARRAYS = ("lengths", "origins", "prompt_hashes")


class TokenizedPairs:
    """A sequence of TokenizedPair on disk, memory-mapped."""

    fingerprint: str  # hex; of everything that shaped the pairs
    lengths: np.ndarray  # int32 [n, 3]: tokens of prompt, chosen, rejected
    prompt_hashes: np.ndarray  # uint64 [n]; of the prompt's tokens before any were cut
    checksums: dict[str, int]  # CRC-32; the same for the same pairs, wherever they came from
    report: dict[str, int]  # how many rows there were, were kept, were tokenized exactly as TRL does, and NOTES

    def __init__(self, folder: Path):
        """Raises OSError, ValueError or KeyError if the folder is not whole."""
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["fingerprint"] != folder.name:
            raise ValueError(f"{folder / 'meta.json'} is damaged")
        for name, (size, checksum) in meta["files"].items():
            if os.path.getsize(folder / name) != size or _checksum(folder / name) != checksum:
                raise ValueError(f"{folder / name} is damaged")
        self.fingerprint, self.report, self._tables = meta["fingerprint"], meta["report"], meta["tables"]
        self.checksums = {name: meta["files"][name][1] for name in ("tokens.bin", "lengths.npy")}
        self.lengths, self._origins, self.prompt_hashes = (
            np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS
        )
        self._tokens = np.asarray(np.memmap(folder / "tokens.bin", np.int32, mode="r"))
        self._starts = np.concatenate([[0], np.cumsum(self.lengths.sum(axis=1, dtype=np.int64))])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> TokenizedPair:
        index = range(len(self))[index]
        tokens = self._tokens[self._starts[index] : self._starts[index + 1]]
        prompt, chosen, _ = self.lengths[index]
        return TokenizedPair(tokens[:prompt], tokens[prompt : prompt + chosen], tokens[prompt + chosen :])

    def __iter__(self) -> Iterator[TokenizedPair]:
        return (self[index] for index in range(len(self)))

    def origin(self, index: int) -> str:
        table, row = self._origins[index]
        return _origin(self._tables[table], row)


def load_pairs(
    config: PreferenceDataConfig, tokenizer: PreTrainedTokenizerBase, *, split: Split, train_seq_len: int
) -> dict[str, TokenizedPairs]:
    """By name, the tokenized pairs of the components that have this split."""
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
) -> TokenizedPairs:
    """From the cache, or read, tokenized and cached.

    Raises SourceError for a file that cannot be read, RowError for a row that the format does not let drop, and
    ValueError if no pair is left.
    """
    with _names_component(name):
        tables = component.source.tables(split)
        fingerprint = _fingerprint(component, tables, tokenizer, train_seq_len)
    folder = Path(cache_dir or default_cache_dir()).expanduser() / "pairs" / fingerprint
    pairs = _open(folder)
    if pairs is None:
        _remove_litter(folder.parent)
        building = folder.parent / f".building-{uuid.uuid4().hex}"
        try:
            building.mkdir(parents=True)
            with _Writer(building) as writer, _names_component(name):
                report = _tokenize(component, tables, tokenizer, train_seq_len, writer, f"{name} ({split})")
            writer.finish(fingerprint=fingerprint, tables=redacted([table.name for table in tables]), report=report)
            pairs = _publish(building, folder)
        except OSError as error:  # those of sources have become ValueErrors
            raise OSError(
                f"data.cache_dir: the tokenized pairs could not be written to {folder.parent} ({error}). Make room, or "
                "set it to another folder"
            ) from error
        finally:
            shutil.rmtree(building, ignore_errors=True)
    as_is = pairs.report["kept"] == pairs.report["rows"] and not any(pairs.report[note] for note in WARNED_OF)
    level = logging.INFO if as_is else logging.WARNING
    logger.log(level, "data.components.%s", describe(pairs.report, f"{name} ({split})"))
    return pairs


@contextmanager
def _names_component(name: str) -> Iterator[None]:
    """A source knows its files, and not the component that it belongs to."""
    try:
        yield
    except SourceError as error:
        raise SourceError(f"data.components.{name}.source: {error}") from error


def describe(report: dict[str, int], name: str) -> str:
    """A sentence for people: how many rows were kept, and what became of the others."""
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
    """Writes the pairs of all tables and returns the report."""
    format = component.format
    pair_tokenizer = PairTokenizer(tokenizer, format.template_text())
    counts = Counter(dict.fromkeys(("rows", "kept", "exact", *NOTES), 0))
    columns: set[str] = set()
    warns_of_strings = format.strings == "auto" and tokenizer.chat_template is not None
    description = printable(f"tokenizing {name}")
    progress = iter(tqdm(read_tables(tables), desc=description, unit=" rows", disable=not sys.stderr.isatty()))
    while batch := list(itertools.islice(progress, ROWS_PER_BATCH)):
        counts["rows"] += len(batch)
        origins = [_origin(tables[index].name, number) for index, number, _ in batch]
        columns.update(*(row for _, _, row in batch if isinstance(row, dict)))
        pairs = [
            row if isinstance(row, RowError) else attempt(read_pair, row, format, origin)
            for (_, _, row), origin in zip(batch, origins, strict=True)
        ]
        results = pair_tokenizer.tokenize(pairs)
        for (index, number, _), origin, pair, result in zip(batch, origins, pairs, results, strict=True):
            if not isinstance(result, RowError):
                whole, boundary = result
                result = attempt(_usable, whole, train_seq_len, format.slice_strategy, origin, tokenizer.bos_token_id)
            if isinstance(result, RowError):
                if format.refuses(result.reason):
                    raise result
                counts[result.reason] += 1
                continue
            counts.update(kept=1, truncated=int(result.size < whole.size), **{boundary: 1})
            if isinstance(pair, PreferencePair):
                counts["plain"] += warns_of_strings and isinstance(pair.prompt, str)
                counts["filled"] += holds_fills(pair.tools or [])
            writer.add(result, index, number, whole.prompt_hash)
    _check_columns(format, columns, name)
    if not counts["kept"]:
        raise ValueError(f"No pair is left in data.components.{describe(counts, name)}")
    return dict(counts)


def _usable(
    pair: TokenizedPair, train_seq_len: int, strategy: SliceStrategy, origin: str, bos_token_id: Any
) -> TokenizedPair:
    pair = fit_to_length(pair, train_seq_len, strategy, origin, bos_token_id)
    if np.array_equal(pair.chosen, pair.rejected):
        raise RowError("identical", origin, f"chosen and rejected are the same {len(pair.chosen)} tokens")
    return pair


def _check_columns(format: FormatConfig, columns: set[str], name: str) -> None:
    """A column that was named in the config, not by default, must exist."""
    for setting, column in format.named_columns.items():
        if column not in columns:
            raise ValueError(
                f"data.components.{name}: format.{setting}={column!r} names a column that no row has; "
                f"the columns are {sorted(columns)}"
            )


class _Writer:
    def __init__(self, folder: Path):
        self.folder = folder
        self._tokens = open(folder / "tokens.bin", "wb")
        self._lengths, self._origins, self._prompt_hashes = array("i"), array("i"), array("Q")

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *exception) -> None:
        self._tokens.close()

    def add(self, pair: TokenizedPair, table: int, row: int, prompt_hash: int) -> None:
        for part in pair:
            self._tokens.write(part.tobytes())
        self._lengths.extend(map(len, pair))
        self._origins.extend((table, row))
        self._prompt_hashes.append(prompt_hash)

    def finish(self, **meta) -> None:
        arrays = {
            "lengths": np.asarray(self._lengths, np.int32).reshape(-1, 3),
            "origins": np.asarray(self._origins, np.int32).reshape(-1, 2),
            "prompt_hashes": np.asarray(self._prompt_hashes, np.uint64),
        }
        for name in ARRAYS:
            np.save(self.folder / f"{name}.npy", arrays[name])
        names = ["tokens.bin", *(f"{name}.npy" for name in ARRAYS)]
        meta["files"] = {name: [os.path.getsize(self.folder / name), _checksum(self.folder / name)] for name in names}
        (self.folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _open(folder: Path) -> TokenizedPairs | None:
    if not folder.exists():
        return None
    try:
        return TokenizedPairs(folder)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        logger.warning("The tokenized pairs in %s are damaged (%s) and are made again", folder, error)
        return None


def _remove_litter(folder: Path) -> None:
    """What processes left that were killed while they wrote it. One that still writes does so within a day."""
    for building in folder.glob(".building-*"):
        try:
            last_write = max(path.stat().st_mtime for path in [building, *building.iterdir()])
        except OSError:  # its process has just put it in its place, or removed it
            continue
        if time.time() - last_write > LITTER_SECONDS:
            shutil.rmtree(building, ignore_errors=True)


def _publish(building: Path, folder: Path) -> TokenizedPairs:
    try:
        building.rename(folder)
    except OSError:  # a folder stands there: another process was faster, or it is damaged
        if pairs := _open(folder):
            return pairs
        folder.rename(building.with_suffix(".damaged"))
        shutil.rmtree(building.with_suffix(".damaged"), ignore_errors=True)
        building.rename(folder)
    return TokenizedPairs(folder)


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
    """All that decides its tokens. Where it was loaded from does not."""
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


def _checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _origin(table: str, row: int) -> str:
    return f"{table}, row {row}"
