import bz2
import csv
import gzip
import io
import json
import lzma
import os
import socket

import datasets
import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from lora_dpo_jax.data.sources import HubSource, RowError, SourceError, UrlSource, read_tables

ROWS = [
    {"prompt": "a", "chosen": [{"role": "assistant", "content": "é"}]},
    {"prompt": "b", "chosen": [{"role": "assistant", "content": "c", "tool_calls": [{"name": "f", "x": 1}]}]},
    {"chosen": [{"role": "assistant", "content": "d", "tool_calls": [{"name": "g"}]}]},
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


def rows_of(source, split="train"):
    return [row for _, _, row in read_tables(source.tables(split))]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder to make data sets in; `datasets` keeps to it and to itself."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    folder = tmp_path / "prefs"
    folder.mkdir()
    return folder


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


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_a_file_that_breaks_off_says_where(suffix, tmp_path):
    """In its second stream: the first may be all that a library takes."""
    lines = b"".join(b'{"a": "%s"}\n' % os.urandom(50_000).hex().encode() for _ in range(2))
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](LINES) + COMPRESS[suffix](lines)[:-60_000])
    with pytest.raises(SourceError, match=f"rows.jsonl{suffix}: cannot be read beyond row [34]: it breaks off"):
        rows_of(UrlSource([str(path)]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b"", "holds no rows"),
        ("rows.jsonl", b"\n\n", "holds no rows"),
        ("rows.json", b"[]", "holds no rows"),
        ("rows.csv", b"prompt,chosen,rejected\n", "holds no rows"),
        ("rows.jsonl.gz", b"", ": cannot be read: it breaks off"),
        ("rows.jsonl.gz", LINES, ": cannot be read: it is no gzip file, whatever its name says"),
        ("rows.jsonl.gz", b"{", ": cannot be read: it is no gzip file, whatever its name says"),
        ("rows.jsonl.gz", b"\x1f\x8b" + LINES, ": cannot be read: error: Error -3 while decompressing data"),
        ("rows.jsonl.zst", LINES, ": cannot be read: it is no zstd file, whatever its name says"),
        ("rows.jsonl.bz2", LINES, ": cannot be read: it is no bz2 file, whatever its name says"),
        ("rows.jsonl.xz", LINES, ": cannot be read: it is no xz file, whatever its name says"),
        ("rows.parquet", b"", ": cannot be read: Parquet file size is 0 bytes"),
        ("rows.parquet", LINES, ": cannot be read: Parquet magic bytes not found"),
        ("rows.json", b'[{"a": 1}, {"a"', ": cannot be read beyond row 1: is not JSON"),
        ("rows.jsonl", LINES.decode().encode("utf-16"), ": cannot be read: its encoding is UTF-16; needed: UTF-8"),
        ("rows.csv", b'a,b\n1,2\n"1,2\n', ": cannot be read beyond row 1: Error: unexpected end of data"),
        ("rows.txt", LINES, ": cannot be read: cannot tell its format from the suffix 'txt'"),
    ],
)
def test_a_file_without_readable_rows_is_named(name, content, message, tmp_path):
    (tmp_path / "whole.jsonl").write_bytes(LINES)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError) as raised:
        rows_of(UrlSource([str(tmp_path / "whole.jsonl"), str(tmp_path / name)]))
    assert str(raised.value).startswith(f"{tmp_path / name}{message if message[0] == ':' else ' ' + message}")
    assert len(str(raised.value).splitlines()) == 1


def test_urls_that_lead_nowhere_are_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "rows.jsonl").write_bytes(LINES)
    for url, message in [
        ("missing.jsonl", "missing.jsonl does not exist"),
        ("*.parquet", "no file matches"),
        ("empty", "is a folder; it is empty"),
        ("folder", r"is a folder; name its files, as in .*folder/\*.jsonl"),
    ]:
        with pytest.raises(SourceError, match=message):
            UrlSource([str(tmp_path / url)]).tables("train")


def test_a_url_with_a_typo_is_told_the_name_that_is_there(tmp_path):
    (tmp_path / "prefs").mkdir()
    (tmp_path / "prefs" / "train.jsonl").write_bytes(LINES)
    for url in ("prefs/trian.jsonl", "perfs/train.jsonl"):
        with pytest.raises(SourceError, match=rf"{url} does not exist; did you mean {tmp_path}/prefs/train\.jsonl\?$"):
            UrlSource([str(tmp_path / url)]).tables("train")


def test_a_frame_that_zstd_skips_may_come_first(tmp_path):
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(b"\x50\x2a\x4d\x18\x04\x00\x00\x00note" + COMPRESS[".zst"](LINES))
    assert rows_of(UrlSource([str(path)])) == ROWS


def test_a_store_that_cannot_be_opened_is_named():
    with pytest.raises(SourceError, match="^nowhere://rows.jsonl: cannot be opened: Protocol not known: nowhere$"):
        UrlSource(["nowhere://rows.jsonl"]).tables("train")


def test_a_file_named_twice_is_an_error(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "rows.jsonl")
    whole = str(tmp_path / "rows.jsonl")
    for url in (
        str(tmp_path / "*s.jsonl"),
        f"{tmp_path}/../{tmp_path.name}/rows.jsonl",
        str(tmp_path / "link.jsonl"),
    ):
        with pytest.raises(SourceError, match="^train_urls names these files more than once: .*jsonl"):
            UrlSource([whole, url]).tables("train")


def test_a_source_needs_urls():
    with pytest.raises(ValueError, match="needs train_urls, validation_urls or both"):
        UrlSource()


def test_a_data_set_needs_an_id():
    for id in ("", " "):
        with pytest.raises(ValueError, match="needs the id of a data set, or a local folder"):
            HubSource(id)


def test_data_sets_of_the_hub_give_the_same_rows(hub, no_network):
    (hub / "train.jsonl").write_bytes(LINES)
    (hub / "test.jsonl").write_bytes(LINES.splitlines()[0] + b"\n")
    source = HubSource(str(hub), validation_split="test")
    [train] = source.tables("train")
    assert list(train.rows()) == list(enumerate(ROWS, start=1))
    assert train.name == f"{hub}[train]"
    assert train.identity() == source.tables("train")[0].identity()
    assert rows_of(source, "validation") == ROWS[:1]
    assert rows_of(HubSource(str(hub), train_split="train[1:]+test")) == ROWS[1:] + ROWS[:1]


def test_a_data_set_without_validation_split_has_none():
    assert not HubSource("someone/prefs").has_split("validation")
    assert HubSource("someone/prefs").tables("validation") == []


def test_a_saved_data_set_gives_the_same_rows(hub, no_network):
    datasets.Dataset.from_list(ROWS).save_to_disk(hub / "one")
    [table] = HubSource(str(hub / "one")).tables("train")
    assert list(table.rows()) == list(enumerate(ROWS, start=1))
    assert (table.name, table.identity()) == (
        f"{hub / 'one'}[train]",
        HubSource(str(hub / "one")).tables("train")[0].identity(),
    )
    assert rows_of(HubSource(str(hub / "one"), train_split="train[:1]")) == ROWS[:1]


def test_saved_splits_give_their_rows(hub, no_network):
    whole = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(prefs=whole, held_out=whole.select([0])).save_to_disk(hub / "many")
    source = HubSource(str(hub / "many"), train_split="prefs[1:]+held_out", validation_split="held_out")
    assert rows_of(source) == ROWS[1:] + ROWS[:1]
    assert rows_of(source, "validation") == ROWS[:1]


def test_a_saved_data_set_keeps_the_name_of_its_split(hub):
    datasets.Dataset.from_list(ROWS, split="test").save_to_disk(hub / "one")
    assert rows_of(HubSource(str(hub / "one"), train_split="test")) == ROWS
    with pytest.raises(SourceError, match=r"one \(train_split: train\): .*Unknown split \"train\"..*\['test'\]"):
        HubSource(str(hub / "one")).tables("train")


def test_a_saved_folder_as_a_url_says_how_to_read_it(hub):
    datasets.Dataset.from_list(ROWS).save_to_disk(hub / "one")
    with pytest.raises(SourceError, match=r"one is a folder; .*save_to_disk.*source: \{type: hf, id: .*one\}$"):
        UrlSource([str(hub / "one")]).tables("train")


def test_a_saved_folder_takes_no_name_or_revision(hub):
    datasets.Dataset.from_list(ROWS).save_to_disk(hub / "one")
    for setting in ({"name": "default"}, {"revision": "main"}):
        with pytest.raises(SourceError, match="one was written by save_to_disk and has no name or revision"):
            HubSource(str(hub / "one"), **setting).tables("train")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_split": "trian"}, r'prefs \(train_split: trian\): cannot be loaded: Unknown split "trian".*train'),
        ({"train_split": "train[:x]"}, r"prefs \(train_split: train\[:x\]\): cannot be loaded: "),
        ({"name": "gone"}, "prefs .*: cannot be loaded: BuilderConfig 'gone' not found"),
        ({"id": "someone/gone"}, r"^someone/gone \(train_split: train\): cannot be loaded: .*someone/gone"),
        ({"id": "FILE"}, r"prefs.train.jsonl is a file; read it with source: \{type: url, train_urls: \[.*jsonl\]\}$"),
        ({"id": "EMPTY"}, "empty .*: cannot be loaded: .*doesn't contain any data files"),
    ],
)
def test_a_data_set_that_cannot_be_had_is_named(settings, message, hub, no_network):
    (hub / "train.jsonl").write_bytes(LINES)
    (hub.parent / "empty").mkdir()
    paths = {"EMPTY": str(hub.parent / "empty"), "FILE": str(hub / "train.jsonl")}
    settings = {"id": str(hub)} | {key: paths.get(value, value) for key, value in settings.items()}
    with pytest.raises(SourceError, match=message) as raised:
        HubSource(**settings).tables("train")
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.jsonl", LINES + b"not json\n", r"train.jsonl, row 4: is not JSON: Expecting value"),
        ("train.jsonl", b"", r"train.jsonl holds no rows"),
        ("train.parquet", b"PAR1", r"train.parquet: cannot be read: Parquet"),
        (
            "train.jsonl.zst",
            zstandard.compress(LINES) + zstandard.compress(LINES)[:-4],
            "train.jsonl.zst: .*breaks off",
        ),
        ("train.jsonl.bz2", bz2.compress(LINES) + b"?" + bz2.compress(LINES), "train.jsonl.bz2: .*Invalid data"),
    ],
)
def test_the_damaged_file_of_a_data_set_is_named(name, content, message, hub, no_network):
    (hub / name).write_bytes(content)
    with pytest.raises(SourceError, match=f"^{hub}/{message}") as raised:
        HubSource(str(hub)).tables("train")
    assert len(str(raised.value).splitlines()) == 1


def test_a_damaged_saved_data_set_is_named(hub):
    datasets.Dataset.from_list(ROWS).save_to_disk(hub / "one")
    [data] = (hub / "one").glob("*.arrow")
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(SourceError, match=r"one \(train_split: train\): cannot be loaded: "):
        HubSource(str(hub / "one")).tables("train")


def call(**arguments):
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}}


def varied_row(n):
    """Tools, nulls that are data, parts, and several turns: each row has some of them."""
    parts = [{"type": "text", "text": f"Rain, {n}?"}]
    question = {"role": "user", "content": [parts, f"Rain, {n}?", str(n)][n % 3]}
    calls = [call(town="Bern", days=None), call(lake={"depth": n, "name": None}), call()]
    asked = [question, {"role": "assistant", "content": None, "tool_calls": [calls[n % 3]]}]
    answered = [*asked, {"role": "tool", "name": "weather", "content": '{"rain": null}'}]
    schema = {"town": {"type": "string"}, "days": {"type": ["integer", "null"], "default": None}}
    function = {"name": "weather", "parameters": {"type": "object", "properties": schema if n % 2 else {}}}
    return {
        "prompt": answered if n % 4 else [question],
        "chosen": [{"role": "assistant", "content": f"It rains, {n}."}],
        "rejected": [{"role": "assistant", "content": "No."}, {"role": "user", "content": "Sure?"}, question],
        "tools": [{"type": "function", "function": function}],
    } | ({"system": "Be brief."} if n % 5 < 4 else {})


def meant(row):
    """What a message does not have may be null or lacking."""
    columns = ("prompt", "chosen", "rejected")
    messages = {
        column: [{k: v for k, v in item.items() if v is not None} for item in row[column]] for column in columns
    }
    return row | messages


def test_every_source_gives_the_same_rows(hub, no_network):
    rows = [varied_row(n) for n in range(20)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (hub / "data").mkdir()
    (hub / "data" / "train.jsonl").write_text(lines)
    (hub / "array.json").write_text(json.dumps(rows, indent=1))
    (hub / "columns.json").write_text(
        json.dumps({column: [row.get(column) for row in rows] for column in varied_row(1)})
    )
    read = datasets.load_dataset(str(hub / "data"), split="train")
    made = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    read.to_parquet(hub / "read.parquet")
    made.to_parquet(hub / "made.parquet")
    read.save_to_disk(hub / "saved")
    datasets.DatasetDict(train=made).save_to_disk(hub / "splits")
    text = io.StringIO()
    writer = csv.DictWriter(text, [*varied_row(1)])
    writer.writeheader()
    cell = lambda value: value if isinstance(value, str) else json.dumps(value)  # noqa: E731
    writer.writerows({column: cell(value) for column, value in row.items()} for row in rows)
    (hub / "cells.csv").write_text(text.getvalue())

    files = ["data/train.jsonl", "array.json", "columns.json", "read.parquet", "made.parquet"]
    sources = {name: UrlSource([str(hub / name)]) for name in files}
    sources |= {name: HubSource(str(hub / name)) for name in ("data", "saved", "splits")}
    for name, source in sources.items():
        found = [{column: value for column, value in row.items() if value is not None} for row in rows_of(source)]
        assert list(map(meant, found)) == list(map(meant, rows)), name
    cells = [
        {k: v if k == "system" else json.loads(v) for k, v in row.items() if v}
        for row in rows_of(UrlSource([str(hub / "cells.csv")]))
    ]
    assert cells == rows
