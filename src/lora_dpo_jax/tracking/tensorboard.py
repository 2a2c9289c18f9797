"""TensorBoard."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dpo_jax.tracking.interface import Tracker, TrackerConfig


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
