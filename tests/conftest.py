"""Tests run on eight CPU devices, compiled fast rather than well. All of it must be said before JAX is imported.

With `--without-torch`, those that need no torch, for an environment that lacks it.
"""

import ast
import functools
import os
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling takes most of the tests' time; level 0 halves it and computes the same.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"

TESTS = Path(__file__).parent
BUILT_ON_TORCH = {"torch", "peft", "trl", "bitsandbytes"}
FIXTURES_WITH_TORCH = {"trl_pairs"}  # of tests/data/conftest.py


@functools.cache
def needs_torch(path: Path) -> bool:
    """Whether a file imports torch or what is built on it, at its top or within, itself or through a file of tests/."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.split(".")[0])
    shared = [TESTS / f"{name}.py" for name in imported]
    return bool(imported & BUILT_ON_TORCH) or any(file.exists() and needs_torch(file) for file in shared)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--without-torch", action="store_true", help="only the tests that need no torch")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if config.option.without_torch and collection_path.match("test_*.py") and needs_torch(collection_path):
        return True
    return None  # as pytest would


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.without_torch:
        left_out = [item for item in items if FIXTURES_WITH_TORCH & set(getattr(item, "fixturenames", ()))]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
