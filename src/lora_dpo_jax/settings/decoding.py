"""From the plain values of YAML to the config of a command. Every setting is checked here by its type.

A value may be null only if its type allows it. Numbers must be finite in float32, and texts must fit into a file. A
wrong value raises ValueError with one line that names the setting by its path.
"""

import dataclasses
import difflib
import math
import re
import reprlib
import typing
from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any, Literal

import numpy as np
from draccus.utils import is_choice_type

from lora_dpo_jax.settings.other_names import unknown_setting
from lora_dpo_jax.settings.plugins import import_plugins
from lora_dpo_jax.settings.schema import default_of, hints_of, item_in, kind, members, section_in, settings_of

MOST = 2**63  # whole numbers are below it
DEEPEST = 50  # levels in a value that may be of any type


class SettingError(ValueError):
    """A setting that does not exist, or has a wrong value."""

    def __init__(self, path: str, text: str):
        super().__init__(f"{path}{text}")
        self.path = path


class MissingError(SettingError):
    """A required setting that is not given."""


class Number(float):
    """A number and its text, so that a text that looks like a number keeps its zeros."""

    def __new__(cls, text: str):
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str


def config_of(config_class: type, tree: Any) -> Any:
    """Raises ValueError with the name of a setting that is unknown, missing, of another type or out of range."""
    if not isinstance(tree, Mapping):
        raise ValueError(f"settings are a mapping from their names to values; found {described(tree)}")
    import_named_modules(config_class, tree)
    _check_agreement(config_class, tree)
    return _Decoder(config_class).section(config_class, tree, "")


def settings_of_modules(config_class: type) -> list[str]:
    """The settings that name modules to import first, because these may register types of the other settings."""
    return [field.name for field in dataclasses.fields(config_class) if field.metadata.get("names_modules")]


def import_named_modules(config_class: type, tree: Mapping[str, Any]) -> None:
    """Raises ValueError with the names of the setting and the module if a module cannot be imported."""
    for name in settings_of_modules(config_class):
        if name in tree:
            import_plugins(name, _Decoder(config_class).value(hints_of(config_class)[name], tree[name], name))
            settings_of.cache_clear()  # it lists the types of each choice


def described(value: Any) -> str:
    """The type of a value in words, without its content."""
    if value is None:
        return "nothing"
    kinds = {Mapping: "a mapping", list: "a list", bool: "true or false", str: "a text", int | float: "a number"}
    return next((name for kind, name in kinds.items() if isinstance(value, kind)), f"a {type(value).__name__}")


def shown(value: Any) -> str:
    """The value as YAML writes it, shortened."""
    if isinstance(value, Number):
        return value.text
    return {None: "null", True: "true", False: "false"}[value] if _is_constant(value) else _SHORT.repr(value)


def joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlevel = 3


def _is_constant(value: Any) -> bool:
    return value is None or isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class _Decoder:
    root: type  # the class whose settings are known, for advice

    def value(self, annotation: Any, value: Any, path: str, default: Any = MISSING) -> Any:
        """`default` is the setting's value if none is given. Settings of a section that are not given keep it."""
        if annotation is Any:
            return _plain(value, path, DEEPEST)
        if value is None:
            if type(None) in members(annotation):
                return None
            if is_choice_type(item_in(annotation, list)):
                return []
            more = "; leave it out to have the defaults" if section_in(annotation) else ""
            raise SettingError(path, f" is null; it must be {kind(annotation)}{more}")
        errors = []
        for member in members(annotation):
            if member is not type(None):
                try:
                    return self.one(member, value, path, default)
                except SettingError as error:
                    errors.append(error)
        deepest = max(errors, key=lambda error: len(error.path))
        if len(errors) == 1 or deepest.path != path:
            raise deepest
        raise SettingError(path, f"={shown(value)} must be {kind(annotation)}")

    def one(self, annotation: Any, value: Any, path: str, default: Any) -> Any:
        """Decodes a value of a type that is no union."""
        if is_choice_type(annotation):
            return self.choice(annotation, value, path, default)
        if dataclasses.is_dataclass(annotation):
            return self.section(typing.cast(type, annotation), value, path, default)
        if (item := item_in(annotation, list)) is not None:
            return self.list_of(item, value, path)
        if (item := item_in(annotation, dict)) is not None:
            return self.dict_of(item, value, path)
        if typing.get_origin(annotation) is Literal:
            return _choice_of(typing.get_args(annotation), value, path)
        return _SCALARS[annotation](value, path)

    def section(self, section: type, value: Any, path: str, default: Any = MISSING) -> Any:
        if not isinstance(value, Mapping):
            raise SettingError(path, f" is {described(value)}; it must be a mapping of settings{self._instead(path)}")
        hints = hints_of(section)
        for name in value:
            if name not in hints:
                where = joined(path, str(name))
                first, *below = str(name).split(".")
                if below and first in hints:
                    raise SettingError(where, f" is no setting of a file. Write {_nested(first, below)}")
                raise SettingError(*unknown_setting(self.root, where))
        fields = dataclasses.fields(section)
        arguments = {field.name: default_of(field) for field in fields}
        if type(default) is section:
            arguments = {name: getattr(default, name) for name in arguments}
        for field in fields:
            if field.name in value:
                where, before = joined(path, field.name), arguments[field.name]
                arguments[field.name] = made = self.value(hints[field.name], value[field.name], where, before)
                if isinstance(made, str) and not made.strip() and not field.metadata.get("may_be_empty"):
                    raise SettingError(where, f"={shown(made)} says nothing; leave it out, or give it a value")
        if lacking := sorted(getattr(section, "__abstractmethods__", ())):
            methods = " and ".join(lacking)
            raise SettingError(path, f" is a {section.__name__}, a class that does not define the method {methods}")
        if needed := [name for name, given in arguments.items() if given is MISSING]:
            raise self._missing([_innermost(hints[name], joined(path, name)) for name in needed])
        try:
            return section(**arguments)
        except SettingError:
            raise
        except (ValueError, OSError) as error:  # the section's own checks of its values
            raise SettingError("", _placed(str(error), path, hints)) from error

    def choice(self, base: Any, value: Any, path: str, default: Any = MISSING) -> Any:
        """Decodes a mapping with its `type`, or the type alone."""
        choices = base.get_known_choices()
        settings = {"type": value} if isinstance(value, str) else value
        if not isinstance(settings, Mapping):
            raise SettingError(path, f" is {described(value)}; it must be a mapping of settings")
        name = settings.get("type", base.default_choice_name())
        if "type" not in settings and default is not MISSING:
            name = base.get_choice_name(type(default))
        where = joined(path, "type")
        if name is None and "type" not in settings:
            raise SettingError(where, f" is missing; it must be one of {', '.join(choices)}")
        chosen = _choice_of(tuple(choices), name, where, "; a type of your own needs its module in plugins")
        others = {key: item for key, item in settings.items() if key != "type"}
        return self.section(choices[chosen], others, path, default)

    def list_of(self, item: Any, value: Any, path: str) -> list:
        if is_choice_type(item) and not isinstance(value, list):
            value = [value]  # a single item needs no brackets
        if not isinstance(value, list):
            raise SettingError(path, f"={shown(value)} must be {kind(list[item])}")
        return [self.value(item, entry, joined(path, str(number))) for number, entry in enumerate(value)]

    def dict_of(self, item: Any, value: Any, path: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise SettingError(path, f"={shown(value)} must be {kind(dict[str, item])}")
        made = {}
        for key, entry in value.items():
            name = _name(key, path)
            try:
                made[name] = self.value(item, entry, joined(path, str(key)))
            except MissingError as error:
                others = [str(other) for other in value if other != key]
                if difflib.get_close_matches(name, others, 1):
                    raise SettingError(
                        error.path, f" is missing; {path} has {', '.join(others)}: was one meant?"
                    ) from None
                raise
        return made

    def _instead(self, path: str) -> str:
        """The advice for a name that other programs use for something else."""
        return "" if path != "model" else ". The base model is initialize_from_hf"

    def _missing(self, needed: list[tuple[str, Any]]) -> MissingError:
        path, annotation = needed[0]
        advice = getattr(self.root, "if_missing", {}).get(path.partition(".")[0], "")
        if len(needed) > 1:
            return MissingError("", f"{' and '.join(path for path, _ in needed)} are missing. {advice}".strip(" ."))
        return MissingError(path, f" is missing; it must be {kind(annotation)}. {advice}".rstrip(" ."))


def _nested(name: str, below: list[str]) -> str:
    return f"{name}: {{{_nested(below[0], below[1:])}}}" if below else f"{name}: ..."


def _innermost(annotation: Any, path: str) -> tuple[str, Any]:
    """The first required setting in a section without a default."""
    section = section_in(annotation)
    if section is None or is_choice_type(section):
        return path, annotation
    needed = (field.name for field in dataclasses.fields(section) if default_of(field) is MISSING)
    name = next(needed, None)
    return (path, annotation) if name is None else _innermost(hints_of(section)[name], joined(path, name))


def _check_agreement(config_class: type, tree: Mapping[str, Any]) -> None:
    """Raises ValueError if two names of one setting have different values."""
    for names in getattr(config_class, "either", ()):
        first, second = (found_in(tree, name) for name in names)
        if None not in (first, second) and first != second:
            raise ValueError(f"{names[0]}={shown(first)} and {names[1]}={shown(second)} disagree; give one of them")


def found_in(tree: Any, path: str) -> Any:
    """The plain value of a setting; None if it is not there."""
    for name in path.split("."):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def _placed(message: str, path: str, names: Mapping[str, Any]) -> str:
    """The message of a section about its values, with the whole path of the setting that it names."""
    if not path or re.search(rf"(?<![\w.]){re.escape(path)}\b", message):
        return message
    first = (re.match(r"\w+", message) or [""])[0]
    if first in names:
        return f"{path}.{message}"
    last = path.rpartition(".")[2]
    return path + message.removeprefix(last) if first == last else f"{path}: {message}"


def _bool(value: Any, path: str) -> bool:
    if value in ("true", "false"):
        return value == "true"
    if not isinstance(value, bool):
        raise SettingError(path, f"={shown(value)} must be true or false")
    return value


def _int(value: Any, path: str) -> int:
    if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9][0-9_]{0,30}", value):
        value = int(value.replace("_", ""))
    if isinstance(value, bool) or not isinstance(value, int):
        raise SettingError(path, f"={shown(value)} must be a whole number")
    if not -MOST <= value < MOST:
        raise SettingError(path, f"={shown(value)} is beyond what 64 bits hold; it must be a smaller whole number")
    return value


def _float(value: Any, path: str) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else None
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None:
        raise SettingError(path, f"={shown(value)} must be a number")
    with np.errstate(all="ignore"):
        in_float32 = float(np.float32(number))
    if not math.isfinite(in_float32):
        raise SettingError(path, f"={shown(value)} must be a finite number, in float32 too")
    if number and not in_float32:
        raise SettingError(path, f"={shown(value)} is so small that it is 0 in float32; give 0, or a larger number")
    return float(number)


def _str(value: Any, path: str) -> str:
    if isinstance(value, Number):
        return value.text
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        quotes = "; put it in quotes" if isinstance(value, bool) else ""
        raise SettingError(path, f"={shown(value)} must be a text{quotes}")
    if "\0" in value or not _is_utf8(value):
        raise SettingError(path, f"={shown(value)} has characters that no file name and no UTF-8 text can hold")
    return value


_SCALARS = {bool: _bool, int: _int, float: _float, str: _str}


def _choice_of(choices: tuple, value: Any, path: str, advice: str = "") -> Any:
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return value
    near = difflib.get_close_matches(str(value), map(str, choices), 1)
    advice = f"; did you mean {near[0]}?" if near else advice
    raise SettingError(path, f"={shown(value)} must be one of {', '.join(map(str, choices))}{advice}")


def _name(key: Any, path: str) -> str:
    if isinstance(key, int) and not isinstance(key, bool):
        key = str(key)
    if not isinstance(key, str) or not key.strip() or not key.isprintable():
        raise SettingError(path, f" has the key {shown(key)}; its keys must be names")
    return key


def _plain(value: Any, path: str, deepest: int) -> Any:
    """A checked value of any of YAML's types."""
    if not deepest:
        raise SettingError(path, " is nested too deeply")
    if isinstance(value, Mapping):
        return {_name(key, path): _plain(item, joined(path, str(key)), deepest - 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, joined(path, str(number)), deepest - 1) for number, item in enumerate(value)]
    for scalar in (bool, int, float, str):
        if isinstance(value, scalar):
            return _SCALARS[scalar](value, path)
    if value is None:
        return None
    raise SettingError(path, f" is {described(value)}, which no setting can be")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
