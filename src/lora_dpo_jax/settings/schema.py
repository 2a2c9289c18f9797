"""The settings of a command as its config class declares them: names, types, defaults and comments."""

import ast
import dataclasses
import functools
import io
import linecache
import sys
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from typing import Any, Literal, Union

from draccus.utils import is_choice_type

NAME = "NAME"  # in a path: a name of the user's choice
NUMBER = "N"  # in a path: a place in a list


@dataclass(frozen=True)
class Setting:
    """One setting that a file or the command line can give."""

    path: str  # trainer.mesh.axes, data.components.NAME.source.train_urls, trainer.checkpointer.keep.N.every
    annotation: Any
    default: Any  # dataclasses.MISSING if a value must be given
    comment: str
    types: tuple[str, ...] = ()  # of a choice: the types that have this setting, if not all have it

    @property
    def section(self) -> str:
        return self.path.rpartition(".")[0]

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]


@functools.cache
def settings_of(config_class: type) -> tuple[Setting, ...]:
    """Each setting once: first those of a section, then those of the sections in it."""
    return tuple(_of_section(config_class, "", MISSING))


@functools.cache
def hints_of(section: type) -> dict[str, Any]:
    """The types of the fields of a dataclass, by name."""
    hints = typing.get_type_hints(section)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


def members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    is_union = typing.get_origin(annotation) in (Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def is_optional(annotation: Any) -> bool:
    return annotation is Any or type(None) in members(annotation)


def section_in(annotation: Any) -> type | None:
    """The class of a setting that holds settings of its own: a dataclass, or the base of a choice of them."""
    for member in members(annotation):
        if is_choice_type(member) or dataclasses.is_dataclass(member):
            return typing.cast(type, member)
    return None


def item_in(annotation: Any, container: type) -> Any:
    """The type of the items of a list, or of the values of a dict; None if it takes no such container."""
    for member in members(annotation):
        if member is container or typing.get_origin(member) is container:
            return (typing.get_args(member) or (Any,))[-1]
    return None


def default_of(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def kind(annotation: Any) -> str:
    """The values that a setting takes, for a sentence: "a list of texts or a text, or null"."""
    named = [_kind(member) for member in members(annotation) if member is not type(None)]
    return " or ".join(named) + (", or null" if type(None) in members(annotation) else "")


@functools.cache
def comments_of(section: type) -> dict[str, str]:
    """The comment of each field in the source: the comment above it, then the one beside it."""
    found: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if dataclasses.is_dataclass(base):
            found |= _comments(base)
    return found


_KINDS = {
    str: ("a text", "texts"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    Any: ("any value", "any values"),
}


def _kind(annotation: Any, *, plural: bool = False) -> str:
    if annotation in _KINDS:
        return _KINDS[annotation][plural]
    if typing.get_origin(annotation) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(annotation)))}"
    if (item := item_in(annotation, list)) is not None:
        return f"a list of {_plural(item)}"
    if (item := item_in(annotation, dict)) is not None:
        return f"a mapping from names to {_plural(item)}"
    return "mappings of settings" if plural else "a mapping of settings"


def _plural(annotation: Any) -> str:
    return " or ".join(_kind(member, plural=True) for member in members(annotation) if member is not type(None))


def _of_section(section: type, prefix: str, defaults: Any) -> Iterator[Setting]:
    """`defaults` is an instance, or MISSING if the fields' own defaults count."""
    if is_choice_type(section):
        yield from _of_choice(section, prefix, defaults)
        return
    inner = []
    for field in dataclasses.fields(section):
        annotation, path = hints_of(section)[field.name], prefix + field.name
        default = default_of(field) if defaults is MISSING else getattr(defaults, field.name)
        if section_in(annotation) is None:
            yield Setting(path, annotation, default, comments_of(section).get(field.name, ""))
        inner.append((annotation, path, default))
    for annotation, path, default in inner:
        if (below := section_in(annotation)) is not None:
            yield from _of_section(below, f"{path}.", default)
        for container, key in ((dict, NAME), (list, NUMBER)):
            item = item_in(annotation, container)
            # A choice may hold a list of its own kind, as a mix of losses does. Its items have the same settings.
            if item is not None and (below := section_in(item)) is not None and not issubclass(section, below):
                yield from _of_section(below, f"{path}.{key}.", MISSING)


def _of_choice(base: Any, prefix: str, default: Any) -> Iterator[Setting]:
    choices: dict[str, type] = base.get_known_choices()
    chosen = base.default_choice_name() or MISSING
    if default is not MISSING:
        chosen = base.get_choice_name(type(default))
    what = "; ".join(f"{name}: {_first_line(choice)}" for name, choice in choices.items())
    yield Setting(f"{prefix}type", Literal[tuple(choices)], chosen, what)
    found: dict[str, list[tuple[str, Setting]]] = {}
    for name, choice in choices.items():
        for setting in _of_section(choice, prefix, default if type(default) is choice else MISSING):
            found.setdefault(setting.path, []).append((name, setting))
    for alike in found.values():
        names = tuple(name for name, _ in alike) if len(alike) < len(choices) else ()
        yield dataclasses.replace(alike[0][1], types=names)


def _first_line(section: type) -> str:
    return (section.__doc__ or "").strip().partition("\n")[0].rstrip(".")


@functools.cache
def _comments(section: type) -> dict[str, str]:
    source = _source(section)
    if source is None:
        return {}
    beside, alone = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith("# noqa"):
            where = alone if token.line.lstrip().startswith("#") else beside
            where[token.start[0]] = token.string.lstrip("# ")
    found = {}
    for node in typing.cast(ast.ClassDef, ast.parse(source).body[0]).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while first - 1 in alone:
                first -= 1
            lines = [alone[line] for line in range(first, node.lineno)]
            lines += [beside[line] for line in range(node.lineno, (node.end_lineno or 0) + 1) if line in beside]
            found[node.target.id] = " ".join(lines)
    return found


def _source(section: type) -> str | None:
    """The text of a class; None for a program without its sources, or a class of a notebook or a text.

    As inspect.getsource, which parses the whole file for each class.
    """
    module = sys.modules.get(section.__module__)
    file = getattr(module, "__file__", None)
    if file is None:
        return None
    text = "".join(linecache.getlines(file, vars(module)))
    node = _classes(text).get(section.__qualname__)
    if node is None:
        return None
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return textwrap.dedent("".join(text.splitlines(keepends=True)[first - 1 : node.end_lineno]))


@functools.cache
def _classes(text: str) -> dict[str, ast.ClassDef]:
    """The classes of a module, by qualified name; of several with one name the first."""
    found: dict[str, ast.ClassDef] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                found.setdefault(prefix + child.name, child)
                visit(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, f"{prefix}{child.name}.<locals>.")
            elif isinstance(child, ast.stmt):
                visit(child, prefix)

    visit(ast.parse(text), "")
    return found
