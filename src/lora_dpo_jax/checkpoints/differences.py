"""The settings that differ between a checkpoint and a run."""

import json
from collections.abc import Mapping
from typing import Any

SHOWN_DIFFERENCES = 12


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """A line for each setting, by its dotted name, that differs."""
    there, here = flat_settings(theirs), flat_settings(ours)
    return [
        f"{name}: {_shown(there, name)} in the checkpoint, {_shown(here, name)} in this run"
        for name in dict.fromkeys([*there, *here])
        if there.get(name) != here.get(name)
    ]


def flat_settings(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flat_settings(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def listed(lines: list[str]) -> str:
    """Indented lines. If there are many, the first ones and how many more there are."""
    more = len(lines) - SHOWN_DIFFERENCES
    return "\n".join(f"  {line}" for line in lines[:SHOWN_DIFFERENCES] + ([f"and {more} more"] if more > 0 else []))


def _shown(settings: Mapping[str, Any], name: str) -> str:
    text = json.dumps(settings[name]) if name in settings else "nothing"
    return text if len(text) <= 80 else text[:77] + "..."
