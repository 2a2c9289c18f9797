"""Where metrics go: metrics.jsonl in the run's folder, Weights & Biases and TensorBoard if asked for, the terminal.

`tracker` in a config file is a name (`wandb`), a mapping (`{type: wandb, project: p}`), a list of either, or null. On
several hosts only process 0 writes and prints.
"""

import json
import logging
import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

import draccus
import jax
from tqdm import tqdm

from lora_dpo_jax.files import replace_file
from lora_dpo_jax.redaction import redact

logger = logging.getLogger(__name__)


class Tracker(ABC):
    """Takes the metrics of one run. As a context manager it finishes itself, as failed if there was an exception."""

    @abstractmethod
    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """`step` counts from 0. wandb drops what comes for a step below the last one; metrics.jsonl keeps all."""

    @abstractmethod
    def log_summary(self, metrics: Mapping[str, float]) -> None:
        """Values that hold for the whole run, such as the number of parameters."""

    @abstractmethod
    def log_config(self, config: Mapping[str, Any]) -> None:
        """Settings that became known after the start, on top of those the tracker was started with."""

    @abstractmethod
    def finish(self, *, exit_code: int = 0) -> None:
        """Write out what is still held. Nothing may be logged afterwards."""

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, exception_type, exception, traceback) -> None:
        self.finish(exit_code=0 if exception_type is None else 1)


@dataclass(frozen=True)
class TrackerConfig(draccus.ChoiceRegistry, ABC):
    """One place that metrics go to besides metrics.jsonl."""

    @abstractmethod
    def start(self, *, run_dir: Path, run_id: str, resolved_config: dict) -> Tracker: ...

    def check_packages(self) -> None:
        """Raises ImportError where `start` would, for want of a package."""


# A list and no tuple: draccus 0.11 loses the types of a tuple of two when it writes them.
TrackerConfigs = list[TrackerConfig]


@TrackerConfig.register_subclass("wandb")
@dataclass(frozen=True)
class WandbConfig(TrackerConfig):
    """Weights & Biases. What is null is left to wandb: its environment variables, then its own defaults."""

    project: str | None = None  # that the run belongs to
    entity: str | None = None  # the user or team
    name: str | None = None  # the name shown; null is the run's id
    group: str | None = None  # of runs
    tags: list[str] = field(default_factory=list)  # of the run
    mode: Literal["online", "offline", "disabled"] | None = None  # null: online, unless the environment says other
    id: str | None = None  # null is the run's id, so that a resumed run continues its curves

    def start(self, *, run_dir: Path, run_id: str, resolved_config: dict) -> Tracker:
        import wandb

        try:
            with _redacted_arguments():
                run = wandb.init(
                    project=self.project,
                    entity=self.entity,
                    name=self.name or run_id,
                    group=self.group,
                    tags=self.tags,
                    mode=self.mode,
                    id=self.id or run_id,
                    # An offline run cannot be looked up; wandb warns when asked to. Syncing continues it by id.
                    resume=None if self.mode == "offline" else "allow",
                    dir=str(run_dir),
                    config=resolved_config,
                    allow_val_change=True,  # a resumed run may come with other settings
                )
        except wandb.Error as error:
            raise OSError(
                f"trainer.tracker: wandb did not start: {' '.join(str(error).split())}. Log in with `wandb login`, or "
                "set {type: wandb, mode: offline}"
            ) from error
        return _WandbTracker(run)


@TrackerConfig.register_subclass("tensorboard")
@dataclass(frozen=True)
class TensorboardConfig(TrackerConfig):
    """Event files of scalars in the run's folder, under `tensorboard`. Settings are in config.yaml beside it."""

    def check_packages(self) -> None:
        try:
            import tensorboard.summary  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "trainer.tracker: tensorboard needs a package that is not installed. "
                "Run: pip install 'lora_dpo_jax[tensorboard]'"
            ) from error

    def start(self, *, run_dir: Path, run_id: str, resolved_config: dict) -> Tracker:
        self.check_packages()
        from tensorboard.summary import Writer

        return _TensorboardTracker(Writer(str(run_dir / "tensorboard")))


@TrackerConfig.register_subclass("none")
@dataclass(frozen=True)
class NoTrackerConfig(TrackerConfig):
    """Nothing besides metrics.jsonl."""

    def start(self, *, run_dir: Path, run_id: str, resolved_config: dict) -> Tracker:
        return _Composite([])


def check_trackers(configs: Sequence[TrackerConfig]) -> None:
    """Raises ValueError where two are of one kind."""
    kinds = [TrackerConfig.get_choice_name(type(config)) for config in configs]
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"trainer.tracker names {', '.join(kinds)}; each may be named once.")


def start_trackers(configs: Sequence[TrackerConfig], *, run_dir: Path, run_id: str, resolved_config: dict) -> Tracker:
    """Start all of `configs`, and metrics.jsonl in `run_dir`, as one tracker. A run that goes on appends to its files.

    Values may be numbers or arrays of one number, of any array library. On the other processes of a run on several
    hosts, the tracker takes everything and writes nothing.
    """
    check_trackers(configs)
    if jax.process_index() != 0:
        return _Composite([])
    run_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as on_failure:
        trackers = [on_failure.enter_context(_JsonLines(run_dir / "metrics.jsonl"))]
        for config in configs:
            started = config.start(run_dir=run_dir, run_id=run_id, resolved_config=resolved_config)
            trackers.append(on_failure.enter_context(started))
        on_failure.pop_all()
    return _Composite(trackers)


def cut_metrics(run_dir: Path, step: int) -> list[dict[str, Any]]:
    """Takes what a run that goes on from `step` will log again out of metrics.jsonl, and returns what stays.

    To be called before the trackers start. On the other processes of a run it does nothing.
    """
    path = run_dir / "metrics.jsonl"
    if jax.process_index() != 0 or not path.exists():
        return []
    _drop_torn_line(path)
    lines = path.read_bytes().splitlines(keepends=True)
    read = [_read_metrics(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]
    stays = [entry["step"] < step for entry in read]
    if not all(stays):
        logger.info("%s: %d lines from step %d on are taken out", path, stays.count(False), step)
        replace_file(path, b"".join(line for line, stay in zip(lines, stays, strict=True) if stay))
    return [entry for entry, stay in zip(read, stays, strict=True) if stay]


def _read_metrics(line: bytes, origin: str) -> dict[str, Any]:
    """A step and its metrics, numbers or null. Raises ValueError that names the line."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{origin}: is not JSON ({error}); remove the line to resume this run") from error
    step = entry.get("step") if isinstance(entry, dict) else None
    if type(step) is not int or not all(x is None or isinstance(x, int | float) for x in entry.values()):
        raise ValueError(f"{origin}: is no step and its metrics, all numbers; remove the line to resume this run")
    return entry


class ProgressBar:
    """How far a run is: a bar where stderr is a terminal, elsewhere a log line, at level INFO, per logged step."""

    def __init__(self, total_steps: int, *, initial: int = 0, stream: TextIO | None = None):
        """`initial` is the number of steps already done, of a resumed run."""
        stream = sys.stderr if stream is None else stream
        self._total = total_steps
        self._shown = jax.process_index() == 0
        self._first: tuple[int, float] | None = None  # the first step seen, and when it had ended
        self._bar = None
        if self._shown and stream is not None and stream.isatty():  # pythonw has no stderr
            self._bar = tqdm(total=total_steps, initial=initial, file=stream, unit="step", dynamic_ncols=True)

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Step `step`, counted from 0, is done. Give metrics, named as they are logged, where they are at hand."""
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        if not self._shown:
            return
        if self._bar is not None:
            if metrics is not None:
                self._bar.set_postfix_str("  ".join(_headline(metrics)), refresh=False)
            self._bar.update(step + 1 - self._bar.n)
        elif metrics is not None:
            parts = [f"step {step}/{self._total}", *_headline(metrics), *self._time_left(step, now)]
            logger.info("%s", "  ".join(parts))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, exception_type, exception, traceback) -> None:
        self.close()

    def _time_left(self, step: int, now: float) -> list[str]:
        # Measured from the end of the first step, which compiles.
        first_step, first_end = self._first or (step, now)
        if step == first_step:
            return []
        seconds = round((now - first_end) / (step - first_step) * (self._total - step - 1))
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        return [f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left"]


_HEADLINE = {
    "train/loss": "loss {:.4f}",
    "train/dpo_accuracy": "accuracy {:.2f}",
    "train/pairs_per_second": "{:.1f} pairs/s",
}


def _headline(metrics: Mapping[str, float]) -> list[str]:
    return [text.format(_number(name, metrics[name])) for name, text in _HEADLINE.items() if name in metrics]


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
        # The stack calls every one of them, even after one has raised.
        with ExitStack() as stack:
            for tracker in self._trackers:
                stack.callback(tracker.finish, exit_code=exit_code)


class _JsonLines(Tracker):
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


def _drop_torn_line(path: Path) -> None:
    """A run that was killed may have left half a line, which would spoil the next one too."""
    if path.exists():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


@contextmanager
def _redacted_arguments() -> Iterator[None]:
    """While wandb starts: it notes down the command line."""
    arguments = sys.argv
    sys.argv = [redact(argument) for argument in arguments]
    try:
        yield
    finally:
        sys.argv = arguments


class _WandbTracker(Tracker):
    def __init__(self, run):
        self._run = run

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def log_summary(self, metrics: Mapping[str, float]) -> None:
        self._run.summary.update(dict(metrics))

    def log_config(self, config: Mapping[str, Any]) -> None:
        self._run.config.update(dict(config), allow_val_change=True)

    def finish(self, *, exit_code: int = 0) -> None:
        self._run.finish(exit_code=exit_code)


class _TensorboardTracker(Tracker):
    def __init__(self, writer):
        self._writer = writer

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_summary(self, metrics: Mapping[str, float]) -> None:
        self.log(metrics, step=0)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Event files hold curves; the run's config.yaml holds the settings."""

    def finish(self, *, exit_code: int = 0) -> None:
        self._writer.close()


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: _number(name, value) for name, value in metrics.items()}


def _number(name: str, value: Any) -> float:
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        value = value.item()
    if not isinstance(value, int | float):
        raise TypeError(f"Metric {name!r} must be one number, found {value!r}.")
    return value
