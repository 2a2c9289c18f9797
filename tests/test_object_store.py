"""Whole runs that read from and write to an object store, of which a small server here speaks the protocol."""

from collections.abc import Iterator
from pathlib import Path

import boto3
import fsspec
import numpy as np
import pytest
from google_storage import google_storage
from moto.server import ThreadedMotoServer
from safetensors.numpy import load_file
from tiny_runs import instruct_folder, preference_rows, read_metrics, run_config, write_rows

from lora_dpo_jax.main.train import main

pytestmark = pytest.mark.usefixtures("two_devices")

BUCKET = "s3://runs"


@pytest.fixture(scope="module")
def store() -> Iterator[fsspec.AbstractFileSystem]:
    """An empty bucket, which this process finds by the environment, as a user's would."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    settings |= {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "secret"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket=BUCKET.removeprefix("s3://"))
        yield fsspec.filesystem("s3")
    server.stop()


def test_a_run_from_an_object_store_to_an_object_store_is_the_run_on_disk(store, tmp_path):
    rows = write_rows(tmp_path / "train.jsonl", preference_rows(8))
    store.put(str(instruct_folder()), f"{BUCKET}/model", recursive=True)
    store.put(str(rows), f"{BUCKET}/data/train.jsonl")
    metrics, adapters, merged = [], [], []
    for name, source, exports in [
        ("disk", str(instruct_folder()), str(tmp_path / "exports")),
        ("store", f"{BUCKET}/model", f"{BUCKET}/exports"),
    ]:
        (tmp_path / name).mkdir()
        config = run_config(
            tmp_path / name,
            rows if name == "disk" else f"{BUCKET}/data/train.jsonl",  # pyright: ignore[reportArgumentType]
            initialize_from_hf=source,
            peft_save_path=f"{exports}/adapter",
            merged_hf_save_path=f"{exports}/merged",
        )
        main(config)
        metrics.append([line["train/loss"] for line in read_metrics(config) if "train/loss" in line])
        if name == "store":
            store.get(f"{exports}/", str(tmp_path / "fetched"), recursive=True)
            exports = str(tmp_path / "fetched")
        adapters.append(load_file(Path(exports, "adapter", "adapter_model.safetensors")))
        merged.append(load_file(Path(exports, "merged", "model.safetensors")))
    assert metrics[0] == metrics[1]
    for disk, stored in (adapters, merged):
        assert disk.keys() == stored.keys()
        assert all((disk[name] == stored[name]).all() for name in disk)


def test_a_missing_bucket_is_known_before_anything_is_computed_and_not_made(store, tmp_path):
    rows = write_rows(tmp_path / "train.jsonl", preference_rows(8))
    config = run_config(tmp_path, rows, peft_save_path="s3://no-such-bucket/adapter")
    with pytest.raises(OSError, match="^peft_save_path: .*s3://no-such-bucket/adapter"):
        main(config)
    assert not (tmp_path / "logs").exists()
    assert not store.exists("s3://no-such-bucket")


@pytest.fixture
def bucket() -> Iterator[fsspec.AbstractFileSystem]:
    """An empty one of Google's."""
    with google_storage("runs") as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        # One that has seen nothing of what the run's own does.
        yield fsspec.filesystem("gs", skip_instance_cache=True, use_listings_cache=False)


def test_a_bucket_gives_back_each_content_whole(bucket):
    """The emulator dropped a last byte of 0x0d."""
    for end in (b"", b"\r", b"\n", b"\r\n", b"\r\r\n", b"\n\r", b"\0", b"--"):
        bucket.pipe("runs/content", b"first\r\nsecond\n" + end)
        assert bucket.cat("runs/content") == b"first\r\nsecond\n" + end


def test_a_run_goes_on_from_the_newest_whole_checkpoint_in_a_bucket(bucket, tmp_path, caplog):
    rows = write_rows(tmp_path / "train.jsonl", preference_rows(8))

    def run(name: str, base_path: str | None) -> dict[str, np.ndarray]:
        (tmp_path / name).mkdir()
        config = run_config(
            tmp_path / name,
            rows,
            trainer__num_train_steps=4,
            trainer__checkpointer={"base_path": base_path, "keep": [{"every": 2}]},
            peft_save_path=str(tmp_path / name / "adapter"),
        )
        with caplog.at_level("INFO", "lora_dpo_jax"):
            main(config)
        return load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")

    def went_on(name: str) -> str:
        caplog.clear()
        adapter = run(name, "gs://runs/checkpoints")
        assert all((adapter[tensor] == on_disk[tensor]).all() for tensor in on_disk)
        return caplog.text

    on_disk = run("on disk", None)
    folder = "runs/checkpoints/run"
    assert "resuming from" not in went_on("whole")
    assert {path.split("/")[3] for path in bucket.find(folder)} == {"step-2", "step-4"}

    flipped = next(path for path in bucket.find(f"{folder}/step-4/d"))
    content = bucket.cat(flipped)
    bucket.pipe(flipped, bytes([content[0] ^ 1]) + content[1:])
    told = went_on("flipped")
    assert "the content of its file d/" in told and "resuming from gs://runs/checkpoints/run/step-2" in told

    # Killed just before the last thing that Orbax writes.
    bucket.rm(f"{folder}/step-4/commit_success.txt")
    told = went_on("not finished")
    assert "it has no commit_success.txt" in told and "resuming from gs://runs/checkpoints/run/step-2" in told
    assert "resuming from gs://runs/checkpoints/run/step-4" in went_on("done")
