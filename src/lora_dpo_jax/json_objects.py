"""Reads JSON files that others wrote, and checks the types of their values.

Every error is one line that names the file, the key, the value found and the value needed.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REQUIRED: Any = object()  # as the default: the key must be there
LARGEST = 2**31 - 1  # sizes and ids are int32
LONGEST = 100  # characters of a value in a message


@dataclass(frozen=True)
class JsonObject:
    """A JSON object and its place. Each getter returns the value of a key, or `default` if the key is absent.

    null is allowed if `default` is None. Any other value of the wrong type raises ValueError.
    """

    values: Mapping[str, Any]
    where: str  # a file, and the keys that lead to the object within it

    def whole(self, key: str, default: Any = REQUIRED, *, least: int = 1, most: int = LARGEST) -> Any:
        """An int from `least` to `most`."""
        return self.taken(key, default, lambda x: is_whole(x, least, most), f"a whole number from {least} to {most}")

    def number(self, key: str, default: Any = REQUIRED, *, least: float = -math.inf, above: float = -math.inf) -> Any:
        """A finite int or float."""
        bounds = "" if least == -math.inf else f" of at least {least:g}"
        bounds += "" if above == -math.inf else f" above {above:g}"
        return self.taken(key, default, lambda x: is_number(x) and x >= least and x > above, f"a number{bounds}")

    def flag(self, key: str, default: Any = REQUIRED) -> Any:
        return self.taken(key, default, lambda x: isinstance(x, bool), "true or false")

    def text(self, key: str, default: Any = REQUIRED) -> Any:
        return self.taken(key, default, lambda x: isinstance(x, str), "text")

    def object(self, key: str, default: Any = None) -> "JsonObject | None":
        found = self.taken(key, default, lambda x: isinstance(x, dict), "an object")
        return found if found is None else JsonObject(found, f"{self.where}: {key}")

    def taken(self, key: str, default: Any, is_right: Callable[[Any], bool], needed: str) -> Any:
        """The value of `key`, if it `is_right`. `needed` describes such a value in messages."""
        if key not in self.values:
            if default is REQUIRED:
                raise ValueError(f"{self.where}: {key} is missing; needed: {needed}")
            return default
        value = self.values[key]
        if value is None and default is None:
            return None
        if not is_right(value):
            raise self.error(key, f"must be {needed}")
        return value

    def error(self, key: str, problem: str) -> ValueError:
        return ValueError(
            f"{self.where}: {key if key.isidentifier() else brief(key)}={brief(self.values[key])} {problem}"
        )


def read_json_object(path: Path) -> JsonObject:
    """The object that a file holds. Raises ValueError or OSError with the file's name."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing") from error
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, and holds {brief(values)}")
    return JsonObject(values, str(path))


def is_whole(value: Any, least: int, most: int = LARGEST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: Any) -> bool:
    """Whether it is a number that is finite as a float too: Python's ints have no largest value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1.7e308


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def brief(value: Any) -> str:
    """The value for a message: without control characters, and cut if it is long."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
