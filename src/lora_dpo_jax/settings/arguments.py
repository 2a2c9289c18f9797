"""The command line: a config file, and settings that change it.

    --config_path run.yaml --trainer.num_train_steps 100 --data.components.prefs.source.train_urls '[b.jsonl]'

A value is YAML, but a setting that takes text takes it literally. A mapping for a section, such as `lora`, changes the
settings that it names. A mapping for a setting that is a mapping itself, such as `data.components`, replaces it.
"""

import contextlib
import itertools
import logging
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_origin

import draccus
import draccus.argparsing
from draccus.utils import is_choice_type

from lora_dpo_jax.redaction import log_to_stderr
from lora_dpo_jax.settings.config_file import YamlError, read_config_file, read_yaml
from lora_dpo_jax.settings.decoding import (
    SettingError,
    config_of,
    found_in,
    import_named_modules,
    joined,
    settings_of_modules,
    shown,
)
from lora_dpo_jax.settings.help import help_text
from lora_dpo_jax.settings.other_names import setting_at, unknown_setting
from lora_dpo_jax.settings.schema import hints_of, item_in, kind, members, section_in

T = TypeVar("T")
CONFIG_PATH = "config_path"
NULLS = ("null", "Null", "NULL", "~")


def parse_arguments(config_class: type[T]) -> T:
    """The configuration from `--config_path` and the command line, and a log on stderr."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    log_to_stderr(logging.INFO)
    for noisy in ("jax", "httpx", "httpx2", "datasets", "fsspec", "absl"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return parse(config_class)


def parse(
    config_class: type[T],
    args: Sequence[str] | None = None,
    *,
    config_path: str | os.PathLike | None = None,
    values: Mapping[str, Any] = {},
) -> T:
    """The configuration from words of a command line, by default this process's; `--help` prints and exits.

    `values` are plain values, by setting, that override all others. Raises ValueError with one line that names the
    setting, for everything that can be checked without data and weights.
    """
    words = list(sys.argv[1:] if args is None else args)
    if asked := {"-h", "--help"} & set(words):
        with contextlib.suppress(ValueError, OSError):  # what plugins register is listed too, if the rest can be read
            parse(config_class, [word for word in words if word not in asked], config_path=config_path)
        print(help_text(config_class))
        raise SystemExit(0)
    changes = list(_given(config_class, words))
    files = [text for path, text in changes if path == CONFIG_PATH]
    if len(files) > 1:
        raise ValueError(f"--config_path stands {len(files)} times; a run has one config file")
    file = files[0] if files else config_path
    tree = {} if file is None else dict(read_config_file(os.fspath(file)))
    first = settings_of_modules(config_class)
    for path, text in changes:
        if path in first:
            _change(config_class, tree, path, text)
    import_named_modules(config_class, tree)
    for path, text in changes:
        if path not in (CONFIG_PATH, *first):
            _change(config_class, tree, path, text)
    return config_of(config_class, {**tree, **values})


def _given(config_class: type, words: list[str]) -> Iterator[tuple[str, str | None]]:
    """(path, value) of `--path value` and `--path=value`; None if the value is missing."""
    at, path = 0, ""
    while at < len(words):
        word, at = words[at], at + 1
        before, (path, equals, text) = path, word[2:].partition("=")
        if not word.startswith("--") or not path:
            advice = _list_advice(config_class, before, words[: at - 1], words[at - 1 :]) or _advice(word)
            raise ValueError(f"{word!r} is no setting. {advice}")
        if not equals:
            follows = at < len(words) and not words[at].startswith("--")
            text, at = (words[at], at + 1) if follows else (None, at)
        yield path, text


def _list_advice(config_class: type, path: str, before: list[str], rest: list[str]) -> str | None:
    """How to write a list, if it was given as several words. `path` is the last setting in `before`."""
    setting = setting_at(config_class, path)
    if not path or setting is None or item_in(setting.annotation, list) is None:
        return None
    words = [before[-1].removeprefix(f"--{path}="), *itertools.takewhile(lambda word: not word.startswith("--"), rest)]
    items = ", ".join(word.strip("[], ") for word in words)
    return f"{path} takes a list: write --{path} {shlex.quote(f'[{items}]')}"


def _advice(word: str) -> str:
    if re.fullmatch(r"[\w.-]+\.(ya?ml|json)", Path(word).name):
        return f"A config file is given with --{CONFIG_PATH} {word}"
    if re.match(r"[a-z][\w.]*=", word):
        return f"Write --{word}"
    return "Settings are given as --SETTING VALUE; --help lists them. Put a value with spaces in quotes"


def _change(config_class: type, tree: dict[str, Any], path: str, text: str | None) -> None:
    """Sets the setting in the tree. Copies the parts of the tree that it changes, because aliases may share them."""
    node, annotation, rest, done = tree, config_class, path, ""
    while True:
        step = _step(annotation, node, rest)
        if step is None:
            raise _not_there(config_class, path, done if item_in(annotation, list) else "")
        name, annotation = step
        done = joined(done, name)
        if rest == name:
            break
        rest = rest[len(name) + 1 :]
        below = node.get(name)
        if isinstance(below, str) and is_choice_type(section_in(annotation)):
            below = {"type": below}
        node[name] = dict(below) if isinstance(below, Mapping) else {}
        node = node[name]
    if text is None:
        raise SettingError(f"--{path}", f" needs a value: {kind(annotation)}")
    value = _value(annotation, text, path)
    node[name] = _merged(annotation, node.get(name), value)
    for pair in getattr(config_class, "either", ()):
        given = {one for one in pair if one == path or _contains(path, value, one)}
        for other in set(pair) - given if given else ():
            _remove(tree, other.split("."))


def _contains(path: str, value: Any, other: str) -> bool:
    """Whether `value`, given for the section `path`, contains the setting `other`."""
    return other.startswith(f"{path}.") and found_in(value, other.removeprefix(f"{path}.")) is not None


def _step(annotation: Any, node: Mapping[str, Any], path: str) -> tuple[str, Any] | None:
    """(the first name of a path below a setting, the type of the named setting); None if there is no such setting."""
    first = path.partition(".")[0]
    section = section_in(annotation)
    if section is not None:
        types = _types(section, node)
        return (first, types[first]) if first in types else None
    item = item_in(annotation, dict)
    if item is None:
        return None
    named = [key for key in node if isinstance(key, str) and f"{path}.".startswith(f"{key}.")]
    return max(named, key=len, default=first), item


def _types(section: Any, node: Mapping[str, Any]) -> dict[str, Any]:
    """The types of the settings in a section; for a choice, those of its present type."""
    if not is_choice_type(section):
        return hints_of(section)
    choices = section.get_known_choices()
    chosen = choices.get(str(node.get("type", section.default_choice_name())))
    types: dict[str, Any] = {"type": Literal[tuple(choices)]}
    for choice in choices.values() if chosen is None else [chosen]:
        types |= hints_of(choice)
    return types


def _not_there(config_class: type, path: str, list_above: str) -> SettingError:
    if list_above:
        return SettingError(f"--{path}", f" is a part of a list; give the whole of it with --{list_above} '[...]'")
    where, text = unknown_setting(config_class, path)
    return SettingError(f"--{where}", text)


def _remove(tree: dict[str, Any], names: list[str]) -> None:
    node = tree
    for name in names[:-1]:
        if not isinstance(node.get(name), Mapping):
            return
        node[name] = node = dict(node[name])
    node.pop(names[-1], None)


def _value(annotation: Any, text: str, path: str) -> Any:
    """The plain value of a word. A setting of text takes it literally, unless it is quoted or a fitting list."""
    is_quoted = text.startswith(("'", '"'))
    takes_text = any(member is str or get_origin(member) is Literal for member in members(annotation))
    if text in NULLS:
        return None
    if takes_text and not is_quoted and item_in(annotation, list) is None:
        return text
    if not takes_text and not text.strip():
        raise SettingError(f"--{path}", " needs a value; the one given is empty")
    try:
        value = read_yaml(text)
    except YamlError as error:
        if takes_text:
            return text
        raise SettingError(path, f"={shown(text)}{error}") from error
    fits = isinstance(value, list) or is_quoted and isinstance(value, str)
    return value if fits or not takes_text else text


def _merged(annotation: Any, old: Any, new: Any) -> Any:
    """A mapping for a section changes the settings that it names, unless it names a type. Other values replace."""
    section = section_in(annotation)
    if section is None or not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return new
    if is_choice_type(section) and "type" in new:
        return new
    types = _types(section, old)
    return {**old, **{name: _merged(types.get(name), old.get(name), value) for name, value in new.items()}}


_draccus_parse = draccus.argparsing.parse


def _parse_for_draccus(
    config_class: type, config_path: Any = None, args: Any = None, *rest: Any, **options: Any
) -> Any:
    """draccus.parse, which reads the settings of this package's commands as the commands do."""
    if config_class.__module__.startswith("lora_dpo_jax."):
        return parse(config_class, args, config_path=config_path)
    return _draccus_parse(config_class, config_path, args, *rest, **options)


# A script that calls draccus.parse(TrainConfig), as scripts around Levanter do, gets the checks of this module too.
draccus.parse = draccus.argparsing.parse = _parse_for_draccus
