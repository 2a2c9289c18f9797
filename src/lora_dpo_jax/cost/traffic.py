"""How many bytes the devices of a compiled program send each other."""

import re
from collections import defaultdict
from typing import Any

from lora_dpo_jax.cost.program_text import branches_of, computations_of, num_bytes_of, trips_of

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def collective_bytes(program: str, *, unknown_trips: int = 1) -> dict[str, float]:
    """Bytes that a device gets from others in one run of the optimized program, by kind of exchange.

    A loop counts once per iteration, or `unknown_trips` times if their number is not known. A conditional counts with
    its most expensive branch.
    """
    computations, entry = computations_of(program)
    known: dict[str, dict[str, float]] = {}

    def of(name: str) -> dict[str, float]:
        if name not in known:
            known[name] = {}  # XLA's computations do not call themselves
            total: dict[str, float] = defaultdict(float)
            for line in computations.get(name, ()):
                times = trips_of(line, computations) or unknown_trips
                for kind, num_bytes in _of_line(line, of).items():
                    total[kind] += num_bytes * (times if " while(" in line else 1)
            known[name] = dict(total)
        return known[name]

    return of(entry)


def _of_line(line: str, of: Any) -> dict[str, float]:
    found = re.match(r"\s+(?:ROOT )?%?\S+ = (.*?) ([\w-]+)\(", line)
    if not found:
        return {}
    result, operation = found.groups()
    kind = operation.removesuffix("-start")
    if kind in COLLECTIVES:
        sizes = [num_bytes_of(shape) for shape in re.findall(r"\w+\[[\d,]*\]", result)]
        # A -start operation also lists its operand, which is no larger than the result. Otherwise all are results.
        total = max(sizes) if operation in ("all-gather-start", "collective-permute-start") else sum(sizes)
        # An all-reduce adds up the parts of all devices, and then sends the sum to all.
        return {kind: (2.0 if kind == "all-reduce" else 1.0) * total}
    if operation == "while" and (body := re.search(r"body=%?([\w.-]+)", line)):
        return of(body[1])
    if operation == "conditional":
        return max((of(name) for name in branches_of(line)), key=lambda found: sum(found.values()), default={})
    if called := re.search(r"(?:calls|to_apply)=%?([\w.-]+)", line):
        return {} if _continues_an_exchange(line, called[1]) else of(called[1])
    return {}


def _continues_an_exchange(line: str, called: str) -> bool:
    """Whether a TPU's program only repeats an exchange here: it does so in overlapping computations and at the end."""
    return called.startswith("async_collective_fusion") or re.match(r"\s+%?async-collective-done", line) is not None
