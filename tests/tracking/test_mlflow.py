"""Against MLflow's store in a folder, which needs no server and no database."""

import logging
import math
import re
import sys

import jax.numpy as jnp
import pytest
from tracked_runs import read_metrics, start

from lora_dpo_jax.tracking import MlflowConfig, start_trackers


@pytest.fixture(autouse=True)
def allow_folders(monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


@pytest.fixture
def config(tmp_path) -> MlflowConfig:
    return MlflowConfig(tracking_uri=f"file://{tmp_path}/mlruns", experiment="e")


@pytest.fixture
def client(config):
    from mlflow import MlflowClient

    return MlflowClient(config.tracking_uri)


def only_run(client):
    (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    return run


def history(client, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(only_run(client).info.run_id, name)]


def test_mlflow_keeps_settings_and_metrics_and_a_resumed_run_continues_them(tmp_path, config, client):
    with start(tmp_path, config) as tracker:
        assert only_run(client).info.status == "RUNNING"
        tracker.log_config({"beta": 0.2, "data": {"odd name!": "x" * 7000}})
        tracker.log_summary({"parameter_count": 7})
        tracker.log({"train/loss": jnp.asarray(0.5), "odd name!": 1}, step=0)
    with pytest.raises(KeyError), start(tmp_path, config) as tracker:
        assert only_run(client).info.status == "RUNNING"
        tracker.log({"train/loss": math.nan}, step=1)
        tracker.log({"train/loss": math.inf}, step=2)
        raise KeyError("the run")
    run = only_run(client)
    assert (run.info.run_name, run.info.status) == ("some-id", "FAILED")
    # MLflow changes no param: the first value stays.
    assert run.data.params == {"beta": "0.1", "data.odd name_": "x" * 6000}
    assert history(client, "parameter_count") == [(0, 7.0)] and history(client, "odd name_") == [(0, 1.0)]
    (first, (step, value), last) = history(client, "train/loss")
    assert (first, step, last) == ((0, 0.5), 1, (2, math.inf)) and math.isnan(value)


def test_another_run_is_another_one_whatever_its_id(config, client):
    for run_id in ("a", 'it\'s a "run"', 'it\'s a "run"'):
        config.start(run_dir=None, run_id=run_id, resolved_config={}).finish()
    runs = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["a", 'it\'s a "run"']
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_what_a_store_did_not_take_is_sent_when_it_is_back(tmp_path, config, client, monkeypatch, caplog):
    from mlflow import MlflowClient

    tried, log_batch = [], MlflowClient.log_batch

    def fail(self, *_, **__):
        tried.append(1)
        raise ConnectionError("no route\nto host")

    with caplog.at_level(logging.WARNING), start(tmp_path, config) as tracker:
        monkeypatch.setattr(MlflowClient, "log_batch", fail)
        for step in range(3):
            tracker.log({"train/loss": 0.5}, step=step)
        tracker._trackers[1]._thread.submit(lambda: None).result()  # all before it were tried
        monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    assert len(tried) == 1, "a store that fails is left alone for a while"
    assert "mlflow did not take the metrics of the run; metrics.jsonl has all metrics: no route to host" in caplog.text
    assert [step for step, _ in history(client, "train/loss")] == [0, 1, 2]
    assert len(read_metrics(tmp_path)) == 3


def test_a_store_that_is_gone_costs_no_run(tmp_path, config, monkeypatch, caplog):
    from mlflow import MlflowClient

    with caplog.at_level(logging.WARNING), start(tmp_path, config) as tracker:
        for method in ("log_batch", "set_terminated"):
            monkeypatch.setattr(MlflowClient, method, lambda *_, **__: 1 / 0)
        tracker.log({"train/loss": 0.5}, step=0)
    assert "did not take the last metrics" in caplog.text


def test_an_mlflow_that_does_not_start_is_named_by_the_setting(tmp_path):
    with pytest.raises(OSError, match=r"^trainer\.tracker: mlflow did not start: .*nowhere.* Check tracking_uri"):
        MlflowConfig(tracking_uri="nowhere://x").start(run_dir=tmp_path, run_id="r", resolved_config={})


def test_without_mlflow_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'lora_dpo_jax[mlflow]'")):
        start_trackers([MlflowConfig()], run_dir=tmp_path, run_id="r", resolved_config={})
