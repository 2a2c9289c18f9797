"""Which tests need torch, by what their files import."""

import ast
import functools
from pathlib import Path

TESTS = Path(__file__).parent
BUILT_ON_TORCH = {"torch", "peft", "trl", "bitsandbytes", "transformers.trainer"}
FIXTURES = {"trl_pairs"}  # those of tests/data/conftest.py that need it


@functools.cache
def needs_torch(path: Path) -> bool:
    """Whether a file imports torch or what is built on it, at its top or within, itself or through a file of tests/."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported |= {node.module, node.module.split(".")[0]}
    shared = [TESTS / f"{name}.py" for name in imported]
    return bool(imported & BUILT_ON_TORCH) or any(file.exists() and needs_torch(file) for file in shared)
