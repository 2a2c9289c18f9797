"""The memory that a compiled program needs on a device, and the largest arrays that it makes."""

import re
from dataclasses import dataclass
from typing import Any

from lora_dpo_jax.cost.program_text import computations_of, num_bytes_of

# Operations that return arrays without computing them.
HANDED_ON = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "copy-start", "copy-done"}


@dataclass(frozen=True)
class ProgramMemory:
    """Bytes that a compiled program needs on a device."""

    arguments: int
    temporary: int
    outputs: int  # without those that reuse the memory of arguments
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
    """The largest arrays that operations of the optimized program make: `bf16[2048,14336]`, ..."""
    computations, _ = computations_of(program)
    # Arrays inside a fusion are never in memory.
    fused = set(re.findall(r" fusion\(.*calls=%?([\w.-]+)", program))
    lines = (line for name, lines in computations.items() if name not in fused for line in lines)
    made = (re.match(r"\s+(?:ROOT )?%?\S+ = (\w+\[[\d,]*\])\S* ([\w-]+)\(", line) for line in lines)
    sizes = {found[1]: num_bytes_of(found[1]) for found in made if found and found[2] not in HANDED_ON}
    return sorted(sizes, key=lambda shape: -sizes[shape])[:count]
