import jax.numpy as jnp
import pytest
from tracked_runs import start

from lora_dpo_jax.tracking import TensorboardConfig


def test_each_tracker_may_be_named_once(tmp_path):
    with pytest.raises(ValueError, match="each may be named once"):
        start(tmp_path, TensorboardConfig(), TensorboardConfig())


def test_a_metric_that_is_not_one_number_is_refused_by_name(tmp_path):
    with start(tmp_path) as tracker, pytest.raises(TypeError, match="'train/loss' must be one number"):
        tracker.log({"train/loss": jnp.zeros(2)}, step=0)


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with start(tmp_path, TensorboardConfig()) as tracker:
        tracker.log({"train/loss": 0.5}, step=0)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_raised_finishes_its_trackers_as_failed(tmp_path, own_choices):
    finished = []

    class Recorder(TensorboardConfig):
        def start(self, **kwargs):
            tracker = super().start(**kwargs)
            finish = tracker.finish
            tracker.finish = lambda *, exit_code=0: (finished.append(exit_code), finish(exit_code=exit_code))
            return tracker

    TensorboardConfig.register_subclass("recorder", Recorder)
    with pytest.raises(KeyError), start(tmp_path, Recorder()):
        raise KeyError("the run")
    assert finished == [1]
