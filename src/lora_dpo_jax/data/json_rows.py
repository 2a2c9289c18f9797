"""Rows in JSON: one a line, an array of them, or an object of columns."""

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SPACE = re.compile(r"[ \t\r\n]*")
# Strings are matched whole, so that brackets inside them do not count.
STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Unreadable:
    """A row that cannot be read, with the reason. The rows after it can be read."""

    why: str


def parse_json(text: str) -> Any:
    """The value of a JSON text; NaN and Infinity are numbers, as Python writes them.

    Raises ValueError if it is not JSON, or nested too deeply.
    """
    value, end = _value_at(text, _skip_space(text, 0))
    if isinstance(value, Unreadable):
        raise ValueError(value.why)
    if end < len(text):
        raise ValueError(f"is not JSON: there is more after its end at character {end}: {text[end : end + 20]!r}")
    return value


def read_json_lines(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """One row a line, numbered as an editor numbers lines. Blank lines are not rows."""
    for number, line in enumerate(utf8_lines(file), start=1):
        if line.strip():
            yield number, _line(line)


def read_json(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """An array of rows, an object of columns (equally long lists), an object over many lines, or JSON lines."""
    content = b"".join(utf8_lines(file))
    if content.lstrip().startswith(b"["):
        return _read_array(content.decode())
    try:
        value = parse_json(content.decode())
    except ValueError:
        return read_json_lines(io.BytesIO(content))
    return enumerate(_rows_of_columns(value) if _is_columns(value) else [value], start=1)


def utf8_lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines with their line ends, without byte-order marks. Files that were joined into one have a mark each.

    Raises ValueError if the file begins as one in UTF-16 or UTF-32.
    """
    for number, line in enumerate(file):
        if number == 0 and not (encoding := json.detect_encoding(line)).startswith("utf-8"):
            raise ValueError(f"its encoding is {encoding.upper()}; needed: UTF-8")
        yield line.removeprefix(BYTE_ORDER_MARK)


def _line(line: bytes) -> Any:
    try:
        return parse_json(line.decode().rstrip("\r\n"))  # else a truncated text seems to contain the line end
    except UnicodeDecodeError as error:
        return Unreadable(f"is not UTF-8: {error}")
    except ValueError as error:
        return Unreadable(_why(line, error))


def _why(line: bytes, error: ValueError) -> str:
    """The reason, without the decoder's line number, which is always 1."""
    fault = error.__cause__
    if not isinstance(fault, json.JSONDecodeError):
        return str(error)
    if fault.pos >= len(line.decode().rstrip()) or fault.msg.startswith("Unterminated string"):
        return f"is not JSON: it breaks off after {len(line.decode().rstrip()):,} characters"
    return f"is not JSON: {fault.msg} at character {fault.pos + 1}"


def _read_array(text: str) -> Iterator[tuple[int, Any]]:
    """Reads item by item, so that an error can name the last row before it."""
    at = _skip_space(text, text.index("[") + 1)
    number = 0
    while number or not text.startswith("]", at):
        row, at = _value_at(text, at)
        number += 1
        yield number, row
        if text.startswith("]", at):
            break
        if not text.startswith(",", at):
            raise ValueError(f"a row is followed by {text[at : at + 20]!r} at character {at}; needed: ',' or ']'")
        at = _skip_space(text, at + 1)
    if (end := _skip_space(text, at + 1)) < len(text):
        raise ValueError(f"there is more after the array's end: {text[end : end + 20]!r} at character {end}")


def _value_at(text: str, start: int) -> tuple[Any, int]:
    """(the value that begins at `start`, the position after it and the space that follows). May raise ValueError."""
    try:
        value, end = DECODER.raw_decode(text, start)
    except RecursionError:
        value, end = Unreadable("is nested too deeply"), _end_of_value(text, start)
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error
    return value, _skip_space(text, end)


def _end_of_value(text: str, start: int) -> int:
    """Where an array or object ends, by its brackets."""
    depth = 0
    for match in STRING_OR_BRACKET.finditer(text, start):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    return len(text)


def _skip_space(text: str, start: int) -> int:
    return SPACE.match(text, start).end()  # type: ignore  # it matches anything


def _is_columns(value: Any) -> bool:
    """Whether an object is a table. If all its lists hold only objects, it is one row with messages."""
    if not isinstance(value, dict) or not value or not all(isinstance(column, list) for column in value.values()):
        return False
    holds_messages = all(isinstance(item, dict) for column in value.values() for item in column)
    return len({len(column) for column in value.values()}) == 1 and not holds_messages


def _rows_of_columns(columns: dict[str, list]) -> Iterator[dict[str, Any]]:
    return (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
