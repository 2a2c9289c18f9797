import io
import logging

import jax.numpy as jnp

from lora_dpo_jax.tracking import ProgressBar

METRICS = {"train/loss": jnp.asarray(0.63121), "train/dpo_accuracy": 0.718, "train/pairs_per_second": 12.34}


def test_without_a_terminal_progress_is_one_log_line_per_logged_step(monkeypatch, caplog):
    clock = iter([100.0, 110.0, 120.0, 130.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO), ProgressBar(200, initial=20, stream=io.StringIO()) as progress:
        progress.update(20, METRICS)
        progress.update(30)
        progress.update(40, METRICS)
        progress.update(199, {"train/loss": 0.5})
    assert [record.getMessage() for record in caplog.records] == [
        "step 20/200  loss 0.6312  accuracy 0.72  12.3 pairs/s",
        "step 40/200  loss 0.6312  accuracy 0.72  12.3 pairs/s  2:39 left",
        "step 199/200  loss 0.5000  0:00 left",
    ]


def test_on_a_terminal_progress_is_a_bar_with_the_same_figures():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with ProgressBar(30, initial=10, stream=stream) as progress:
        progress.update(28, METRICS)
        progress.update(29)
    last = stream.getvalue().rstrip().rpartition("\r")[2]
    assert "100%" in last and "30/30" in last
    assert "loss 0.6312  accuracy 0.72  12.3 pairs/s" in last
