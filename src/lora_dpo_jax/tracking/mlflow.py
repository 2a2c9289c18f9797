"""MLflow: a server, or a local store."""

import hashlib
import logging
import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dpo_jax.tracking.interface import Tracker, TrackerConfig

logger = logging.getLogger("lora_dpo_jax")

TAG = "lora_dpo_jax.run"  # of an MLflow run: identifies the run that it belongs to
# Limits of MLflow's.
LONGEST_NAME, LONGEST_VALUE = 250, 6000
PARAMS_AT_ONCE, METRICS_AT_ONCE = 100, 1000
NOT_IN_NAMES = re.compile(r"[^\w/.\- ]")
PAUSE_SECONDS = 60.0  # after a failure, before the next metrics are sent


@TrackerConfig.register_subclass("mlflow")
@dataclass(frozen=True)
class MlflowConfig(TrackerConfig):
    """MLflow. Its client finds credentials in its own environment variables. Needs the extra `mlflow`."""

    tracking_uri: str | None = None  # https://..., sqlite:///...; null is MLflow's own: $MLFLOW_TRACKING_URI, or a file
    experiment: str = "lora_dpo_jax"  # made if there is none of this name
    name: str | None = None  # the name shown; null is the run's id

    def check_packages(self) -> None:
        try:
            import mlflow  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "trainer.tracker: mlflow needs a package that is not installed. Run: pip install 'lora_dpo_jax[mlflow]'"
            ) from error

    def start(self, *, run_dir: Path, run_id: str, resolved_config: dict) -> Tracker:
        self.check_packages()
        from mlflow import MlflowClient

        try:
            client = MlflowClient(self.tracking_uri)
            mlflow_id = self._open_run(client, run_id)
            tracker = _MlflowTracker(client, mlflow_id)
            tracker.send_params(resolved_config)
        # Also errors of its stores and of HTTP.
        except Exception as error:
            raise OSError(
                f"trainer.tracker: mlflow did not start: {' '.join(str(error).split())}. Check tracking_uri, or "
                "$MLFLOW_TRACKING_URI"
            ) from error
        return tracker

    def _open_run(self, client: Any, run_id: str) -> str:
        """The MLflow run of `run_id`, which a resumed run continues, or a new one."""
        experiment = client.get_experiment_by_name(self.experiment)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(self.experiment)
        # A digest, because MLflow's filters cannot quote every id.
        digest = hashlib.sha256(run_id.encode()).hexdigest()[:32]
        found = client.search_runs([experiment_id], filter_string=f"tags.`{TAG}` = '{digest}'", max_results=1)
        if not found:
            return client.create_run(experiment_id, run_name=self.name or run_id, tags={TAG: digest}).info.run_id
        mlflow_id = found[0].info.run_id
        client.update_run(mlflow_id, status="RUNNING")
        return mlflow_id


class _MlflowTracker(Tracker):
    """Sends from a thread of its own, so that no step waits. What was not accepted is kept and sent again later."""

    def __init__(self, client: Any, mlflow_id: str):
        self._client, self._id = client, mlflow_id
        self._known: set[str] = set(client.get_run(mlflow_id).data.params)
        self._unsent: list[Any] = []
        self._next_try = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlflow")

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        new = [Metric(_name(name), float(value), now, step) for name, value in metrics.items()]
        self._thread.submit(self._send, new)

    def log_summary(self, metrics: Mapping[str, float]) -> None:
        self.log(metrics, step=0)

    def log_config(self, config: Mapping[str, Any]) -> None:
        self._thread.submit(self._attempt, "settings", lambda: self.send_params(config))

    def send_params(self, config: Mapping[str, Any]) -> None:
        """Sends the settings that the run has none of yet, because MLflow allows no changes."""
        from mlflow.entities import Param

        new = {name: value for name, value in _flat(config) if name not in self._known}
        params = [Param(name, value) for name, value in new.items()]
        for start in range(0, len(params), PARAMS_AT_ONCE):
            self._client.log_batch(self._id, params=params[start : start + PARAMS_AT_ONCE])
        self._known |= new.keys()

    def finish(self, *, exit_code: int = 0) -> None:
        self._thread.submit(self._end, "FAILED" if exit_code else "FINISHED")
        self._thread.shutdown(wait=True)

    def _send(self, metrics: list[Any]) -> None:
        self._unsent += metrics
        if time.monotonic() >= self._next_try and not self._attempt("metrics", self._send_all):
            self._next_try = time.monotonic() + PAUSE_SECONDS

    def _send_all(self) -> None:
        while self._unsent:
            self._client.log_batch(self._id, metrics=self._unsent[:METRICS_AT_ONCE])
            del self._unsent[:METRICS_AT_ONCE]

    def _end(self, status: str) -> None:
        if self._attempt("last metrics", self._send_all):
            self._attempt("end", lambda: self._client.set_terminated(self._id, status))

    def _attempt(self, what: str, send: Any) -> bool:
        try:
            send()
        except Exception as error:  # also errors of its stores and of HTTP
            text = " ".join(str(error).split())
            logger.warning("mlflow did not take the %s of the run; metrics.jsonl has all metrics: %s", what, text)
            return False
        return True


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, value) of each setting, as MLflow allows them."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield _name(f"{prefix}{key}"), str(value)[:LONGEST_VALUE]


def _name(text: str) -> str:
    return NOT_IN_NAMES.sub("_", text)[:LONGEST_NAME]
