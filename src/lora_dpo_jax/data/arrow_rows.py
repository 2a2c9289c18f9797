"""Rows of Arrow tables, as JSON lines would hold them."""

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
from pyarrow import types

from lora_dpo_jax.data.json_rows import Unreadable, parse_json

Reading = Callable[[Any], Any] | None  # None: as it is


class Whole(dict):
    """An object of which each null is a value."""


def read_table(table: pa.Table | pa.RecordBatch, *, exact: bool = False) -> Iterator[Any]:
    """Rows of Python values, with the columns that they have, and values of type arrow.json decoded.

    An Arrow struct has the keys of all objects, so a null in it is a value, or a key that the object lacks. `exact`: it
    is a value, as where `datasets` has read JSON, because it keeps objects whose keys differ as arrow.json. A table of
    `datasets` with such columns is exact too. Otherwise nulls are left out, unless only keys are null that never have a
    value. A null argument of a call stays too if another call of the function in this table has a value for it.
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
    """Makes arguments `Whole` whose nulls are of arguments that the called function has elsewhere."""
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
    """How a value of this type, as `to_pylist` gives it and not None, becomes what JSON would hold."""
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
    """Text or parts. `datasets` puts no quotes around a text that is JSON by itself, such as 42."""
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
