"""Settings that take one of a few values. The values are stated once: in the setting's annotation, a Literal."""

import typing
from collections.abc import Collection
from typing import Any, Literal

from lora_dpo_jax.settings.schema import hints_of, members


def check_choices(config: Any, section: str = "") -> None:
    """Raises ValueError for a field of the dataclass `config` whose value is not in its Literal.

    For scripts, which may give any value. Values of files and commands are checked when they are decoded. `section` is
    the path of `config` among the settings, such as "trainer".
    """
    for name, annotation in hints_of(type(config)).items():
        if any(typing.get_origin(member) is Literal for member in members(annotation)):
            check_choice(f"{section}.{name}" if section else name, getattr(config, name), _values(annotation))


def check_choice(setting: str, value: Any, choices: Collection[Any]) -> None:
    """Raises ValueError that names the setting, unless `value` is one of `choices`."""
    if value not in tuple(choices):
        names = ", ".join(str(choice) for choice in choices if choice is not None)
        raise ValueError(f"{setting}={value!r} must be one of {names}{', or null' if None in choices else ''}")


def _values(annotation: Any) -> tuple[Any, ...]:
    """The values of a Literal, or of a Literal that may be null. None means null."""
    values = (typing.get_args(member) if member is not type(None) else (None,) for member in members(annotation))
    return tuple(value for some in values for value in some)
