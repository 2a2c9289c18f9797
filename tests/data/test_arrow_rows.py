"""What is in an Arrow table and was JSON before is JSON again."""

import json

import pyarrow as pa
import pytest

from lora_dpo_jax.data.arrow_rows import read_table
from lora_dpo_jax.data.json_rows import Unreadable

JSON = pa.json_()


def jsons(values):
    """As `datasets` stores them: no quotes around a text that is JSON by itself, null for None."""
    return pa.array([None if value is None else json.dumps(value) for value in values], pa.string()).cast(JSON)


def rows(exact=False, **columns):
    return list(read_table(pa.table(columns), exact=exact))


def call(name="f", **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


VALUES = [{"a": None, "b": [1, None, {"c": "é/"}]}, [], "text", 12345678901234567890123, 0.12345678901234567]


def test_json_columns_are_decoded():
    assert rows(chosen=jsons(VALUES)) == [{"chosen": value} for value in VALUES]


def test_json_is_decoded_inside_structs_lists_and_maps():
    held = jsons(VALUES)
    struct = pa.StructArray.from_arrays([held], ["arguments"])
    lists = [
        pa.ListArray.from_arrays([0, 2, 5], held),
        pa.LargeListArray.from_arrays([0, 2, 5], held),
        pa.ListArray.from_arrays([0, 2, 5], struct),
    ]
    assert rows(x=struct) == [{"x": {"arguments": value}} for value in VALUES]
    assert rows(x=lists[0]) == rows(x=lists[1]) == [{"x": VALUES[:2]}, {"x": VALUES[2:]}]
    assert rows(x=lists[2])[0] == {"x": [{"arguments": value} for value in VALUES[:2]]}
    maps = pa.MapArray.from_arrays([0, 1], ["key"], held[:1])
    assert rows(x=maps) == [{"x": {"key": VALUES[0]}}]


def test_json_that_is_none_costs_no_other_row():
    column = pa.array(['{"a": 1}', "{", "[" * 100_000 + "]" * 100_000], pa.string()).cast(JSON)
    first, second, third = rows(chosen=column)
    assert first == {"chosen": {"a": 1}}
    assert isinstance(second, Unreadable) and second.why.startswith("has a JSON value that is not JSON: Expecting")
    assert third == Unreadable("has a JSON value that is nested too deeply")


def test_a_column_without_a_value_is_none_of_the_row():
    assert rows(exact=True, tools=["[]", None], n=[None, 1]) == [{"tools": "[]"}, {"n": 1}]


def test_the_keys_of_other_objects_are_left_out():
    messages = [{"role": "user", "content": "a"}, {"role": "tool", "name": "f", "content": "b"}]
    calls = [call(town="Bern"), call("g", days=3, near={"km": 1})]
    column = pa.array([[{**messages[0]}, messages[1]], [{"role": "assistant", "tool_calls": calls}]])
    assert rows(chosen=column) == [{"chosen": messages}, {"chosen": [{"role": "assistant", "tool_calls": calls}]}]


def test_a_null_argument_stays_where_another_call_of_the_function_has_a_value_for_it():
    calls = [call(town="Bern", days=None), call(town="Bern", days=2), call("g", lake="Thun")]
    assert rows(x=pa.array(calls)) == [{"x": value} for value in calls]


def test_nulls_of_a_list_stay():
    schema = [{"type": "string", "enum": ["a", None]}]
    assert rows(tools=pa.array([schema])) == [{"tools": schema}]


def test_a_null_of_a_key_that_never_has_a_value_stays_where_the_object_lacks_nothing_else():
    schemas = [
        {"town": {"type": "string"}, "days": {"type": "integer", "default": None}},
        {"lake": {"type": "string"}},
    ]
    assert rows(tools=pa.array(schemas)) == [{"tools": schema} for schema in schemas]


def test_a_null_stays_where_objects_with_other_keys_would_be_json():
    calls = [call(town="Bern", days=None), call("g", town=None, days=2)]
    column = pa.array(calls)
    assert rows(exact=True, x=column) == [{"x": value} for value in calls]
    table = pa.table({"x": column, "other": jsons([1, 2])})
    whole = [{"x": value, "other": n} for n, value in enumerate(calls, 1)]
    lacking = [{"x": call(town="Bern"), "other": 1}, {"x": call("g", days=2), "other": 2}]
    assert list(read_table(table)) == lacking  # other writers have their own reasons for JSON
    assert list(read_table(table.replace_schema_metadata({"huggingface": "{}"}))) == whole


@pytest.mark.parametrize("text", ["42", "true", '{"a": 1}', "[1, 2]", "[[]]", "-0.0", '"a" is "b"'])
def test_content_that_happens_to_be_json_is_text_beside_content_of_parts(text):
    """`datasets` leaves a text that is JSON by itself as it is; others it writes with quotes."""
    parts = [{"type": "text", "text": "a"}]
    try:
        json.loads(text)
        stored = text
    except ValueError:
        stored = json.dumps(text)
    contents = pa.array([json.dumps(parts), stored, None], pa.string()).cast(JSON)
    column = pa.StructArray.from_arrays([pa.array(["user"] * 3), contents], ["role", "content"])
    assert [row["x"].get("content") for row in rows(x=column)] == [parts, text, None]


@pytest.mark.parametrize("text", ["42", '{"a": 1}', "plain"])
def test_datasets_stores_content_as_the_test_above_says(text):
    import datasets

    given = [{"m": {"content": text}}, {"m": {"content": [{"type": "text", "text": "a"}]}}]
    table = datasets.Dataset.from_list(given, on_mixed_types="use_json").data.table
    assert list(read_table(table)) == given
