import io
import json
import math

import pytest

from lora_dpo_jax.data.json_rows import Unreadable, parse_json, read_json, read_json_lines

DEEP = "[" * 100_000 + "]" * 100_000
MARK = b"\xef\xbb\xbf"


def lines(content):
    return list(read_json_lines(io.BytesIO(content)))


def whole(content):
    return list(read_json(io.BytesIO(content)))


def test_lines_are_numbered_as_an_editor_numbers_them():
    assert lines(b'{"a": 1}\n\n  \r\n{"a": 4}\r\n5') == [(1, {"a": 1}), (4, {"a": 4}), (5, 5)]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (b"not json", "is not JSON: Expecting value at character 1"),
        (b'{"a" 1}', "is not JSON: Expecting ':' delimiter at character 6"),
        (b'{"a": 1', "is not JSON: it breaks off after 7 characters"),
        (b'{"a": "x', "is not JSON: it breaks off after 8 characters"),
        (b'{"a": 1} {"a": 2}', "is not JSON: there is more after its end at character 9"),
        (b'{"a": "\xff"}', "is not UTF-8: 'utf-8' codec"),
        (b"9" * 5000, "is not JSON: Exceeds the limit"),
        (DEEP.encode(), "is nested too deeply"),
        (b'{"a": ' + b'{"b": ' * 100_000 + b"1" + b"}" * 100_001, "is nested too deeply"),
    ],
)
@pytest.mark.parametrize("read", [lines, whole])
def test_a_line_that_cannot_be_read_costs_no_other(bad, why, read):
    first, (number, row), last = read(b'{"a": 1}\n' + bad + b'\n{"a": 3}\n')
    assert (first, last) == ((1, {"a": 1}), (3, {"a": 3}))
    assert number == 2 and isinstance(row, Unreadable) and row.why.startswith(why)


def test_a_null_is_a_row():
    assert lines(b"null\n") == [(1, None)]
    assert whole(b"[null, 1]") == [(1, None), (2, 1)]


def test_numbers_that_only_python_writes_are_numbers():
    assert parse_json(json.dumps(math.inf)) == math.inf and math.isnan(parse_json("NaN"))


@pytest.mark.parametrize("read", [lines, whole])
def test_byte_order_marks_are_no_part_of_rows(read):
    assert read(MARK + b'{"a": 1}\n' + MARK + b'{"a": 2}\n') == [(1, {"a": 1}), (2, {"a": 2})]


def test_an_array_may_begin_with_a_byte_order_mark():
    assert whole(MARK + b'\n[{"a": 1}\n, {"a": "]"}]\n') == [(1, {"a": 1}), (2, {"a": "]"})]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize("read", [lines, whole])
def test_another_encoding_is_named(encoding, read):
    with pytest.raises(ValueError, match=f"its encoding is {encoding.upper()}; needed: UTF-8"):
        read('{"a": "é"}\n'.encode(encoding))


def test_an_item_nested_too_deeply_costs_no_other():
    deep = '{"text": "\\"]}", "deep": ' + DEEP + "}"
    first, (number, row), last = whole(f'[1, {deep},\n {{"a": 3}}]'.encode())
    assert (first, number, last) == ((1, 1), 2, (3, {"a": 3}))
    assert row == Unreadable("is nested too deeply")


@pytest.mark.parametrize(
    ("content", "kept", "message"),
    [
        (b"[1, 2", 2, "a row is followed by '' at character 5; needed: ',' or ']'"),
        (b"[1, 2 3]", 2, "a row is followed by '3]'"),
        (b"[1, 2,]", 2, "is not JSON"),
        (b'[1, {"a": }]', 1, "is not JSON"),
        (b"[1]\n[2]", 1, "there is more after the array's end: '\\[2\\]'"),
        (b"[" + DEEP[:-1].encode(), 1, "a row is followed by ''"),
    ],
)
def test_a_damaged_array_gives_the_rows_before_the_damage(content, kept, message):
    numbers = []
    with pytest.raises(ValueError, match=message):
        for number, _ in read_json(io.BytesIO(content)):
            numbers.append(number)
    assert numbers == list(range(1, kept + 1))


@pytest.mark.parametrize("content", [b"[]", b" [ ]\n", b"", b"\n\n"])
def test_a_file_without_rows_has_none(content):
    assert whole(content) == []


def test_an_object_of_equally_long_lists_is_a_table():
    columns = {"chosen": ["a", None], "rejected": [[{"role": "assistant", "content": "c"}], "d"]}
    rows = [(1, {"chosen": "a", "rejected": columns["rejected"][0]}), (2, {"chosen": None, "rejected": "d"})]
    assert whole(json.dumps(columns).encode()) == whole(json.dumps(columns, indent=1).encode()) == rows


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]},
        {"chosen": ["a", "b"], "rejected": ["a"]},
        {"chosen": ["a"], "rejected": "a"},
        {},
    ],
)
def test_any_other_object_is_a_row(row):
    assert whole(json.dumps(row, indent=1).encode()) == [(1, row)]
