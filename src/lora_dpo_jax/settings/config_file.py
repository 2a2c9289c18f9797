"""Reads a config file: YAML of plain values. No value is lost silently, and no error quotes the text.

A key that stands twice, a tag such as !include or !!python/object and a file that is no mapping are errors. An error
gives the position, never the text: the path may lead to the wrong file, which may hold secrets.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from yaml.parser import ParserError

from lora_dpo_jax.places import spelled_alike
from lora_dpo_jax.settings.decoding import Number, described, joined

MOST_BYTES = 1 << 20  # of a config file
MOST_VALUES = 100_000  # of a text, with those that its aliases repeat
PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null")}
MERGE = "tag:yaml.org,2002:merge"


class YamlError(ValueError):
    """A text that is no YAML, or not of plain values. The message gives the position, and quotes no text."""


def read_config_file(path: str) -> Mapping[str, Any]:
    """The settings in the file. Raises ValueError with the file's name."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        why = f"{getattr(error, 'strerror', None) or error}{spelled_alike(path)}"
        raise ValueError(f"config_path={path!r} cannot be read: {why}") from error
    if len(content) > MOST_BYTES:
        raise ValueError(
            f"config_path={path!r} is larger than {MOST_BYTES >> 20} MiB; it must be a YAML file of settings"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"config_path={path!r} is no UTF-8 text; it must be a YAML file of settings") from error
    try:
        tree = read_yaml(text)
    except YamlError as error:
        raise ValueError(f"{path}{error}") from error
    if not isinstance(tree, Mapping):
        holds = "is empty" if tree is None else f"holds {described(tree)}"
        raise ValueError(
            f"config_path={path!r} {holds}; it must map settings to values, as config/quickstart.yaml does"
        )
    return tree


def read_yaml(text: str) -> Any:
    """The value of a text: mappings, lists, texts, numbers, booleans and None. Raises YamlError."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, "", {}, set())
        return loader.construct_document(node)
    except YamlError:
        raise
    except yaml.MarkedYAMLError as error:
        raise YamlError(_why(error, text)) from error
    except yaml.reader.ReaderError as error:
        raise YamlError(f", character {error.position + 1}: is no YAML: a character that no text can hold") from error
    except RecursionError as error:
        raise YamlError(" is nested too deeply") from error
    except (ValueError, KeyError) as error:
        raise YamlError(" has a value that is not what its tag says") from error


class _Loader(yaml.SafeLoader):
    """YAML's plain values. Numbers are those of YAML 1.2, so that 010, 12:30 and 1_000 stay texts."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012  (as PyYAML declares it)


for _kind, _pattern, _first in (
    ("bool", r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    ("int", r"0|-?[1-9][0-9]{0,60}", "-0123456789"),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def _number(loader: yaml.SafeLoader, node: Any) -> Number:
    text = loader.construct_scalar(node)
    return Number(text.lower().replace(".inf", "inf").replace(".nan", "nan") if "n" in text.lower() else text)


def _whole_number(loader: yaml.SafeLoader, node: Any) -> int:
    return int(loader.construct_scalar(node))


_Loader.add_constructor("tag:yaml.org,2002:float", _number)
_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def _check(node: yaml.Node, path: str, sizes: dict[yaml.Node, int], above: set[yaml.Node]) -> int:
    """Raises YamlError unless all values are plain. Returns the number of values."""
    if node in sizes:
        return sizes[node]
    if node in above:
        raise YamlError(f"{_at(node.start_mark)}: {path} contains itself")
    if node.tag not in PLAIN_TAGS:
        instead = "write all settings in one file" if "include" in node.tag else "write the value without it"
        raise YamlError(f"{_at(node.start_mark)}: {path or 'the file'} has a YAML tag, which is not taken; {instead}")
    above.add(node)
    size = 1
    if isinstance(node, yaml.SequenceNode):
        size += sum(_check(item, joined(path, str(at)), sizes, above) for at, item in enumerate(node.value))
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise YamlError(f"{_at(key.start_mark)}: {path or 'the file'} has a key that is no name")
            where = joined(path, key.value if key.value.isprintable() else repr(key.value))
            if key.value in lines and key.tag != MERGE:
                here = key.start_mark.line + 1
                raise YamlError(
                    f", line {here}: {where} stands twice, in line {lines[key.value]} too; leave one of them out"
                )
            lines[key.value] = key.start_mark.line + 1
            size += _check(value, path if key.tag == MERGE else where, sizes, above)
    above.discard(node)
    if size > MOST_VALUES:
        raise YamlError(f"{_at(node.start_mark)}: {path or 'the file'} has more than {MOST_VALUES:,} values")
    sizes[node] = size
    return size


def _at(mark: yaml.Mark | None) -> str:
    return "" if mark is None else f", {_place(mark)}"


def _place(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


def _why(error: yaml.MarkedYAMLError, text: str) -> str:
    """The position and the reason of an error; for an unclosed bracket or quote, the position where it opens."""
    where = error.problem_mark or error.context_mark
    opened = _unclosed(text, len(text) if where is None else where.index)
    if where is not None and where.index >= len(text):  # whose line may not exist
        if error.context == "while scanning a quoted scalar" and error.context_mark is not None:
            return f" ends within the quotes that open in {_place(error.context_mark)}"
        if opened:
            return f" ends before the {opened} is closed"
        where = None if error.context_mark is None or error.context_mark.index >= len(text) else error.context_mark
    unclosed = f"; the {opened} is not closed" if opened and isinstance(error, ParserError) else ""
    return f"{_at(where)} is no YAML: {_problem(error)}{unclosed}"


def _unclosed(text: str, end: int) -> str:
    """The innermost list or mapping in brackets that is open at the position `end` of the text; "" if none is."""
    opened = []
    try:
        for token in yaml.scan(text, _Loader):
            if token.start_mark.index >= end:
                break
            if isinstance(token, yaml.FlowSequenceStartToken | yaml.FlowMappingStartToken):
                opened.append(token)
            elif isinstance(token, yaml.FlowSequenceEndToken | yaml.FlowMappingEndToken) and opened:
                opened.pop()
    except yaml.YAMLError:
        pass
    if not opened:
        return ""
    kind = "list" if isinstance(opened[-1], yaml.FlowSequenceStartToken) else "mapping"
    return f"{kind} that opens in {_place(opened[-1].start_mark)}"


def _problem(error: yaml.MarkedYAMLError) -> str:
    """PyYAML's own words, without names and characters of the text."""
    problem = error.problem or error.context or "it cannot be parsed"
    for word in ("alias", "anchor", "tag"):
        if word in problem:
            return f"a wrong {word}"
    return "a character that cannot stand there" if "character" in problem else problem
