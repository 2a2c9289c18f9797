"""The text of --help: each setting once, with its default and its comment in the config class."""

import dataclasses
import json
import shlex
import shutil
import textwrap
import typing
from collections.abc import Sequence
from typing import Any, Literal

import draccus

from lora_dpo_jax.settings.launched import launched_as
from lora_dpo_jax.settings.schema import NUMBER, Setting, item_in, members, section_in, settings_of

WIDEST = 120
MOST = 8  # names in a list that is shown whole
INDENT = " " * 8


def help_text(config_class: type) -> str:
    """The text, as wide as the terminal, but at most WIDEST columns."""
    width = min(WIDEST, shutil.get_terminal_size().columns)
    lines = [
        f"usage: {shlex.join(launched_as())} [--config_path FILE.yaml] [--SETTING VALUE ...]",
        "",
        *_wrapped(_about(config_class), width, ""),
        "",
        *_wrapped(
            "Settings are in the file, and those of the command line change it: --lora.r 16, or "
            "--lora '{r: 16, alpha: 32}'. NAME is a name of your choice. docs/configuration.md says more.",
            width,
            "",
        ),
    ]
    section = None
    for setting in settings_of(config_class):
        if setting.section != section:
            section = setting.section
            lines += ["", f"{section}:" if section else "settings:"]
        lines += _setting(setting, width)
    return "\n".join(lines)


def _setting(setting: Setting, width: int) -> list[str]:
    default = "must be given" if setting.default is dataclasses.MISSING else f"default {_default(setting)}"
    types = f"; of type {_listed(setting.types)}" if setting.types else ""
    about = [] if not setting.comment else _wrapped(setting.comment, width, INDENT)
    option = setting.path if NUMBER in setting.path.split(".") else f"--{setting.path}"  # a list is given as a whole
    return [f"  {option} {_short(setting.annotation)}  ({default}{types})", *about]


def _about(config_class: type) -> str:
    text = " ".join((config_class.__doc__ or "").split())
    is_generated = text.startswith(f"{config_class.__name__}(")  # by dataclasses, of the fields
    return "" if is_generated else text


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _default(setting: Setting) -> str:
    encode: Any = draccus.encode
    return json.dumps(encode(setting.default, setting.annotation), ensure_ascii=False)


def _short(annotation: Any) -> str:
    """The allowed values, in a word."""
    return "|".join(_one(member) for member in members(annotation) if member is not type(None))


def _listed(names: Sequence[str]) -> str:
    if len(names) <= MOST:
        return " and ".join(names)
    return f"{names[0]}, ..."


def _one(annotation: Any) -> str:
    names = {str: "TEXT", int: "INT", float: "NUMBER", bool: "true|false", Any: "VALUE"}
    if annotation in names:
        return names[annotation]
    if typing.get_origin(annotation) is Literal:
        values = [str(value) for value in typing.get_args(annotation)]
        return "|".join(values if len(values) <= MOST else [*values[:3], "..."])  # the comment has all
    if (item := item_in(annotation, list)) is not None:
        return f"[{_short(item)}, ...]"
    if (item := item_in(annotation, dict)) is not None:
        return f"{{NAME: {_short(item)}, ...}}"
    return "{...}" if section_in(annotation) else "VALUE"
