"""Names of a package are those of its modules, and no module brings more than it imports."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ["lora_dpo_jax", "lora_dpo_jax.data", "lora_dpo_jax.models"]


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_gives_what_type_checkers_see(name):
    package = importlib.import_module(name)
    assert package.__file__ is not None
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    (for_checkers,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: getattr(importlib.import_module(str(node.module)), alias.name)
        for node in for_checkers.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(seen) == sorted(package.__all__)
    assert all(getattr(package, name) is value for name, value in seen.items())
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'nothing'"):
        package.nothing  # noqa: B018


@pytest.mark.parametrize(
    "module, absent",
    [
        ("lora_dpo_jax", ["jax", "transformers", "numpy"]),
        # A process that tokenizes is started for each core.
        ("lora_dpo_jax.data.workers", ["jax", "haliax", "datasets", "pyarrow"]),
        # What --help and a mistake in the settings need.
        ("lora_dpo_jax.main.__main__", ["transformers", "datasets", "orbax"]),
    ],
)
def test_a_module_does_not_import_what_it_does_not_need(module, absent):
    code = f"import sys, {module}; print(*(name for name in {absent} if sys.modules.get(name)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
