"""Weights & Biases."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lora_dpo_jax.redaction import redact
from lora_dpo_jax.tracking.interface import Tracker, TrackerConfig


@TrackerConfig.register_subclass("wandb")
@dataclass(frozen=True)
class WandbConfig(TrackerConfig):
    """Weights & Biases. A null setting is left to wandb: its environment variables, then its own defaults."""

    project: str | None = None  # the project of the run
    entity: str | None = None  # the user or team
    name: str | None = None  # the name shown; null is the run's id
    group: str | None = None  # a group of runs
    tags: list[str] = field(default_factory=list)  # of the run
    mode: Literal["online", "offline", "disabled"] | None = None  # null: online, unless the environment sets a mode
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
                    # wandb cannot look up an offline run, and warns if asked to. Syncing resumes the run by its id.
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


@contextmanager
def _redacted_arguments() -> Iterator[None]:
    """Redacts the command line while wandb starts, because wandb stores it."""
    arguments = sys.argv
    sys.argv = [redact(argument) for argument in arguments]
    try:
        yield
    finally:
        sys.argv = arguments
