"""Reads a run's folder: metrics.jsonl, config.yaml, report.json and what judges wrote."""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lora_dpo_jax.json_objects import read_json_object
from lora_dpo_jax.report.record import Record, read_record
from lora_dpo_jax.tracking.metrics_file import METRICS

CONFIG = "config.yaml"
VERDICTS, RESULTS = ("judge*.json", "*/judge.json"), "results.jsonl"
MOST_RESULTS = 2  # of each outcome


@dataclass(frozen=True)
class Series:
    """A metric over the steps at which it was logged."""

    steps: np.ndarray  # int64 [point]
    values: np.ndarray  # float64 [point], NaN where the value was not finite

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def last(self) -> float:
        return float(self.values[-1])

    def binned(self, most: int) -> "Series":
        """At most so many points, each the mean of a stretch of points, at their last step."""
        if len(self) <= most:
            return self
        bounds = np.linspace(0, len(self), most + 1).astype(int)
        means = [_mean(self.values[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
        return Series(self.steps[bounds[1:] - 1], np.array(means))


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


@dataclass(frozen=True)
class JudgeFiles:
    """What a judge wrote."""

    name: str  # the path of the summary
    summary: dict[str, Any]
    results: list[dict[str, Any]]  # the first ones of each outcome, of results.jsonl beside it


@dataclass(frozen=True)
class RunFiles:
    """What is known of a run."""

    folder: Path
    metrics: list[dict[str, Any]]  # lines of metrics.jsonl
    settings: dict[str, Any]  # of config.yaml
    settings_text: str
    record: Record
    judges: list[JudgeFiles] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def series(self, name: str) -> Series | None:
        """None if the metric was never logged."""
        found = {line["step"]: line[name] for line in self.metrics if name in line}
        if not found:
            return None
        values = [math.nan if value is None else float(value) for value in found.values()]
        return Series(np.array([*found], np.int64), np.array(values))

    def final(self, series: Series) -> float:
        """The value of a held-out metric for the exported adapters."""
        at = np.flatnonzero(series.steps == self.record.chosen_step)
        return float(series.values[at[0]]) if len(at) else series.last

    @property
    def names(self) -> list[str]:
        """Of all metrics, in the order of their first line."""
        return [name for name in dict.fromkeys(name for line in self.metrics for name in line) if name != "step"]

    @property
    def num_steps(self) -> int | None:
        return None if self.record.facts is None else self.record.facts.num_steps

    @property
    def steps_done(self) -> int:
        """How many steps are known to be done."""
        trained = [line["step"] + 1 for line in self.metrics if "train/loss" in line]
        evaluated = [line["step"] for line in self.metrics if "eval/loss" in line]
        return max([*trained, *evaluated, *(sitting.last_step for sitting in self.record.sittings)], default=0)

    def setting(self, path: str, default: Any = None) -> Any:
        """The value of a setting, such as lora.r."""
        node: Any = self.settings
        for name in path.split("."):
            if not isinstance(node, dict) or name not in node:
                return default
            node = node[name]
        return node


def read_run(folder: Path, verdicts: Sequence[Path] = ()) -> RunFiles:
    """`verdicts`: files of judges besides those in the folder. Raises ValueError or OSError with the file's name."""
    if not (folder / METRICS).is_file():
        raise FileNotFoundError(f"{folder} is no run's folder: it has no {METRICS}. Name a folder in trainer.log_dir")
    text = (folder / CONFIG).read_text(encoding="utf-8") if (folder / CONFIG).is_file() else ""
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{folder / CONFIG} is no YAML: {str(error).splitlines()[0]}") from error
    found = sorted({path for pattern in VERDICTS for path in folder.glob(pattern)})
    of_judges = [
        JudgeFiles(str(path), dict(read_json_object(path).values), _read_results(path.with_name(RESULTS)))
        for path in [*found, *verdicts]
    ]
    return RunFiles(
        folder,
        _read_metrics(folder / METRICS),
        settings if isinstance(settings, dict) else {},
        text,
        read_record(folder) or Record(),
        of_judges,
    )


def _read_results(path: Path) -> list[dict[str, Any]]:
    """Lines that are none of a judge's are left out."""
    chosen: dict[str, list[dict[str, Any]]] = {}
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for line in lines:
        with suppress(ValueError, RecursionError):
            result = json.loads(line)
            outcome = result.get("outcome") if isinstance(result, dict) else None
            if isinstance(outcome, str) and len(of_outcome := chosen.setdefault(outcome, [])) < MOST_RESULTS:
                of_outcome.append(result)
    return [result for of_outcome in chosen.values() for result in of_outcome]


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """A last line that is not whole yet is left out."""
    lines = path.read_bytes().split(b"\n")[:-1]
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        is_right = isinstance(entry, dict) and type(entry.get("step")) is int
        if not is_right or not all(x is None or isinstance(x, int | float) for x in entry.values()):
            raise ValueError(f"{path}, line {number} must hold a step and its metrics, all numbers")
        found.append(entry)
    return found
