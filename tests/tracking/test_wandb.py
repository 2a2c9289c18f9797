import json
import struct
import time

import jax.numpy as jnp
import pytest
import wandb
from tracked_runs import read_metrics, start
from wandb.proto import wandb_internal_pb2

from lora_dpo_jax.tracking import WandbConfig


@pytest.fixture(autouse=True)
def quiet_wandb(monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_a_wandb_that_does_not_start_is_told_by_the_setting(tmp_path, monkeypatch):
    def refuse(**settings):
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(
        OSError, match=r"^trainer\.tracker: wandb did not start: No API key configured\. .*mode: offline"
    ):
        WandbConfig().start(run_dir=tmp_path, run_id="r", resolved_config={})


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
