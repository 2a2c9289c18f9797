"""What XLA says of a compiled program: memory, the largest arrays it makes, what its devices send each other."""

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# What an array of a program comes from when nothing is computed.
HANDED_ON = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "copy-start", "copy-done"}


@dataclass(frozen=True)
class ProgramMemory:
    """Bytes of a device."""

    arguments: int
    temporary: int
    outputs: int  # beside the arguments that they take the place of
    code: int

    @staticmethod
    def of(compiled: Any) -> "ProgramMemory":
        found = compiled.memory_analysis()
        return ProgramMemory(
            arguments=found.argument_size_in_bytes,
            temporary=found.temp_size_in_bytes,
            outputs=found.output_size_in_bytes - found.alias_size_in_bytes,
            code=found.generated_code_size_in_bytes,
        )

    @property
    def total(self) -> int:
        return self.arguments + self.temporary + self.outputs + self.code


def largest_arrays(program: str, count: int = 3) -> list[str]:
    """The largest that operations of the optimized program make: `bf16[2048,14336]`, ..."""
    computations, _ = _computations(program)
    # What is inside of a fusion never lies in memory.
    fused = set(re.findall(r" fusion\(.*calls=%?([\w.-]+)", program))
    lines = (line for name, lines in computations.items() if name not in fused for line in lines)
    made = (re.match(r"\s+(?:ROOT )?%?\S+ = (\w+\[[\d,]*\])\S* ([\w-]+)\(", line) for line in lines)
    sizes = {found[1]: _num_bytes(found[1]) for found in made if found and found[2] not in HANDED_ON}
    return sorted(sizes, key=lambda shape: -sizes[shape])[:count]


def collective_bytes(program: str, *, unknown_trips: int = 1) -> dict[str, float]:
    """Bytes that a device gets from others in one run of the optimized program, by kind of exchange.

    A loop counts as often as it is known to turn, or `unknown_trips` times; of a choice, the dearest branch.
    """
    computations, entry = _computations(program)
    known: dict[str, dict[str, float]] = {}

    def of(name: str) -> dict[str, float]:
        if name not in known:
            known[name] = {}  # XLA's computations do not call themselves
            total: dict[str, float] = defaultdict(float)
            for line in computations.get(name, ()):
                times = _trips(line, computations) or unknown_trips
                for kind, num_bytes in _of_line(line, of).items():
                    total[kind] += num_bytes * (times if " while(" in line else 1)
            known[name] = dict(total)
        return known[name]

    return of(entry)


def _computations(program: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the first to run."""
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


def _trips(line: str, computations: dict[str, list[str]]) -> int | None:
    """How often the loop of `line` turns, as XLA notes it or as its condition compares; None: not known before."""
    if noted := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(noted[1])
    condition = re.search(r"condition=%?([\w.-]+)", line)
    lines = computations.get(condition[1], []) if condition else []
    bounds = [found[1] for line in lines if (found := re.search(r"= [su]32\[\]\S* constant\((\d+)\)", line))]
    return int(bounds[0]) if len(bounds) == 1 else None


def _of_line(line: str, of: Any) -> dict[str, float]:
    found = re.match(r"\s+(?:ROOT )?%?\S+ = (.*?) ([\w-]+)\(", line)
    if not found:
        return {}
    result, operation = found.groups()
    kind = operation.removesuffix("-start")
    if kind in COLLECTIVES:
        sizes = [_num_bytes(shape) for shape in re.findall(r"\w+\[[\d,]*\]", result)]
        # What has but begun names its operand too, which is no larger than the result; else all are results.
        total = max(sizes) if operation in ("all-gather-start", "collective-permute-start") else sum(sizes)
        # All devices' parts are added up and then handed to all.
        return {kind: (2.0 if kind == "all-reduce" else 1.0) * total}
    if operation == "while" and (body := re.search(r"body=%?([\w.-]+)", line)):
        return of(body[1])
    if operation == "conditional":
        names = re.search(r"branch_computations=\{([^}]*)\}", line)
        branches = names[1].split(", ") if names else re.findall(r"(?:true|false)_computation=(%?[\w.-]+)", line)
        return max((of(name.lstrip("%")) for name in branches), key=lambda found: sum(found.values()), default={})
    if called := re.search(r"(?:calls|to_apply)=%?([\w.-]+)", line):
        return {} if _goes_on_with_an_exchange(line, called[1]) else of(called[1])
    return {}


def _goes_on_with_an_exchange(line: str, called: str) -> bool:
    """On a TPU, an exchange is written down once more in all that is computed meanwhile, and where it ends."""
    return called.startswith("async_collective_fusion") or re.match(r"\s+%?async-collective-done", line) is not None


def _num_bytes(shape: str) -> int:
    """Of `bf16[2,3]`."""
    kind, dims = shape.rstrip("]").split("[")
    bits = int(re.sub(r"\D", "", kind.partition("e")[0]) or 8)
    return int(np.prod([int(dim) for dim in dims.split(",") if dim], dtype=np.int64)) * bits // 8
