"""From the bytes of a file to its rows. The suffix decides the format and the compression."""

import bz2
import csv
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import zstandard

from lora_dpo_jax.data.json_rows import Unreadable, read_json, read_json_lines, utf8_lines

ROWS_PER_READ = 1024
BYTES_PER_READ = 1 << 16
COMPRESSIONS = {"gz": "gzip", "bz2": "bz2", "xz": "xz", "zst": "zstd"}  # by suffix
# The first bytes of a file of each compression.
MAGIC = {"gzip": b"\x1f\x8b", "bz2": b"BZh", "xz": b"\xfd7zXZ\x00", "zstd": b"\x28\xb5\x2f\xfd"}
# Objects with `decompress`, `eof` and `unused_data`, each for one stream.
DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(wbits=31),  # 31: with gzip's header and checksum
    "bz2": bz2.BZ2Decompressor,
    "xz": lzma.LZMADecompressor,
    "zstd": lambda: zstandard.ZstdDecompressor().decompressobj(),
}


def read_rows(file: BinaryIO, path: str) -> Iterator[tuple[int, Any]]:
    """(number, row) of each row of a file, counted from 1. `path` gives its suffix. A row may be Unreadable.

    Raises the libraries' errors if the file is damaged, or has another format than its suffix says.
    """
    suffix, compression = suffixes(path)
    read = READERS.get(suffix)
    if read is None:
        raise ValueError(
            f"cannot tell its format from the suffix {suffix!r}. "
            f"Needed: one of {sorted(READERS)}, then one of {sorted(COMPRESSIONS)} if it is compressed"
        )
    return read(decompress(file, compression))


def suffixes(path: str) -> tuple[str, str | None]:
    """('jsonl', 'gzip') for prefs.jsonl.gz; no compression is None."""
    name = PurePosixPath(urlsplit(path).path if "://" in path else path)
    compression = COMPRESSIONS.get(name.suffix.removeprefix(".").lower())
    if compression:
        name = name.with_suffix("")
    return name.suffix.removeprefix(".").lower(), compression


def decompress(file: BinaryIO, compression: str | None) -> BinaryIO:
    """The decompressed file. Reading it raises an error if the file is truncated or other data follows."""
    if compression is None:
        return file
    return io.BufferedReader(_Streams(file, compression), BYTES_PER_READ)


class _Streams(io.RawIOBase):
    """Reads concatenated compressed streams.

    The libraries' own readers end without an error if the data after the first stream is not a stream (bz2, lzma), or
    if a stream is truncated (zstandard).
    """

    def __init__(self, file: BinaryIO, compression: str):
        self._file, self._compression, self._is_known = file, compression, False
        self._stream, self._ready = DECOMPRESSORS[compression](), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._stream.unused_data if self._stream.eof else b""
            data = data or self._file.read(BYTES_PER_READ)
            if not data:
                if not self._stream.eof:
                    raise EOFError("it breaks off within its compressed data")
                return 0
            if not self._is_known:
                self._check_beginning(data)
            if self._stream.eof:
                self._stream = DECOMPRESSORS[self._compression]()
            self._ready = memoryview(self._stream.decompress(data))
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def _check_beginning(self, data: bytes) -> None:
        magic = MAGIC[self._compression]
        is_skipped = self._compression == "zstd" and data[1:4] == b"\x2a\x4d\x18"  # a frame for other programs
        if not is_skipped and data[: len(magic)] != magic[: len(data)]:
            raise ValueError(f"it is no {self._compression} file, whatever its name says")
        self._is_known = True


def _read_separated(file: BinaryIO, dialect: str) -> Iterator[tuple[int, Any]]:
    """Rows of a CSV or TSV file. Cells are strings. The header is not a row."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default limit is 128 KiB
    lines = (line.decode() for line in utf8_lines(file))
    records = (record for record in csv.reader(lines, dialect, strict=True) if record)
    header = next(records, [])
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise ValueError(f"its header names these columns more than once: {twice}")
    for number, record in enumerate(records, start=1):
        if len(record) == len(header):
            yield number, dict(zip(header, record, strict=True))
        else:
            yield number, Unreadable(f"has {len(record)} cells; the header has {len(header)}")


def _read_parquet(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet as parquet

    from lora_dpo_jax.data.arrow_rows import read_table

    seekable = file if file.seekable() else io.BytesIO(file.read())
    opened = parquet.ParquetFile(seekable, page_checksum_verification=True, arrow_extensions_enabled=True)
    batches = opened.iter_batches(ROWS_PER_READ)
    return enumerate((row for batch in batches for row in read_table(batch)), start=1)


READERS: dict[str, Callable[[BinaryIO], Iterator[tuple[int, Any]]]] = {
    "jsonl": read_json_lines,
    "ndjson": read_json_lines,
    "json": read_json,
    "csv": lambda file: _read_separated(file, "excel"),
    "tsv": lambda file: _read_separated(file, "excel-tab"),
    "parquet": _read_parquet,
}
