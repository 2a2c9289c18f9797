"""Rows of Arrow tables, as JSON lines would hold them."""

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
from pyarrow import types

from lora_dpo_jax.data.json_rows import Unreadable, parse_json

Reading = Callable[[Any], Any] | None  # None: the value stays as it is


class Whole(dict):
    """An object whose nulls are all values, never missing keys."""


def read_table(table: pa.Table | pa.RecordBatch, *, exact: bool = False) -> Iterator[Any]:
    """Rows of Python values, without columns that are null. Values of type arrow.json are decoded.

    An Arrow struct has the keys of all objects, so a null in it is a value, or a key that the object lacks. With
    `exact`, each null is a value: when `datasets` reads JSON, it stores objects whose keys differ as arrow.json. So a
    table of `datasets` with such columns is exact too. Otherwise nulls are left out, unless all null keys of an object
    are keys that never have a value. A null argument of a function call also stays if another call of this function in
    the table has a value for it.
    """
    by_datasets = b"huggingface" in (table.schema.metadata or {})
    exact = exact or (by_datasets and any(_has_json(column.type) for column in table.schema))
    columns = {column.name: _reading(column.type, exact) for column in table.schema}
    rows = table.to_pylist()
    if not exact:
        _mark_arguments(rows)
    for row in rows:
        try:
            yield {name: _read(value, columns[name]) for name, value in row.items() if value is not None}
        except ValueError as error:
            yield Unreadable(f"has a JSON value that {error}")


def _mark_arguments(rows: list[dict[str, Any]]) -> None:
    """Makes a call's arguments `Whole` if one of them is null, but has a value in another call of the function."""
    calls = list(_calls(rows))
    taken: dict[str, set[str]] = {}
    for call in calls:
        valued = (key for key, value in call["arguments"].items() if value is not None)
        taken.setdefault(call["name"], set()).update(valued)
    for call in calls:
        arguments, known = call["arguments"], taken[call["name"]]
        if any(value is None and key in known for key, value in arguments.items()):
            call["arguments"] = Whole((key, value) for key, value in arguments.items() if key in known)


def _calls(value: Any) -> Iterator[dict[str, Any]]:
    """Every call of a function in `value`."""
    if isinstance(value, dict):
        if isinstance(value.get("name"), str) and isinstance(value.get("arguments"), dict):
            yield value
        value = [*value.values()]
    if isinstance(value, list):
        for item in value:
            yield from _calls(item)


def _reading(kind: pa.DataType, exact: bool) -> Reading:
    """The function from a value of this type, as `to_pylist` returns it and not None, to its value in JSON."""
    if isinstance(kind, pa.JsonType):
        return parse_json
    if types.is_struct(kind):
        return _struct_reading(kind, exact)
    if types.is_map(kind):
        item = _reading(kind.item_type, exact)
        return lambda pairs: {key: _read(held, item) for key, held in pairs}
    if _is_list(kind) and (item := _reading(kind.value_type, exact)):
        return lambda values: [_read(value, item) for value in values]
    return None


def _struct_reading(kind: pa.StructType, exact: bool) -> Reading:
    fields = {field.name: _reading(field.type, exact) for field in kind}
    if "content" in fields and isinstance(kind.field("content").type, pa.JsonType):
        fields["content"] = _content
    ever_filled = [field.name for field in kind if not types.is_null(field.type)]

    def read(value: dict[str, Any]) -> dict[str, Any]:
        is_whole = exact or isinstance(value, Whole)
        if not is_whole and any(value[key] is None for key in ever_filled):
            value = {key: held for key, held in value.items() if held is not None}
        return {key: _read(held, fields[key]) for key, held in value.items()}

    return read


def _read(value: Any, reading: Reading) -> Any:
    return value if value is None or reading is None else reading(value)


def _content(text: str) -> Any:
    """A message's text or parts. `datasets` puts no quotes around a text that is itself JSON, such as 42."""
    value = parse_json(text)
    is_parts = isinstance(value, list) and all(isinstance(part, dict) for part in value)
    return value if is_parts or isinstance(value, str | None) else text


def _has_json(kind: pa.DataType) -> bool:
    if types.is_struct(kind):
        return any(_has_json(field.type) for field in kind)
    if types.is_map(kind):
        return _has_json(kind.item_type)
    return _has_json(kind.value_type) if _is_list(kind) else isinstance(kind, pa.JsonType)


def _is_list(kind: pa.DataType) -> bool:
    return (
        types.is_list(kind)
        or types.is_large_list(kind)
        or types.is_fixed_size_list(kind)
        or types.is_list_view(kind)
        or types.is_large_list_view(kind)
    )
