"""Rows of Arrow tables, as JSON lines would hold them."""

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
from pyarrow import types

from lora_dpo_jax.data.json_rows import Unreadable, parse_json

Reading = Callable[[Any], Any] | None  # None: as it is


def read_table(table: pa.Table | pa.RecordBatch) -> Iterator[Any]:
    """Rows of Python values, with the columns that they have, and values of type arrow.json decoded.

    A struct has the keys of all objects of its column: null is a value, or a key that the object lacks.
    """
    columns = {column.name: _reading(column.type) for column in table.schema}
    for row in table.to_pylist():
        try:
            yield {name: _read(value, columns[name]) for name, value in row.items() if value is not None}
        except ValueError as error:
            yield Unreadable(f"has a JSON value that {error}")


def _reading(kind: pa.DataType) -> Reading:
    """How a value of this type, as `to_pylist` gives it and not None, becomes what JSON would hold."""
    if isinstance(kind, pa.JsonType):
        return parse_json
    if types.is_struct(kind):
        fields = {field.name: _reading(field.type) for field in kind}
        if "content" in fields and isinstance(kind.field("content").type, pa.JsonType):
            fields["content"] = _content
        if any(fields.values()):
            return lambda value: {key: _read(held, fields[key]) for key, held in value.items()}
    if types.is_map(kind):
        item = _reading(kind.item_type)
        return lambda pairs: {key: _read(held, item) for key, held in pairs}
    if _is_list(kind) and (item := _reading(kind.value_type)):
        return lambda values: [_read(value, item) for value in values]
    return None


def _read(value: Any, reading: Reading) -> Any:
    return value if value is None or reading is None else reading(value)


def _content(text: str) -> Any:
    """Text or parts. `datasets` puts no quotes around a text that is JSON by itself, such as 42."""
    value = parse_json(text)
    is_parts = isinstance(value, list) and all(isinstance(part, dict) for part in value)
    return value if is_parts or isinstance(value, str | None) else text


def _is_list(kind: pa.DataType) -> bool:
    return (
        types.is_list(kind)
        or types.is_large_list(kind)
        or types.is_fixed_size_list(kind)
        or types.is_list_view(kind)
        or types.is_large_list_view(kind)
    )
