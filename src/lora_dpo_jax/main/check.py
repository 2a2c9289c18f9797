"""Whether an adapter would load and act where it is served.

    python -m lora_dpo_jax.main.check --adapter <PEFT folder> [--base <folder>]

Nothing but files is read: no server needs to be installed. Exit status 1 means that a server would load the adapter
and do nothing with it.
"""

import logging
import sys
from dataclasses import dataclass

from lora_dpo_jax.huggingface.folders import local_folder
from lora_dpo_jax.huggingface.servers import AdapterFiles, Verdict, base_folder, rank_note, verdicts
from lora_dpo_jax.main.errors import told_in_a_line
from lora_dpo_jax.places import refuse_impossible_paths
from lora_dpo_jax.printable import printable
from lora_dpo_jax.redaction import log_to_stderr
from lora_dpo_jax.settings.arguments import parse

NOTHING = "loads and does nothing"


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """The adapter, and the base that it is served on."""

    adapter: str  # a PEFT folder, a URL or a hub id
    base: str | None = None  # of the base model; null is the one that the adapter names, if it is a folder here

    def __post_init__(self):
        refuse_impossible_paths({"adapter": self.adapter, "base": self.base})


def main(config: CheckConfig) -> list[Verdict]:
    """Prints a verdict for each server, and returns them."""
    folder = local_folder(config.adapter)
    base = base_folder(folder) if config.base is None else local_folder(config.base, patterns=["config.json"])
    files = AdapterFiles.read(folder, base)
    found = verdicts(files)
    print(printable(report(config.adapter, files, found)))
    return found


def report(name: str, files: AdapterFiles, found: list[Verdict]) -> str:
    """The verdicts as a text for people."""
    ranks = sorted(set(files.ranks.values()))
    lines = [f"{name}: {len(files.pairs)} layers, rank {' and '.join(map(str, ranks)) or 'none'}"]
    for verdict in found:
        lines.append(f"{verdict.server:<24} {verdict.outcome}")
        lines += [f"    {reason}" for reason in verdict.reasons]
    note = rank_note(files)
    return "\n".join([*lines, note] if note else lines)


def run() -> None:
    """The command `lora-dpo-check`."""
    log_to_stderr(logging.WARNING)
    with told_in_a_line():
        found = main(parse(CheckConfig, sys.argv[1:]))
        if any(verdict.outcome == NOTHING for verdict in found):
            raise SystemExit(1)


if __name__ == "__main__":
    run()
