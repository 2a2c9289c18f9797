"""How many bytes the devices of a compiled program send each other."""

import re
from collections import defaultdict
from typing import Any

from lora_dpo_jax.cost.program_text import computations_of, num_bytes_of

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def collective_bytes(program: str, *, unknown_trips: int = 1) -> dict[str, float]:
    """Bytes that a device gets from others in one run of the optimized program, by kind of exchange.

    A loop counts as often as it is known to turn, or `unknown_trips` times; of a choice, the dearest branch.
    """
    computations, entry = computations_of(program)
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
        sizes = [num_bytes_of(shape) for shape in re.findall(r"\w+\[[\d,]*\]", result)]
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
