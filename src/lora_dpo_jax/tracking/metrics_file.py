"""metrics.jsonl in the run's folder. Each line has a step and its metrics."""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from lora_dpo_jax.files import replace_file
from lora_dpo_jax.tracking.interface import Tracker

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


class MetricsFile(Tracker):
    """One JSON object a line, flushed at once. JSON has no NaN or infinity: both are written as null."""

    def __init__(self, path: Path):
        _drop_torn_line(path)
        self._file = path.open("ab", buffering=0)

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line = (json.dumps({"step": step, **finite}, allow_nan=False) + "\n").encode()
        try:
            written = self._file.write(line)
        except OSError as error:
            raise OSError(f"{self._file.name}: the metrics of step {step} could not be written: {error}") from error
        if written != len(line):
            raise OSError(f"{self._file.name}: only a part of a line could be written; is the disk full?")

    def log_summary(self, metrics: Mapping[str, float]) -> None:
        self.log(metrics, step=0)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Settings are no metrics; the run's config.yaml holds them."""

    def finish(self, *, exit_code: int = 0) -> None:
        self._file.close()


def cut_metrics(run_dir: Path, step: int) -> list[dict[str, Any]]:
    """Removes the lines that a run resumed from `step` will log again; returns the others.

    These are the first line of that step or a later one, and all after it: summaries too, which have step 0. To be
    called before the trackers start. Only the first process does anything.
    """
    path = run_dir / METRICS
    if jax.process_index() != 0 or not path.exists():
        return []
    _drop_torn_line(path)
    lines = path.read_bytes().splitlines(keepends=True)
    read = [_read_metrics(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]
    stay = next((number for number, entry in enumerate(read) if entry["step"] >= step), len(read))
    if stay < len(read):
        logger.info("%s: %d lines from step %d on are removed", path, len(read) - stay, step)
        replace_file(path, b"".join(lines[:stay]))
    return read[:stay]


def _read_metrics(line: bytes, origin: str) -> dict[str, Any]:
    """A step and its metrics, numbers or null. Raises ValueError with the number of the line."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{origin}: is not JSON ({error}); remove the line to resume this run") from error
    step = entry.get("step") if isinstance(entry, dict) else None
    if type(step) is not int or not all(x is None or isinstance(x, int | float) for x in entry.values()):
        raise ValueError(f"{origin}: must hold a step and its metrics, all numbers; remove the line to resume this run")
    return entry


def _drop_torn_line(path: Path) -> None:
    """Removes an unfinished last line, which a killed run may leave, and which would spoil the next line too."""
    if path.exists():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
