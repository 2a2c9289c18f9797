import json

import pytest
from hostile_values import how_it_ends

from lora_dpo_jax.json_objects import LARGEST, JsonObject, brief, read_json_object

NO_OBJECTS = {
    "empty": b"",
    "half": b'{"a": ',
    "a list": b"[]",
    "null": b"null",
    "no UTF-8": b'{"a": "\xff"}',
    "a byte-order mark": b"\xef\xbb\xbf{}",
    "too deep": b'{"a":' + b"[" * 100_000,
    "too long a number": b'{"a": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("content", NO_OBJECTS.values(), ids=NO_OBJECTS)
def test_a_file_that_holds_no_object_is_named_in_a_line(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    line = how_it_ends(lambda: read_json_object(path))
    assert line is not None and str(path) in line


def test_a_file_that_cannot_be_read_is_named_in_a_line(tmp_path):
    for path in (tmp_path / "missing.json", tmp_path):
        line = how_it_ends(lambda path=path: read_json_object(path))
        assert line is not None and str(path) in line


@pytest.mark.parametrize("value", [0, -1, LARGEST + 1, 10**400, 1.0, True, "1", None, [1], {}])
def test_a_whole_number_is_an_int_within_its_bounds(value):
    with pytest.raises(ValueError, match=r"x\.json: size=.* must be a whole number from 1 to 2147483647"):
        JsonObject({"size": value}, "x.json").whole("size")
    assert JsonObject({"size": 7}, "x.json").whole("size") == 7


@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-Infinity", "1e400", "true", '"1"', "[]", "null", "0", str(10**400)]
)
def test_a_number_is_finite(value):
    with pytest.raises(ValueError, match="eps=.* must be a number above 0"):
        JsonObject(json.loads(f'{{"eps": {value}}}'), "x.json").number("eps", above=0.0)


def test_null_is_taken_where_it_is_the_default():
    found = JsonObject({"a": None}, "x.json")
    assert found.whole("a", None) is None
    with pytest.raises(ValueError, match="x.json: a=None must be"):
        found.whole("a", 3)
    assert found.whole("b", 3) == 3
    with pytest.raises(ValueError, match="x.json: b is missing"):
        found.whole("b")


def test_an_object_within_an_object_says_where_it_stands():
    inner = JsonObject({"rope": {"factor": "x"}}, "x.json").object("rope")
    assert inner is not None
    with pytest.raises(ValueError, match="x.json: rope: factor='x' must be a number"):
        inner.number("factor")


def test_a_value_in_a_message_is_short_and_does_nothing_to_a_terminal():
    assert len(brief(["x" * 1000])) < 120
    assert "\x1b" not in brief("\x1b[31m")
    with pytest.raises(ValueError) as error:
        JsonObject({"\x1b[31m": 1}, "x.json").text("\x1b[31m")
    assert "\x1b" not in str(error.value)
