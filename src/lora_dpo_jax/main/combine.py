"""Several adapters of one base as one adapter, with a weight for each.

python -m lora_dpo_jax.main.combine --adapters '[A, B]' --weights '[0.7, 0.3]' --output OUT
"""

import logging
import math
import sys
from dataclasses import dataclass, field
from typing import Literal

from lora_dpo_jax.huggingface.combining import combine_adapters
from lora_dpo_jax.huggingface.folders import check_export_target, local_folder
from lora_dpo_jax.main.errors import told_in_a_line
from lora_dpo_jax.places import refuse_impossible_paths
from lora_dpo_jax.printable import printable
from lora_dpo_jax.redaction import log_to_stderr
from lora_dpo_jax.settings.arguments import parse
from lora_dpo_jax.settings.choices import check_choices


@dataclass(frozen=True, kw_only=True)
class CombineConfig:
    """The adapters, and how they become one."""

    adapters: list[str]  # PEFT folders, URLs or hub ids, of one base
    weights: list[float] = field(default_factory=list)  # of each adapter, negative ones too; empty: 1 each
    combination: Literal["cat", "linear"] = "cat"  # cat: exact, ranks add up; linear: factors are added at one rank
    output: str  # a folder or a URL
    overwrite: bool = False  # replace a former export there

    def __post_init__(self):
        check_choices(self)
        refuse_impossible_paths({"output": self.output})
        if not self.adapters:
            raise ValueError("adapters=[] must name at least one adapter")
        if self.weights and len(self.weights) != len(self.adapters):
            raise ValueError(f"weights={self.weights} must have one number for each of {len(self.adapters)} adapters")
        if not all(map(math.isfinite, self.weights)):
            raise ValueError(f"weights={self.weights} must be finite numbers")


def main(config: CombineConfig) -> None:
    """Writes the adapter."""
    check_export_target(config.output, overwrite=config.overwrite)
    weights = config.weights or [1.0] * len(config.adapters)
    folders = [local_folder(name) for name in config.adapters]
    combine_adapters(folders, weights, config.output, combination=config.combination, overwrite=config.overwrite)
    print(f"adapter   {printable(config.output)}")


def run() -> None:
    """The command `lora-dpo-combine`."""
    log_to_stderr(logging.WARNING)
    with told_in_a_line():
        main(parse(CombineConfig, sys.argv[1:]))


if __name__ == "__main__":
    run()
