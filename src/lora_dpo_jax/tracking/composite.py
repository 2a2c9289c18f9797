"""All trackers of a run as one.

`tracker` in a config file is a name (`wandb`), a mapping (`{type: wandb, project: p}`), a list of either, or null. On
several hosts only process 0 writes.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from lora_dpo_jax.tracking.interface import Tracker, TrackerConfig, as_number
from lora_dpo_jax.tracking.metrics_file import METRICS, MetricsFile


@TrackerConfig.register_subclass("none")
@dataclass(frozen=True)
class NoTrackerConfig(TrackerConfig):
    """Nothing besides metrics.jsonl."""

    def start(self, *, run_dir: Path, run_id: str, resolved_config: dict) -> Tracker:
        return _Composite([])


def check_trackers(configs: Sequence[TrackerConfig]) -> None:
    """Raises ValueError if two are of one kind."""
    kinds = [TrackerConfig.get_choice_name(type(config)) for config in configs]
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"trainer.tracker names {', '.join(kinds)}; each may be named once.")


def start_trackers(configs: Sequence[TrackerConfig], *, run_dir: Path, run_id: str, resolved_config: dict) -> Tracker:
    """Start all of `configs`, and metrics.jsonl in `run_dir`, as one tracker. A resumed run appends to its files.

    Values may be numbers or arrays of one number, of any array library. On processes other than the first, the tracker
    accepts everything and writes nothing.
    """
    check_trackers(configs)
    if jax.process_index() != 0:
        return _Composite([])
    run_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as on_failure:
        trackers = [on_failure.enter_context(MetricsFile(run_dir / METRICS))]
        for config in configs:
            started = config.start(run_dir=run_dir, run_id=run_id, resolved_config=resolved_config)
            trackers.append(on_failure.enter_context(started))
        on_failure.pop_all()
    return _Composite(trackers)


class _Composite(Tracker):
    def __init__(self, trackers: Sequence[Tracker]):
        self._trackers = tuple(trackers)

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        numbers = _numbers(metrics)
        for tracker in self._trackers:
            tracker.log(numbers, step=step)

    def log_summary(self, metrics: Mapping[str, float]) -> None:
        numbers = _numbers(metrics)
        for tracker in self._trackers:
            tracker.log_summary(numbers)

    def log_config(self, config: Mapping[str, Any]) -> None:
        for tracker in self._trackers:
            tracker.log_config(config)

    def finish(self, *, exit_code: int = 0) -> None:
        # The stack finishes every tracker, even after one has raised.
        with ExitStack() as stack:
            for tracker in self._trackers:
                stack.callback(tracker.finish, exit_code=exit_code)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: as_number(name, value) for name, value in metrics.items()}
