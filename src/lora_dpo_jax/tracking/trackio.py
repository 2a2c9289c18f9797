"""Trackio: a local dashboard, or a Space of the Hugging Face hub."""

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dpo_jax.tracking.interface import Tracker, TrackerConfig


@TrackerConfig.register_subclass("trackio")
@dataclass(frozen=True)
class TrackioConfig(TrackerConfig):
    """Trackio, in its own store ($TRACKIO_DIR, or trackio in the cache of huggingface_hub). Needs the extra `trackio`.

    In a project, trackio knows a run by its name: a run of a known name continues that one's curves.
    """

    project: str = "lora_dpo_jax"  # the project of the run
    name: str | None = None  # of the run; null is its id, so that a resumed run continues its curves
    group: str | None = None  # a group of runs
    space_id: str | None = None  # a Space that shows the metrics to others, name/space; null: this machine alone
    private: bool = True  # if that Space has to be made

    def check_packages(self) -> None:
        try:
            import trackio  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "trainer.tracker: trackio needs a package that is not installed. Run: pip install "
                "'lora_dpo_jax[trackio]'"
            ) from error

    def start(self, *, run_dir: Path, run_id: str, resolved_config: dict) -> Tracker:
        self.check_packages()
        import trackio

        try:
            with _apart():
                run = trackio.init(
                    project=self.project,
                    name=self.name or run_id,
                    group=self.group,
                    space_id=self.space_id,
                    private=self.private,
                    config=resolved_config,
                    resume="allow",
                    embed=False,
                )
        # Errors of its own store, of the hub and of its client have nothing in common.
        except Exception as error:
            raise OSError(
                f"trainer.tracker: trackio did not start: {' '.join(str(error).split())}. Check its settings; without "
                "space_id, it needs no network"
            ) from error
        return _TrackioTracker(run)


class _TrackioTracker(Tracker):
    """A failure to write is a warning by trackio itself, which keeps what a Space did not take, and sends it later."""

    def __init__(self, run):
        self._run = run

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def log_summary(self, metrics: Mapping[str, float]) -> None:
        self.log(metrics, step=0)

    def log_config(self, config: Mapping[str, Any]) -> None:
        self._run.config.update(config)
        self._run._config_logged = False  # it is sent with the next metrics; trackio has no other way

    def finish(self, *, exit_code: int = 0) -> None:
        """Trackio has no failed runs."""
        import trackio

        with _apart():
            trackio.finish()


def _apart() -> redirect_stdout:
    """What trackio prints goes to stderr, because stdout has the results of the run."""
    return redirect_stdout(sys.stderr)
