"""The user's own modules that a config names: importing them registers types that its other settings may choose."""

import importlib
import os
import sys
from collections.abc import Sequence


def import_plugins(setting: str, names: Sequence[str]) -> None:
    """Imports modules from sys.path or the current folder. Raises ValueError that names the setting and the module."""
    here = os.getcwd()
    if names and here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # `python -m` has put it there already, a console script has not
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"{setting}: {name!r} is no module's name; write it as in `import my_package.losses`")
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:
            raise ValueError(f"{setting}: {name} {_reason(name, error, here)}") from error


def _reason(name: str, error: BaseException, here: str) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
        return f"cannot be imported: there is no module {error.name} on sys.path or in the current folder, {here}"
    text = " ".join(str(error).split())
    return f"cannot be imported: it raised {type(error).__name__}" + (f": {text}" if text else "")
