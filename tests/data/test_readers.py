import bz2
import csv
import gzip
import io
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from lora_dpo_jax.data.json_rows import Unreadable
from lora_dpo_jax.data.readers import COMPRESSIONS, READERS, decompress, read_rows, suffixes

COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress}
TEXT = {"prompt": 'of two\nlines, with "quotes"', "chosen": "é; a tab\t.", "rejected": "x" * 200_000}


def rows_of(content, path):
    return [row for _, row in read_rows(io.BytesIO(content), path)]


def separated(rows, dialect="excel", header=("prompt", "chosen", "rejected")):
    text = io.StringIO(newline="")
    writer = csv.writer(text, dialect)
    writer.writerows([header, *rows])
    return text.getvalue().encode()


def test_every_compression_has_a_test():
    assert COMPRESS.keys() == COMPRESSIONS.keys()


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("prefs.jsonl", ("jsonl", None)),
        ("a.b/prefs.CSV.GZ", ("csv", "gzip")),
        ("https://host/prefs.tsv.zst?token=x.json", ("tsv", "zstd")),
        ("prefs", ("", None)),
    ],
)
def test_suffixes_tell_format_and_compression(path, found):
    assert suffixes(path) == found


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_streams_are_read_one_after_another(suffix):
    content = COMPRESS[suffix](b"one ") + COMPRESS[suffix](b"") + COMPRESS[suffix](b"two")
    assert decompress(io.BytesIO(content), COMPRESSIONS[suffix]).read() == b"one two"


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_compressed_file_that_breaks_off_anywhere_is_an_error(suffix):
    """But for the end of its first stream, where nothing tells that a second should follow."""
    content = COMPRESS[suffix](bytes(range(256))) + COMPRESS[suffix](b"the end")
    first = len(COMPRESS[suffix](bytes(range(256))))
    for end in {*range(len(content))} - {first}:
        with pytest.raises((EOFError, OSError, lzma.LZMAError)):
            decompress(io.BytesIO(content[:end]), COMPRESSIONS[suffix]).read()
    assert decompress(io.BytesIO(content), COMPRESSIONS[suffix]).read() == bytes(range(256)) + b"the end"


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("place", ["beginning", "second stream", "end"])
def test_what_is_no_compressed_stream_is_an_error_wherever_it_stands(suffix, place):
    one = COMPRESS[suffix](b"rows")
    content = {"beginning": b"rows" + one, "second stream": one + b"\0" + one, "end": one + b"rows"}[place]
    with pytest.raises(Exception, match="(?i)invalid|incorrect|format|unknown frame|it is no"):
        decompress(io.BytesIO(content), COMPRESSIONS[suffix]).read()


@pytest.mark.parametrize(("suffix", "dialect"), [("csv", "excel"), ("tsv", "excel-tab"), ("csv", "unix")])
def test_separated_values_are_strings(suffix, dialect):
    [row] = rows_of(separated([TEXT.values()], dialect), f"x.{suffix}")
    assert row == TEXT
    assert rows_of(separated([("1", "true", "[]")]), "x.csv") == [{"prompt": "1", "chosen": "true", "rejected": "[]"}]


def test_an_empty_cell_is_an_empty_string():
    assert rows_of(separated([("", "a", "b")]), "x.csv") == [{"prompt": "", "chosen": "a", "rejected": "b"}]


def test_rows_of_separated_values_are_counted_without_header_and_blank_lines():
    content = separated([("two\nlines", "b", "c")]) + b"\r\n" + separated([("d", "e", "f"), ("g", "h")])[23:]
    first, second, (number, row) = read_rows(io.BytesIO(b"\xef\xbb\xbf" + content), "x.csv")
    assert first == (1, {"prompt": "two\nlines", "chosen": "b", "rejected": "c"})
    assert second == (2, {"prompt": "d", "chosen": "e", "rejected": "f"})
    assert (number, row) == (3, Unreadable("has 2 cells; the header has 3"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'prompt,chosen\na,"b\n', "unexpected end of data"),
        (b'prompt,chosen\na,"b" c\n', "expected after"),
        (b"chosen,chosen\na,b\n", r"its header names these columns more than once: \['chosen'\]"),
        ("prompt,chosen\na,b\n".encode("utf-16"), "its encoding is UTF-16"),
        ("prompt,chosen\na,é\n".encode("latin-1"), "'utf-8' codec"),
    ],
)
def test_separated_values_that_are_damaged_are_an_error(content, message):
    with pytest.raises((ValueError, csv.Error), match=message):
        rows_of(content, "x.csv")


def test_damaged_parquet_is_an_error():
    with pyarrow.BufferOutputStream() as sink:
        pyarrow.parquet.write_table(pyarrow.table({"chosen": ["a"] * 9}), sink)
        content = sink.getvalue().to_pybytes()
    for damaged in (content[:-9], content[9:], content[:20] + b"damaged!" + content[28:], b""):
        with pytest.raises((OSError, ValueError)):
            rows_of(damaged, "x.parquet")


@pytest.mark.parametrize("name", ["x.arrow", "x.txt", "x", "x.jsonl.zip", "x.jsonl.tar.gz"])
def test_a_suffix_that_tells_no_format_is_an_error(name):
    with pytest.raises(ValueError, match=r"cannot tell its format from the suffix .*'csv', .*'jsonl'.*'gz'"):
        rows_of(b"", name)


def test_every_format_is_read_from_its_name():
    for suffix in READERS.keys() - {"parquet", "csv", "tsv"}:
        assert rows_of(json.dumps({"a": 1}).encode(), f"x.{suffix}") == [{"a": 1}]
