"""XLA's text of an optimized program: its computations, line by line, and the sizes of arrays in it."""

import re

import numpy as np


def computations_of(program: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the entry computation."""
    computations: dict[str, list[str]] = {}
    entry = current = ""
    for line in program.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            current = head[2]
            computations[current] = []
            entry = current if head[1] else entry
        elif current:
            computations[current].append(line)
    return computations, entry


def num_bytes_of(shape: str) -> int:
    """The bytes of an array such as `bf16[2,3]`."""
    kind, dims = shape.rstrip("]").split("[")
    bits = int(re.sub(r"\D", "", kind.partition("e")[0]) or 8)
    return int(np.prod([int(dim) for dim in dims.split(",") if dim], dtype=np.int64)) * bits // 8
