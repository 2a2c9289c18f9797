"""Where preference rows come from: files and URLs, data sets of the hub, and folders of `save_to_disk`."""

import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal, ParamSpec, Protocol, TypeVar, cast

import draccus
import fsspec
from fsspec.core import has_magic, url_to_fs
from fsspec.implementations.local import LocalFileSystem

from lora_dpo_jax.data.json_rows import Unreadable
from lora_dpo_jax.data.readers import READERS, ROWS_PER_READ, decompress, read_rows, suffixes
from lora_dpo_jax.files import sha256_of
from lora_dpo_jax.places import place_of, spelled_alike

P = ParamSpec("P")
T = TypeVar("T")
Split = Literal["train", "validation"]
Reason = Literal["empty", "malformed", "identical", "boundary", "too_long", "tied"]

# Local files up to this size are identified by their content, so copying or touching them rebuilds nothing.
CONTENT_HASH_BYTES = 1 << 30


class SourceError(ValueError):
    """A file or data set cannot be found or read. The message names it, but not its component."""


class RowError(ValueError):
    """One row cannot be used. If such rows may be dropped, they are counted under `reason`."""

    def __init__(self, reason: Reason, origin: str, message: str):
        super().__init__(f"{origin}: {message}")
        self.reason: Reason = reason

    def __reduce__(self):  # pickle would pass the message alone to __init__
        return type(self).__new__, (type(self), *self.args), vars(self)


class UnreadableRowError(RowError):
    """A row whose text cannot be parsed."""

    def __init__(self, origin: str, message: str):
        super().__init__("malformed", origin, message)


def attempt(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> "T | RowError":
    """The function's result, or the RowError that it raised, which the caller raises or counts."""
    try:
        return function(*args, **kwargs)
    except RowError as error:
        return error


class RowTable(Protocol):
    """One file, or one split of a data set. Row numbers count within it."""

    @property
    def name(self) -> str: ...

    def identity(self) -> str:
        """A text that changes whenever the rows may have changed."""
        ...

    def rows(self) -> Iterator[tuple[int, Any]]:
        """(number, row), counted from 1. A row that cannot be parsed is replaced by a RowError."""
        ...


@dataclass(frozen=True)
class SourceConfig(draccus.ChoiceRegistry):
    @classmethod
    def default_choice_name(cls) -> str:
        return "url"

    def has_split(self, split: Split) -> bool:
        raise NotImplementedError

    def tables(self, split: Split) -> Sequence[RowTable]:
        """Raises SourceError."""
        raise NotImplementedError

    def places(self, split: Split) -> list[str]:
        """The paths, URLs or ids of its rows, as they were given."""
        return []

    @property
    def hub_id(self) -> str | None:
        """The id of its data set on the hub, if it is one."""
        return None


@SourceConfig.register_subclass("url")
@dataclass(frozen=True)
class UrlSource(SourceConfig):
    """Local paths, globs and all URLs that fsspec opens (gs://, s3://, https://, hf://...).

    The suffix gives the format (.jsonl, .json, .parquet, .csv, .tsv) and the compression (.gz, .zst, .bz2, .xz).
    """

    train_urls: list[str] = field(default_factory=list)  # paths, globs and URLs
    validation_urls: list[str] = field(default_factory=list)  # paths, globs and URLs

    def __post_init__(self):
        if not self.train_urls and not self.validation_urls:
            raise ValueError("source: {type: url} needs train_urls, validation_urls or both; it names neither")

    def has_split(self, split: Split) -> bool:
        return bool(self.places(split))

    def tables(self, split: Split) -> Sequence[RowTable]:
        files = [file for url in self.places(split) for file in expand_url(url)]
        places = [file.place for file in files]
        if twice := sorted({file.name for file in files if places.count(file.place) > 1}):
            raise SourceError(f"{split}_urls names these files more than once: {twice}")
        return files

    def places(self, split: Split) -> list[str]:
        return self.train_urls if split == "train" else self.validation_urls


@SourceConfig.register_subclass("hf")
@dataclass(frozen=True)
class HubSource(SourceConfig):
    """A data set of the Hugging Face hub, a local folder laid out like one, or a folder of `save_to_disk`."""

    id: str  # of a hub data set, or a local folder
    name: str | None = None  # the configuration, if the data set has several
    revision: str | None = None  # branch, tag or commit
    train_split: str | None = "train"  # any split expression of `datasets`, such as train[:1000]
    validation_split: str | None = None  # likewise a split expression; null: no validation data

    def __post_init__(self):
        if not self.id.strip():
            raise ValueError(f"source: {{type: hf, id: {self.id!r}}} needs the id of a data set, or a local folder")

    def has_split(self, split: Split) -> bool:
        return self._split(split) is not None

    def tables(self, split: Split) -> Sequence[RowTable]:
        expression = self._split(split)
        if expression is None:
            return []
        with _as_source_error(f"{self.id} ({split}_split: {expression}): cannot be loaded"):
            if os.path.isfile(self.id):
                raise SourceError(f"{self.id} is a file; read it with source: {{type: url, {split}_urls: [{self.id}]}}")
            saved = _is_saved(*url_to_fs(self.id))
            return [_saved_table(self, expression) if saved else _hub_table(self, expression)]

    def places(self, split: Split) -> list[str]:
        return [self.id]

    @property
    def hub_id(self) -> str | None:
        return None if os.path.exists(self.id) or "://" in self.id else self.id

    def _split(self, split: Split) -> str | None:
        return self.train_split if split == "train" else self.validation_split


@dataclass(frozen=True)
class RowFile:
    name: str
    filesystem: fsspec.AbstractFileSystem
    path: str

    @property
    def place(self) -> str:
        """The same for all spellings of one file."""
        local = isinstance(self.filesystem, LocalFileSystem)
        return place_of(self.path if local else self.filesystem.unstrip_protocol(self.path))

    def identity(self) -> str:
        with _as_source_error(f"{self.name}: cannot be read"):
            info = self.filesystem.info(self.path)
            if not isinstance(self.filesystem, LocalFileSystem):
                return f"{info.get('size')} {self.filesystem.ukey(self.path)}"
            if info["size"] > CONTENT_HASH_BYTES:
                return f"{info['size']} {info['mtime']}"
            with open(self.path, "rb") as file:
                return sha256_of(file)

    def check_compressed(self) -> None:
        """Reads a compressed file to its end, because `datasets` accepts truncated files. Raises SourceError."""
        compression = suffixes(self.path)[1]
        if compression is not None:
            with _as_source_error(f"{self.name}: cannot be read"), self.filesystem.open(self.path, "rb") as raw:
                content = decompress(cast(BinaryIO, raw), compression)
                while content.read(1 << 20):
                    pass

    def rows(self) -> Iterator[tuple[int, Any]]:
        """Raises SourceError if the file is damaged."""
        number = 0
        try:
            with self.filesystem.open(self.path, "rb") as raw:
                for number, row in read_rows(cast(BinaryIO, raw), self.path):
                    yield number, _or_error(row, self.name, number)
        except Exception as error:
            where = f"cannot be read beyond row {number}" if number else "cannot be read"
            raise SourceError(f"{self.name}: {where}: {_one_line(error)}") from error


@dataclass(frozen=True)
class HubTable:
    name: str
    dataset: Any
    exact: bool  # see read_table

    def identity(self) -> str:
        return self.dataset._fingerprint

    def rows(self) -> Iterator[tuple[int, Any]]:
        """Raises SourceError if the data set is damaged."""
        from lora_dpo_jax.data.arrow_rows import read_table

        with _as_source_error(f"{self.name}: cannot be read"):
            tables = self.dataset.with_format("arrow").iter(ROWS_PER_READ)
            rows = (row for table in tables for row in read_table(table, exact=self.exact))
            for number, row in enumerate(rows, start=1):
                yield number, _or_error(row, self.name, number)


def read_tables(tables: Sequence[RowTable]) -> Iterator[tuple[int, int, Any]]:
    """(table, number of the row in it, row). Raises SourceError for a table without rows, which may be a lost file."""
    for index, table in enumerate(tables):
        empty = True
        for number, row in table.rows():
            empty = False
            yield index, number, row
        if empty:
            raise SourceError(f"{table.name} holds no rows; leave it out, or replace it")


def expand_url(url: str) -> list[RowFile]:
    """The files of a path, URL or glob, sorted by name. Raises SourceError if there is none."""
    with _as_source_error(f"{url}: cannot be opened"):
        filesystem, path = url_to_fs(url)
        # In a web address a question mark begins the query.
        pattern = has_magic(path) if not url.startswith(("http:", "https:")) else "*" in path
        if not pattern or filesystem.isfile(path):
            return [RowFile(url, filesystem, _file(filesystem, path, url))]
        paths = sorted(found for found in filesystem.glob(path) if not filesystem.isdir(found))
    if not paths:
        raise SourceError(f"no file matches {url}")
    local = isinstance(filesystem, LocalFileSystem)
    return [RowFile(found if local else filesystem.unstrip_protocol(found), filesystem, found) for found in paths]


def _file(filesystem: fsspec.AbstractFileSystem, path: str, url: str) -> str:
    if not filesystem.exists(path):
        raise SourceError(f"{url} does not exist{spelled_alike(url)}")
    if not filesystem.isdir(path):
        return path
    if _is_saved(filesystem, path):
        advice = f"it was written by save_to_disk of datasets; read it with source: {{type: hf, id: {url}}}"
    elif not filesystem.ls(path):
        advice = "it is empty"
    else:
        advice = f"name its files, as in {url.rstrip('/')}/*.jsonl"
    raise SourceError(f"{url} is a folder; {advice}")


def _is_saved(filesystem: fsspec.AbstractFileSystem, path: str) -> bool:
    """Whether it is a folder that `save_to_disk` of a Dataset or a DatasetDict wrote."""
    return any(filesystem.isfile(f"{path}/{name}") for name in ("state.json", "dataset_dict.json"))


def _saved_table(source: HubSource, expression: str) -> HubTable:
    if source.name is not None or source.revision is not None:
        raise SourceError(f"{source.id} was written by save_to_disk and has no name or revision; unset both")
    import datasets  # slow to import, and not needed for files

    saved = datasets.load_from_disk(source.id)
    if isinstance(saved, datasets.Dataset):  # of one split, or a part of it such as train[:1000]
        saved = {re.sub(r"\W.*", "", str(saved.split or "train")): saved}
    sizes = {name: len(part) for name, part in saved.items()}
    taken = datasets.ReadInstruction.from_spec(expression).to_absolute(sizes)
    parts = [saved[part.splitname].select(range(part.from_, part.to)) for part in taken]
    return HubTable(f"{source.id}[{expression}]", datasets.concatenate_datasets(parts), exact=False)


def _hub_table(source: HubSource, expression: str) -> HubTable:
    import datasets

    builder = datasets.load_dataset_builder(source.id, source.name, revision=source.revision)
    paths = itertools.chain(*(builder.config.data_files or {}).values())
    files = [RowFile(path, *url_to_fs(path)) for path in paths if "://" not in path]
    for file in files:
        file.check_compressed()
    try:
        builder.download_and_prepare()
    except Exception as error:
        if fault := _first_fault(files):
            raise SourceError(fault) from error
        raise
    name = "/".join(filter(None, (source.id, source.name)))
    return HubTable(f"{name}[{expression}]", builder.as_dataset(expression), exact=builder.info.builder_name == "json")


def _first_fault(files: Sequence[RowFile]) -> str | None:
    """The first unreadable file or row: errors of `datasets` do not name it."""
    known = [file for file in files if suffixes(file.path)[0] in READERS]
    try:
        return next((str(row) for _, _, row in read_tables(known) if isinstance(row, RowError)), None)
    except SourceError as error:
        return str(error)


def _or_error(row: Any, table: str, number: int) -> Any:
    return UnreadableRowError(f"{table}, row {number}", row.why) if isinstance(row, Unreadable) else row


@contextmanager
def _as_source_error(failure: str) -> Iterator[None]:
    """Turns any error of a library into a SourceError of one line, which begins with `failure`."""
    try:
        yield
    except SourceError:
        raise
    except Exception as error:
        raise SourceError(f"{failure}: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    """The error in one line, with its cause if the message does not contain it."""
    message = " ".join(str(error).split())
    if not message or not isinstance(error, ValueError | OSError | ImportError | EOFError):
        message = f"{type(error).__name__}: {message}".rstrip(": ")
    cause = " ".join(str(error.__cause__ or "").split())
    return message if cause in message else f"{message}: {cause}"
