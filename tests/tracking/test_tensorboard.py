import re
import sys

import jax.numpy as jnp
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tracked_runs import read_metrics, start

from lora_dpo_jax.tracking import TensorboardConfig


def test_tensorboard_reads_back_what_was_logged(tmp_path):
    with start(tmp_path, TensorboardConfig()) as tracker:
        tracker.log_summary({"parameter_count": 7})
        tracker.log({"train/loss": 0.5}, step=0)
        tracker.log({"train/loss": jnp.asarray(0.25)}, step=20)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()

    def scalars(tag):
        return [(event.step, event.tensor_proto.float_val[0]) for event in events.Tensors(tag)]

    assert scalars("train/loss") == [(0, 0.5), (20, 0.25)]
    assert scalars("parameter_count") == [(0, 7.0)]
    assert len(read_metrics(tmp_path)) == 3


def test_without_tensorboard_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.summary", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'lora_dpo_jax[tensorboard]'")):
        start(tmp_path, TensorboardConfig())
