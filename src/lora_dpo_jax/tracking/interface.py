"""Trackers, which take a run's metrics, and their settings."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import draccus


class Tracker(ABC):
    """Takes the metrics of one run. As a context manager it finishes itself, as failed if there was an exception."""

    @abstractmethod
    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """`step` counts from 0. wandb drops metrics of a step below the last one; metrics.jsonl keeps all."""

    @abstractmethod
    def log_summary(self, metrics: Mapping[str, float]) -> None:
        """Values that hold for the whole run, such as the number of parameters."""

    @abstractmethod
    def log_config(self, config: Mapping[str, Any]) -> None:
        """Adds settings that became known after the start to those that the tracker was started with."""

    @abstractmethod
    def finish(self, *, exit_code: int = 0) -> None:
        """Writes out everything that is still buffered. Nothing may be logged afterwards."""

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, exception_type, exception, traceback) -> None:
        self.finish(exit_code=0 if exception_type is None else 1)


@dataclass(frozen=True)
class TrackerConfig(draccus.ChoiceRegistry, ABC):
    """One destination of metrics besides metrics.jsonl."""

    @abstractmethod
    def start(self, *, run_dir: Path, run_id: str, resolved_config: dict) -> Tracker: ...

    def check_packages(self) -> None:
        """Raises ImportError if `start` would, because a package is missing."""


# A list, not a tuple: draccus 0.11 loses the types of a tuple of two when it writes them.
TrackerConfigs = list[TrackerConfig]


def as_number(name: str, value: Any) -> float:
    """The value of a number, or of an array of one number of any array library. Raises TypeError for anything else."""
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        value = value.item()
    if not isinstance(value, int | float):
        raise TypeError(f"Metric {name!r} must be one number, found {value!r}.")
    return value
