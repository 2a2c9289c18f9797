import math
import re
import sys

import jax.numpy as jnp
import pytest
from tracked_runs import read_metrics, start

from lora_dpo_jax.tracking import TrackioConfig, start_trackers


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory):
    """Trackio's own store, in a folder of this module, which trackio reads from the environment when it is imported."""
    folder = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder))
        from trackio.sqlite_storage import SQLiteStorage
        from trackio.utils import TRACKIO_DIR

        assert folder == TRACKIO_DIR, "trackio was imported before"
        yield SQLiteStorage


def logged(store, project: str) -> list[dict]:
    return [{name: x for name, x in row.items() if name != "timestamp"} for row in store.get_logs(project, "some-id")]


def test_trackio_keeps_settings_and_metrics_and_a_resumed_run_continues_them(tmp_path, store, capsys):
    with start(tmp_path, TrackioConfig(project="p", group="g")) as tracker:
        tracker.log_config({"seed": 1})
        tracker.log_summary({"parameter_count": 7})
        tracker.log({"train/loss": jnp.asarray(0.5)}, step=0)
    with start(tmp_path, TrackioConfig(project="p", group="g")) as tracker:
        tracker.log({"train/loss": math.nan, "train/grad_norm": math.inf}, step=1)
    assert store.get_runs("p") == ["some-id"]
    rows = logged(store, "p")
    assert rows[:2] == [{"parameter_count": 7, "step": 0}, {"train/loss": 0.5, "step": 0}]
    assert math.isnan(rows[2].pop("train/loss")) and rows[2:] == [{"train/grad_norm": math.inf, "step": 1}]
    config = store.get_run_config("p", "some-id")
    assert (config["beta"], config["_Group"]) == (0.1, "g")
    assert len(read_metrics(tmp_path)) == 3
    assert capsys.readouterr().out == "", "stdout is for the results of the run"


def test_settings_that_come_later_are_added(tmp_path, store):
    with start(tmp_path, TrackioConfig(project="later")) as tracker:
        tracker.log_config({"seed": 1})
        tracker.log({"train/loss": 0.5}, step=0)
    config = store.get_run_config("later", "some-id")
    assert (config["beta"], config["seed"]) == (0.1, 1)


def test_a_run_has_the_name_that_is_set(tmp_path, store):
    with start(tmp_path, TrackioConfig(project="named", name="mine")) as tracker:
        tracker.log({"train/loss": 0.5}, step=0)
    assert store.get_runs("named") == ["mine"]


def test_a_store_that_fails_in_the_middle_costs_no_run(tmp_path, store, monkeypatch):
    def fail(**_):
        raise OSError("no space left on device")

    with pytest.warns(UserWarning, match="no space left"), start(tmp_path, TrackioConfig(project="full")) as tracker:
        monkeypatch.setattr(store, "bulk_log", fail)
        tracker.log({"train/loss": 0.5}, step=0)
    assert len(read_metrics(tmp_path)) == 1


def test_a_trackio_that_does_not_start_is_named_by_the_setting(tmp_path):
    with pytest.raises(OSError, match=r"^trainer\.tracker: trackio did not start: .*reserved"):
        TrackioConfig(project="registry-p").start(run_dir=tmp_path, run_id="r", resolved_config={})


def test_without_trackio_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'lora_dpo_jax[trackio]'")):
        start_trackers([TrackioConfig()], run_dir=tmp_path, run_id="r", resolved_config={})
