"""Where metrics go: metrics.jsonl always, the trackers that are asked for, the terminal."""

from lora_dpo_jax.tracking.composite import NoTrackerConfig, check_trackers, start_trackers
from lora_dpo_jax.tracking.interface import Tracker, TrackerConfig, TrackerConfigs
from lora_dpo_jax.tracking.metrics_file import cut_metrics
from lora_dpo_jax.tracking.mlflow import MlflowConfig
from lora_dpo_jax.tracking.progress import ProgressBar
from lora_dpo_jax.tracking.tensorboard import TensorboardConfig
from lora_dpo_jax.tracking.trackio import TrackioConfig
from lora_dpo_jax.tracking.wandb import WandbConfig

__all__ = [
    "MlflowConfig",
    "NoTrackerConfig",
    "ProgressBar",
    "TensorboardConfig",
    "Tracker",
    "TrackerConfig",
    "TrackerConfigs",
    "TrackioConfig",
    "WandbConfig",
    "check_trackers",
    "cut_metrics",
    "start_trackers",
]
