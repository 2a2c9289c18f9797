import json

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_disks import no_file_larger_than
from tracked_runs import read_metrics, start

from lora_dpo_jax.tracking import NoTrackerConfig, cut_metrics


def test_metrics_are_json_lines_as_soon_as_they_are_logged(tmp_path):
    with start(tmp_path, NoTrackerConfig()) as tracker:
        tracker.log_summary({"parameter_count": 123})
        tracker.log_config({"seed": 1})
        tracker.log({"train/loss": 0.5}, step=0)
        tracker.log({"train/loss": jnp.asarray(0.25), "eval/loss": np.float32(0.75)}, step=10)
        lines = read_metrics(tmp_path)
    assert lines == [
        {"step": 0, "parameter_count": 123},
        {"step": 0, "train/loss": 0.5},
        {"step": 10, "train/loss": 0.25, "eval/loss": 0.75},
    ]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["metrics.jsonl"]


def test_a_full_disk_is_told_by_the_file(tmp_path):
    told = "metrics.jsonl: (the metrics of step 3 could not be written: .*|only a part of a line could be written)"
    with start(tmp_path) as tracker:
        tracker.log({"train/loss": 0.5}, step=2)
        with no_file_larger_than(40), pytest.raises(OSError, match=told):
            tracker.log({"train/loss": 0.25}, step=3)
    with start(tmp_path) as tracker:
        tracker.log({"train/loss": 0.25}, step=3)
    assert read_metrics(tmp_path) == [{"step": 2, "train/loss": 0.5}, {"step": 3, "train/loss": 0.25}]


def test_what_is_not_finite_is_null(tmp_path):
    with start(tmp_path) as tracker:
        tracker.log({"a": float("nan"), "b": jnp.inf, "c": -np.inf, "d": 1.0}, step=3)
    assert read_metrics(tmp_path) == [{"step": 3, "a": None, "b": None, "c": None, "d": 1.0}]


def test_a_resumed_run_appends(tmp_path):
    for step in (0, 1):
        with start(tmp_path) as tracker:
            tracker.log({"train/loss": 0.5}, step=step)
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1]


def test_a_line_torn_by_a_crash_is_dropped_on_resuming(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0, "train/loss": 0.5}\n{"step": 1, "tr')
    with start(tmp_path) as tracker:
        tracker.log({"train/loss": 0.4}, step=1)
    assert read_metrics(tmp_path) == [{"step": 0, "train/loss": 0.5}, {"step": 1, "train/loss": 0.4}]


def test_what_a_run_that_goes_on_will_log_again_is_cut(tmp_path):
    with start(tmp_path) as tracker:
        tracker.log_summary({"parameter_count": 7})
        for step in range(4):
            tracker.log({"eval/loss": 0.5}, step=step)
            tracker.log({"train/loss": 0.5}, step=step)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tr')
    before = read_metrics_of(tmp_path, 9)
    assert cut_metrics(tmp_path / "run", 9) == before, "but for the torn line"
    assert cut_metrics(tmp_path / "run", 2) == before[:5] == read_metrics(tmp_path)
    assert [line["step"] for line in before[:5]] == [0, 0, 0, 1, 1]
    assert cut_metrics(tmp_path / "run", 0) == [] == read_metrics(tmp_path)
    assert cut_metrics(tmp_path / "elsewhere", 3) == []
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def read_metrics_of(tmp_path, lines: int) -> list[dict]:
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()[:lines]]


@pytest.mark.parametrize(
    "line",
    [b'{"loss": 1}', b"[1]", b"5", b'{"step": null}', b'{"step": "1"}', b'{"step": 1, "loss": "x"}', b"{", b"\xff"],
)
def test_a_line_of_metrics_that_is_none_is_named_by_its_number(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0, "loss": null}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: (is|must) .* remove the line to resume this run"):
        cut_metrics(tmp_path, 3)
