import io
import json
import logging
import re
import struct
import sys
import time
from dataclasses import dataclass, field

import draccus
import jax.numpy as jnp
import numpy as np
import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_disks import no_file_larger_than
from wandb.proto import wandb_internal_pb2

from lora_dpo_jax.settings.arguments import parse
from lora_dpo_jax.settings.config_file import read_yaml
from lora_dpo_jax.settings.decoding import config_of
from lora_dpo_jax.tracking import (
    NoTrackerConfig,
    ProgressBar,
    TensorboardConfig,
    TrackerConfigs,
    WandbConfig,
    cut_metrics,
    start_trackers,
)


@dataclass(frozen=True)
class Run:
    """Stands for the config of a trainer."""

    tracker: TrackerConfigs = field(default_factory=list)


SPELLINGS = {
    "wandb": [WandbConfig()],
    "none": [NoTrackerConfig()],
    "null": [],
    "[]": [],
    "[wandb, tensorboard]": [WandbConfig(), TensorboardConfig()],
    "{type: wandb, project: p, tags: [a, b]}": [WandbConfig(project="p", tags=["a", "b"])],
    "[{type: wandb, mode: offline}, {type: tensorboard}]": [WandbConfig(mode="offline"), TensorboardConfig()],
    "[tensorboard, {type: wandb, entity: e}]": [TensorboardConfig(), WandbConfig(entity="e")],
}


@pytest.mark.parametrize("text", SPELLINGS)
def test_every_spelling_of_tracker_parses_in_a_file_and_on_the_command_line(text):
    assert config_of(Run, read_yaml(f"tracker: {text}")).tracker == SPELLINGS[text]
    assert parse(Run, ["--tracker", text]).tracker == SPELLINGS[text]


@pytest.mark.parametrize("text", SPELLINGS)
def test_a_dumped_config_parses_to_itself(text):
    run = Run(tracker=SPELLINGS[text])
    assert config_of(Run, read_yaml(str(draccus.dump(run)))) == run


@pytest.mark.parametrize(
    "text, message",
    [
        ("mlflow", "tracker.0.type='mlflow' must be one of wandb, tensorboard, none"),
        ("[wandb, {project: p}]", "tracker.1.type is missing; it must be one of wandb, tensorboard, none"),
        ("{type: tensorboard, project: p}", "tracker.0.project is a setting of type wandb alone"),
        ("{type: wandb, mode: sometimes}", "tracker.0.mode='sometimes' must be one of online, offline, disabled"),
        ("{type: wandb, project: null, tags: null}", "tracker.0.tags is null; it must be a list of texts"),
    ],
)
def test_a_wrong_tracker_is_refused_with_its_place_and_the_choices(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config_of(Run, read_yaml(f"tracker: {text}"))


def start(tmp_path, *configs):
    return start_trackers(configs, run_dir=tmp_path / "run", run_id="some-id", resolved_config={"beta": 0.1})


def read_metrics(tmp_path) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.fixture(autouse=True)
def quiet_wandb(monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")


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
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: is .* remove the line to resume this run"):
        cut_metrics(tmp_path, 3)


def test_a_metric_that_is_not_one_number_is_refused_by_name(tmp_path):
    with start(tmp_path) as tracker, pytest.raises(TypeError, match="'train/loss' must be one number"):
        tracker.log({"train/loss": jnp.zeros(2)}, step=0)


def test_a_wandb_that_does_not_start_is_told_by_the_setting(tmp_path, monkeypatch):
    def refuse(**settings):
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(
        OSError, match=r"^trainer\.tracker: wandb did not start: No API key configured\. .*mode: offline"
    ):
        WandbConfig().start(run_dir=tmp_path, run_id="r", resolved_config={})


def test_each_tracker_may_be_named_once(tmp_path):
    with pytest.raises(ValueError, match="each may be named once"):
        start(tmp_path, TensorboardConfig(), TensorboardConfig())


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with start(tmp_path, TensorboardConfig()) as tracker:
        tracker.log({"train/loss": 0.5}, step=0)
    assert list(tmp_path.iterdir()) == []


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


def wandb_records(path):
    """The whole records of a .wandb file: 7 bytes, then a LevelDB log in blocks of 32 KiB (checksum, length, kind)."""
    data, at, held = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:  # no header fits: the rest of the block is padding
            at += room
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        chunk = data[at + 7 : at + 7 + length]
        if len(chunk) < length:  # still being written
            return
        held += chunk
        at += 7 + length
        if kind in (1, 4):  # whole, or last part
            yield wandb_internal_pb2.Record.FromString(held)
            held = b""


def read_wandb(path) -> tuple[list[dict], dict]:
    """The history and the summary of an offline run that has finished."""

    def read(items) -> dict:
        return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}

    # wandb's own process writes the file, and its last block a moment after finish() has returned.
    deadline = time.monotonic() + 60
    while not any(record.HasField("exit") for record in wandb_records(path)):
        assert time.monotonic() < deadline, f"{path} was not finished within a minute"
        time.sleep(0.05)

    history, summary = [], {}
    for record in wandb_records(path):
        if record.HasField("history"):
            history.append(read(record.history.item))
        if record.HasField("summary"):
            summary.update(read(record.summary.update))
    return history, summary


def test_wandb_offline_keeps_settings_and_metrics_in_the_run_folder(tmp_path):
    config = WandbConfig(project="p", name="n", group="g", tags=["t"], mode="offline")
    with start(tmp_path, config) as tracker:
        run = wandb.run
        assert run is not None
        assert (run.id, run.name, run.group, run.tags, run.project) == ("some-id", "n", "g", ("t",), "p")
        tracker.log_config({"seed": 1})
        assert dict(run.config) == {"beta": 0.1, "seed": 1}
        tracker.log_summary({"parameter_count": 7})
        tracker.log({"train/loss": jnp.asarray(0.5)}, step=4)
        tracker.log({"eval/loss": 0.75}, step=4)

    (path,) = (tmp_path / "run" / "wandb").glob("offline-run-*-some-id/run-some-id.wandb")
    history, summary = read_wandb(path)
    assert [(row["_step"], row["train/loss"], row["eval/loss"]) for row in history] == [(4, 0.5, 0.75)]
    assert summary["parameter_count"] == 7
    assert read_metrics(tmp_path)[1:] == [{"step": 4, "train/loss": 0.5}, {"step": 4, "eval/loss": 0.75}]


def test_wandb_disabled_writes_nothing_of_its_own(tmp_path):
    with start(tmp_path, WandbConfig(mode="disabled")) as tracker:
        tracker.log({"train/loss": 0.5}, step=0)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


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
