import bz2
import gzip
import json
import lzma
import os
import socket
import subprocess
import sys

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from lora_dpo_jax.data.sources import HubSource, RowError, UrlSource

ROWS = [
    {"prompt": "a", "chosen": [{"role": "assistant", "content": "é"}]},
    {"prompt": "b", "chosen": [{"role": "assistant", "content": "c", "tool_calls": [{"name": "f", "x": 1}]}]},
    {"chosen": [{"role": "assistant", "content": "d", "tool_calls": [{"name": "g"}]}]},
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


def rows_of(source, split="train"):
    return [row for table in source.tables(split) for _, row in table.rows()]


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "array.json", "rows.parquet"])
def test_every_format_and_compression_gives_the_same_rows(name, compression, tmp_path, no_network):
    content = LINES
    if name == "array.json":
        content = json.dumps(ROWS, indent=2).encode()
    elif name == "rows.parquet":
        with pyarrow.BufferOutputStream() as sink:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
            content = sink.getvalue().to_pybytes()
    path = tmp_path / (name + compression)
    path.write_bytes(COMPRESS[compression](content))
    assert rows_of(UrlSource([str(path)])) == ROWS


def test_a_file_of_several_zstd_frames_is_read_to_its_end(tmp_path):
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(zstandard.compress(LINES) + zstandard.compress(LINES))
    assert rows_of(UrlSource([str(path)])) == ROWS * 2


def test_globs_are_read_in_the_order_of_names(tmp_path, no_network):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"from": name}) + "\n")
    (tmp_path / "notes.txt").write_text("not a row")
    source = UrlSource([str(tmp_path / "*.jsonl")])
    assert [row["from"] for row in rows_of(source)] == ["a", "b", "c"]
    assert [table.name for table in source.tables("train")] == [str(tmp_path / f"{name}.jsonl") for name in "abc"]


def test_urls_of_fsspec_are_read_and_known_again(tmp_path):
    with fsspec.open("memory://bucket/prefs/rows.jsonl.gz", "wb") as file:
        file.write(gzip.compress(LINES))
    source = UrlSource(validation_urls=["memory://bucket/prefs/*.jsonl.gz"])
    [table] = source.tables("validation")
    assert rows_of(source, "validation") == ROWS
    assert table.name == "memory:///bucket/prefs/rows.jsonl.gz"
    assert table.identity() == source.tables("validation")[0].identity()
    assert not source.has_split("train") and source.tables("train") == []


def test_local_files_are_known_by_their_content(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES)
    [table] = UrlSource([str(path)]).tables("train")
    before = table.identity()
    path.write_bytes(LINES)
    assert table.identity() == before
    path.write_bytes(LINES.replace(b'"a"', b'"z"'))
    assert table.identity() != before


def test_rows_are_numbered_as_an_editor_numbers_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 3}\nnot json\n')
    [table] = UrlSource([str(path)]).tables("train")
    numbered = list(table.rows())
    assert numbered[:2] == [(1, {"a": 1}), (3, {"a": 3})]
    number, error = numbered[2]
    assert number == 4 and isinstance(error, RowError) and error.reason == "malformed"
    assert str(error).startswith(f"{path}, row 4: is not JSON")


def test_a_file_that_breaks_off_says_where(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(LINES * 1000)[:-20])
    with pytest.raises(ValueError, match=r"rows.jsonl.gz: cannot be read beyond row \d+"):
        rows_of(UrlSource([str(path)]))


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("missing.jsonl", FileNotFoundError, "missing.jsonl does not exist"),
        ("*.parquet", FileNotFoundError, "no file matches"),
        ("folder", IsADirectoryError, r"is a folder; name its files, as in .*folder/\*.jsonl"),
    ],
)
def test_urls_that_lead_nowhere_are_errors(url, error, message, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(error, match=message):
        UrlSource([str(tmp_path / url)]).tables("train")


def test_a_suffix_that_tells_no_format_is_an_error(tmp_path):
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(b"a,b\n"))
    with pytest.raises(ValueError, match=r"rows.csv.gz: cannot tell its format from the suffix 'csv'.*jsonl.*gz"):
        rows_of(UrlSource([str(tmp_path / "rows.csv.gz")]))


def test_a_file_named_twice_is_an_error(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    with pytest.raises(ValueError, match="train_urls names these files more than once"):
        UrlSource([str(tmp_path / "*.jsonl"), str(tmp_path / "rows.*")]).tables("train")


def test_a_source_needs_urls():
    with pytest.raises(ValueError, match="needs train_urls, validation_urls or both"):
        UrlSource()


def test_data_sets_of_the_hub_give_the_same_rows(tmp_path):
    """In an interpreter of its own: `datasets` reads its offline switch once, when it is imported."""
    folder = tmp_path / "prefs"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(LINES)
    (folder / "test.jsonl").write_bytes(LINES.splitlines()[0] + b"\n")
    code = f"""
import json
from lora_dpo_jax.data.sources import HubSource, UrlSource
source = HubSource({str(folder)!r}, validation_split="test")
[train], [validation] = source.tables("train"), source.tables("validation")
print(json.dumps([[list(table.rows()), table.name, table.identity() == again.identity()]
      for table, again in ((train, source.tables("train")[0]), (validation, source.tables("validation")[0]))]))
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (rows, name, same), (validation, _, _) = json.loads(done.stdout)
    assert [row for _, row in rows] == ROWS and [number for number, _ in rows] == [1, 2, 3]
    assert (name, same) == (f"{folder}[train]", True)
    assert [row for _, row in validation] == ROWS[:1]


def test_a_data_set_without_validation_split_has_none():
    assert not HubSource("someone/prefs").has_split("validation")
    assert HubSource("someone/prefs").tables("validation") == []
