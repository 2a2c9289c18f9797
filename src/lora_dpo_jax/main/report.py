"""Writes the report of a run again, or a page that compares several runs.

python -m lora_dpo_jax.main.report logs/RUN [logs/RUN ...]

A run writes its report itself; this needs neither its model nor its data.
"""

import itertools
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_dpo_jax.main.errors import told_in_a_line
from lora_dpo_jax.places import refuse_impossible_paths
from lora_dpo_jax.printable import printable
from lora_dpo_jax.redaction import log_to_stderr
from lora_dpo_jax.report.comparison import comparison_page
from lora_dpo_jax.report.page import REPORT, is_our_page, report_page, write_page
from lora_dpo_jax.report.run_files import read_run
from lora_dpo_jax.runs.outputs import check_writable
from lora_dpo_jax.settings.arguments import parse

COMPARISON = "comparison.html"


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The runs, and where the page goes."""

    runs: list[str]  # folders of runs; the words before the first setting are runs too
    output: str | None = None  # the page; null: report.html in the run's folder, or comparison.html here for several
    verdicts: list[str] = field(default_factory=list)  # files of judges, beside those in the run's folder; of one run

    def __post_init__(self):
        if not self.runs:
            raise ValueError("runs=[] must name the folder of at least one run")
        if self.verdicts and len(self.runs) > 1:
            raise ValueError(f"verdicts={self.verdicts} are of one run, and runs names {len(self.runs)}")
        refuse_impossible_paths({"output": self.output, **{f"runs.{i}": run for i, run in enumerate(self.runs)}})


def main(config: ReportConfig) -> Path:
    """Writes the page, and returns its path."""
    folders = [Path(run).expanduser() for run in config.runs]
    default = folders[0] / REPORT if len(folders) == 1 else Path(COMPARISON)
    output = default if config.output is None else Path(config.output).expanduser()
    if output.is_dir():
        raise IsADirectoryError(f"output={str(output)!r} is a folder; name a file in it, such as {output / REPORT}")
    if output.exists() and not is_our_page(output):
        raise FileExistsError(f"output={str(output)!r} exists and is no page of this command. Choose another file")
    verdicts = [Path(path).expanduser() for path in config.verdicts]
    runs = [read_run(folder, verdicts) for folder in folders]
    check_writable("output", output.parent)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_page(output, report_page(runs[0]) if len(runs) == 1 else comparison_page(runs))
    print(f"report    {printable(str(output))}")
    return output


def with_named_runs(words: Sequence[str]) -> list[str]:
    """The words of the command line, with those before the first setting as the setting `runs`."""
    runs = [*itertools.takewhile(lambda word: not word.startswith("-"), words)]
    return [*(["--runs", json.dumps(runs)] if runs else []), *words[len(runs) :]]


def run() -> None:
    """The command `lora-dpo-report`."""
    log_to_stderr(logging.WARNING)
    with told_in_a_line():
        main(parse(ReportConfig, with_named_runs(sys.argv[1:])))


if __name__ == "__main__":
    run()
