"""Where metrics go."""

from lora_dpo_jax.tracking.trackers import (
    NoTrackerConfig,
    ProgressBar,
    TensorboardConfig,
    Tracker,
    TrackerConfig,
    TrackerConfigs,
    WandbConfig,
    check_trackers,
    cut_metrics,
    start_trackers,
)

__all__ = [
    "NoTrackerConfig",
    "ProgressBar",
    "TensorboardConfig",
    "Tracker",
    "TrackerConfig",
    "TrackerConfigs",
    "WandbConfig",
    "check_trackers",
    "cut_metrics",
    "start_trackers",
]
