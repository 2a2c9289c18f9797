"""Where preference rows come from: files and URLs of jsonl, json or parquet, and data sets of the hub."""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Literal, ParamSpec, Protocol, TypeVar, cast
from urllib.parse import urlsplit

import draccus
import fsspec
import fsspec.compression
from fsspec.core import has_magic, url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import compressions

P = ParamSpec("P")
T = TypeVar("T")
Split = Literal["train", "validation"]
Reason = Literal["empty", "malformed", "identical", "boundary", "too_long"]

# Local files up to this size are known by their content, so that copying or touching them rebuilds nothing.
CONTENT_HASH_BYTES = 1 << 30
ROWS_PER_READ = 1024


class RowError(ValueError):
    """One row cannot be used. `reason` is the name it is counted under where such rows may be dropped."""

    def __init__(self, reason: Reason, origin: str, message: str):
        super().__init__(f"{origin}: {message}")
        self.reason: Reason = reason


def attempt(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> "T | RowError":
    """The result, or the RowError raised instead: a refused row is an answer, for the caller to raise or to count."""
    try:
        return function(*args, **kwargs)
    except RowError as error:
        return error


class RowTable(Protocol):
    """One file, or one split of a data set: what row numbers count within."""

    @property
    def name(self) -> str: ...

    def identity(self) -> str:
        """Changes whenever the rows may have changed."""
        ...

    def rows(self) -> Iterator[tuple[int, Any]]:
        """(number, row), counted from 1. A row that cannot be parsed comes as the RowError that says so."""
        ...


@dataclass(frozen=True)
class SourceConfig(draccus.ChoiceRegistry):
    @classmethod
    def default_choice_name(cls) -> str:
        return "url"

    def has_split(self, split: Split) -> bool:
        raise NotImplementedError

    def tables(self, split: Split) -> Sequence[RowTable]:
        raise NotImplementedError


@SourceConfig.register_subclass("url")
@dataclass(frozen=True)
class UrlSource(SourceConfig):
    """Local paths, globs and whatever fsspec opens (gs://, s3://, https://, hf://...).

    The suffix tells the format (.jsonl, .json, .parquet) and the compression (.gz, .zst, .bz2, .xz).
    """

    train_urls: list[str] = field(default_factory=list)  # paths, globs and URLs
    validation_urls: list[str] = field(default_factory=list)  # likewise

    def __post_init__(self):
        if not self.train_urls and not self.validation_urls:
            raise ValueError("source: {type: url} needs train_urls, validation_urls or both; it names neither")

    def has_split(self, split: Split) -> bool:
        return bool(self._urls(split))

    def tables(self, split: Split) -> Sequence[RowTable]:
        files = [file for url in self._urls(split) for file in expand_url(url)]
        names = [file.name for file in files]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"source.{split}_urls names these files more than once: {twice}")
        return files

    def _urls(self, split: Split) -> list[str]:
        return self.train_urls if split == "train" else self.validation_urls


@SourceConfig.register_subclass("hf")
@dataclass(frozen=True)
class HubSource(SourceConfig):
    """A data set of the Hugging Face hub, or a local folder laid out like one."""

    id: str  # of a hub data set, or a local folder
    name: str | None = None  # the configuration, where the data set has several
    revision: str | None = None  # branch, tag or commit
    train_split: str | None = "train"  # any split expression of `datasets`, such as train[:1000]
    validation_split: str | None = None  # likewise

    def has_split(self, split: Split) -> bool:
        return self._split(split) is not None

    def tables(self, split: Split) -> Sequence[RowTable]:
        name = self._split(split)
        return [] if name is None else [HubTable.load(self, name)]

    def _split(self, split: Split) -> str | None:
        return self.train_split if split == "train" else self.validation_split


@dataclass(frozen=True)
class RowFile:
    name: str
    filesystem: fsspec.AbstractFileSystem
    path: str

    def identity(self) -> str:
        info = self.filesystem.info(self.path)
        if not isinstance(self.filesystem, LocalFileSystem):
            return f"{info.get('size')} {self.filesystem.ukey(self.path)}"
        if info["size"] > CONTENT_HASH_BYTES:
            return f"{info['size']} {info['mtime']}"
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def rows(self) -> Iterator[tuple[int, Any]]:
        suffix, compression = suffixes(self.path)
        read = READERS.get(suffix)
        if read is None:
            raise ValueError(
                f"{self.name}: cannot tell its format from the suffix {suffix!r}. "
                f"Needed: one of {sorted(READERS)}, then {sorted(compressions)} if it is compressed"
            )
        number = 0
        try:
            with self.filesystem.open(self.path, "rb") as raw:
                for number, row in enumerate(read(decompress(cast(BinaryIO, raw), compression)), start=1):
                    if isinstance(row, _Unreadable):
                        yield number, RowError("malformed", f"{self.name}, row {number}", row.why)
                    elif row is not None:
                        yield number, row
        except (EOFError, OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{self.name}: cannot be read beyond row {number}: {error}") from error


@dataclass(frozen=True)
class HubTable:
    name: str
    dataset: Any

    @classmethod
    def load(cls, source: HubSource, split: str) -> "HubTable":
        import datasets  # slow to import, and not needed for files

        dataset = datasets.load_dataset(source.id, source.name, revision=source.revision, split=split)
        return cls("/".join(filter(None, (source.id, source.name))) + f"[{split}]", dataset)

    def identity(self) -> str:
        return self.dataset._fingerprint

    def rows(self) -> Iterator[tuple[int, Any]]:
        number = 0
        for batch in self.dataset.with_format(None).iter(ROWS_PER_READ):
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield number, _without_none(dict(zip(batch, values, strict=True)))


def expand_url(url: str) -> list[RowFile]:
    """The files of a path, URL or glob, in the order of their names."""
    filesystem, path = url_to_fs(url)
    # In a web address a question mark begins the query.
    pattern = has_magic(path) if not url.startswith(("http:", "https:")) else "*" in path
    if not pattern or filesystem.isfile(path):
        if not filesystem.exists(path):
            raise FileNotFoundError(f"source: {url} does not exist")
        if filesystem.isdir(path):
            raise IsADirectoryError(f"source: {url} is a folder; name its files, as in {url.rstrip('/')}/*.jsonl")
        return [RowFile(url, filesystem, path)]
    paths = sorted(found for found in filesystem.glob(path) if not filesystem.isdir(found))
    if not paths:
        raise FileNotFoundError(f"source: no file matches {url}")
    local = isinstance(filesystem, LocalFileSystem)
    return [RowFile(found if local else filesystem.unstrip_protocol(found), filesystem, found) for found in paths]


def suffixes(path: str) -> tuple[str, str | None]:
    """('jsonl', 'gzip') for prefs.jsonl.gz; no compression is None."""
    name = PurePosixPath(urlsplit(path).path if "://" in path else path)
    compression = compressions.get(name.suffix.removeprefix(".").lower())
    if compression:
        name = name.with_suffix("")
    return name.suffix.removeprefix(".").lower(), compression


def decompress(file: BinaryIO, compression: str | None) -> BinaryIO:
    if compression is None:
        return file
    if compression == "zstd":
        import zstandard

        # fsspec would stop, in silence, after the first of several frames.
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))  # type: ignore
    return fsspec.compression.compr[compression](file, mode="rb")  # type: ignore


@dataclass(frozen=True)
class _Unreadable:
    why: str


def _read_json_lines(file: BinaryIO) -> Iterator[Any]:
    """One item a line, so that rows are numbered as an editor numbers lines; None for a blank line."""
    for line in file:
        if not line.strip():
            yield None
            continue
        try:
            yield json.loads(line)
        except ValueError as error:  # also of bytes that are not UTF-8
            yield _Unreadable(f"is not JSON: {error}")


def _read_json(file: BinaryIO) -> Iterator[Any]:
    """An array of rows, or JSON lines under another suffix."""
    content = file.read()
    return iter(json.loads(content)) if content.lstrip().startswith(b"[") else _read_json_lines(io.BytesIO(content))


def _read_parquet(file: BinaryIO) -> Iterator[Any]:
    import pyarrow.parquet as parquet

    seekable = file if file.seekable() else io.BytesIO(file.read())
    for batch in parquet.ParquetFile(seekable).iter_batches(ROWS_PER_READ):
        yield from map(_without_none, batch.to_pylist())


def _without_none(value: Any) -> Any:
    """Arrow gives every message the keys of all messages, filled with None: templates must not see those."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


READERS = {
    "jsonl": _read_json_lines,
    "ndjson": _read_json_lines,
    "json": _read_json,
    "parquet": _read_parquet,
}
