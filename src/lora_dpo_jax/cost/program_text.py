"""XLA's text of an optimized program: its computations and instructions, how often they run, and sizes of arrays."""

import re
from dataclasses import dataclass

import numpy as np

_ARRAY = re.compile(r"\b[a-z]\w*\[[\d,]*\]")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?(\S+) = (.*?) ([a-z][\w-]*)\((.*)")


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shapes: tuple[str, ...]  # of its results, such as `bf16[2,3]`
    operation: str
    operands: tuple[str, ...]  # names of instructions of its computation
    attributes: str  # what follows the operands

    @property
    def called(self) -> str:
        """The computation that a fusion or call stands for; empty if there is none."""
        found = re.search(r"(?:calls|to_apply)=%?([\w.-]+)", self.attributes)
        return found[1] if found else ""


def instructions_of(lines: list[str]) -> dict[str, Instruction]:
    """By name, in the order of the program."""
    found = (_INSTRUCTION.match(re.sub(r"/\*.*?\*/|, metadata=\{[^}]*\}", "", line)) for line in lines)
    return {match[1]: _instruction(*match.groups()) for match in found if match}


def _instruction(name: str, result: str, operation: str, rest: str) -> Instruction:
    operands, _, attributes = rest.partition(")")
    if operation in ("constant", "parameter"):
        operands, attributes = "", operands
    names = re.findall(r"%([\w.-]+)", operands)
    return Instruction(name, tuple(_ARRAY.findall(result)), operation, tuple(names), attributes)


def runs_of(computations: dict[str, list[str]], entry: str, *, unknown_trips: int = 1) -> dict[str, int]:
    """How often each computation runs in one run of the program; those inside of fusions are left out.

    A loop whose trips are not known has `unknown_trips`. All branches of a conditional count.
    """
    runs: dict[str, int] = {}

    def add(name: str, times: int) -> None:
        runs[name] = runs.get(name, 0) + times
        for line in computations.get(name, ()):
            if body := re.search(r" while\(.*body=%?([\w.-]+)", line):
                add(body[1], times * (trips_of(line, computations) or unknown_trips))
            elif " conditional(" in line:
                for branch in branches_of(line):
                    add(branch, times)
            elif called := re.search(r" call\(.*to_apply=%?([\w.-]+)", line):
                add(called[1], times)

    add(entry, 1)
    return runs


def branches_of(line: str) -> list[str]:
    """The computations between which the conditional in `line` chooses."""
    names = re.search(r"branch_computations=\{([^}]*)\}", line)
    found = names[1].split(", ") if names else re.findall(r"(?:true|false)_computation=(%?[\w.-]+)", line)
    return [name.lstrip("%") for name in found]


def trips_of(line: str, computations: dict[str, list[str]]) -> int | None:
    """The iterations of the loop in `line`, by XLA's note or the bound in its condition; None if not known."""
    if noted := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(noted[1])
    condition = re.search(r"condition=%?([\w.-]+)", line)
    lines = computations.get(condition[1], []) if condition else []
    bounds = [found[1] for line in lines if (found := re.search(r"= [su]32\[\]\S* constant\((\d+)\)", line))]
    return int(bounds[0]) if len(bounds) == 1 else None


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
