"""The settings of checkpoints: when they are saved, which are kept, and where."""

import re
import threading
from dataclasses import dataclass, field
from pathlib import Path

from etils import epath

UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}


@dataclass(frozen=True)
class CheckpointInterval:
    """The checkpoints after every `every` steps are kept, up to step `until`."""

    every: int  # steps
    until: int | None = None  # the last step of the rule; null, only allowed in the last rule, means all later steps


@dataclass(frozen=True)
class CheckpointerConfig:
    """When checkpoints are saved and which are kept. Names and rules are Levanter's.

    The first rule of `keep` that reaches a checkpoint's step decides whether it is kept. The last checkpoint always is.
    Checkpoints by the clock, or on a signal, are temporary: they are deleted when a newer one is complete.
    """

    base_path: str | None = None  # a folder or a gs:// URL; null is `checkpoints` in the run's folder
    append_run_id_to_base_path: bool = True  # the id is a folder in base_path
    save_interval: str | None = "15m"  # 1h30m, 90s; a bare number is in minutes; null saves none by the clock
    # Rules, by rising `until`, for the steps whose checkpoints are saved and kept. The last step's always is.
    keep: list[CheckpointInterval] = field(default_factory=lambda: [CheckpointInterval(every=10_000)])

    def __post_init__(self):
        if "://" in (self.base_path or "") and not str(self.base_path).startswith("gs://"):
            raise ValueError(
                f"trainer.checkpointer.base_path={self.base_path!r}: checkpoints go to a folder or to gs://, the only "
                "object store that Orbax writes to. Elsewhere, mount the bucket as a folder"
            )
        if any(rule.every < 1 for rule in self.keep):
            raise ValueError(f"trainer.checkpointer.keep={self.keep}: every must be at least 1")
        untils = [rule.until for rule in self.keep]
        known = [until for until in untils if until is not None]
        if None in untils[:-1] or known != sorted(set(known)):
            raise ValueError(f"trainer.checkpointer.keep: until={untils} must rise, and only the last may be null")
        self.interval_seconds  # noqa: B018  (raises if it cannot be parsed)

    @property
    def interval_seconds(self) -> float | None:
        return None if self.save_interval is None else _seconds(self.save_interval)

    def keeps(self, step: int) -> bool:
        rule = next((rule for rule in self.keep if rule.until is None or step <= rule.until), None)
        return rule is not None and step % rule.every == 0

    def folder(self, run_dir: Path, run_id: str) -> epath.Path:
        if self.base_path is None:
            return epath.Path(run_dir.absolute()) / "checkpoints"
        base = epath.Path(self.base_path).expanduser()
        base = base if "://" in self.base_path else base.absolute()
        return base / run_id if self.append_run_id_to_base_path else base


def _seconds(text: str) -> float:
    """The seconds of 1h30m, 10m or 90s; a number alone is in minutes."""
    compact = text.lower().replace(" ", "")
    if re.fullmatch(r"\d+(\.\d+)?", compact):
        compact += "m"
    parts = re.findall(r"(\d+(?:\.\d+)?)([hms])", compact)
    seconds = sum(float(number) * UNITS[unit] for number, unit in parts)
    if "".join(map("".join, parts)) != compact or not 0 < seconds < threading.TIMEOUT_MAX:
        raise ValueError(f"trainer.checkpointer.save_interval={text!r} is no time; for example 10m, 1h30m or 90s")
    return seconds
