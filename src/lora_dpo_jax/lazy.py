"""Names of a package that are imported when they are asked for.

So a module of the package brings only what it imports itself. A process that tokenizes, for example, needs no JAX,
which other modules of `data` do.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazily(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` for `package`. `homes`: module -> the names that it gives to the package, with spaces between."""
    modules = {name: module for module, names in homes.items() for name in names.split()}

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{modules[name]}"), name)
        setattr(importlib.import_module(package), name, value)  # so that it is asked for once
        return value

    return get
