"""No two processes work on one run, and none that is dead keeps another from it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from google_storage import google_storage

from lora_dpo_jax.processes import run_lock
from lora_dpo_jax.processes.run_lock import LOCK, RunIsActiveError, RunLock, process_started

# The module alone, without JAX: a process that takes the lock, says so, and stays.
HOLDER = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("run_lock", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
with module.RunLock(sys.argv[2], "my-run"):
    print("taken", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process of this machine that is at work in tmp_path / "run"."""
    command = [sys.executable, "-c", HOLDER, run_lock.__file__, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "taken\n"
        yield process
        process.kill()


@pytest.fixture
def brief(monkeypatch):
    """What takes a minute takes a second."""
    monkeypatch.setattr(run_lock, "SIGN_SECONDS", 0.1)
    monkeypatch.setattr(run_lock, "SILENCE_SECONDS", 1.0)


def left_by(folder: Path, **changes) -> dict:
    """A lock as it is left behind, of a process that is not this one."""
    folder.mkdir(exist_ok=True)
    content = {**RunLock(folder, "my-run").me, "sign": 3, **changes}
    (folder / LOCK).write_text(json.dumps(content))
    return content


OF_ANOTHER_MACHINE = {"kernel": "another", "host": "node-7", "process": 4711}


def test_the_second_process_ends_at_once_and_names_the_first(holder, tmp_path):
    began, before = time.monotonic(), json.loads((tmp_path / "run" / LOCK).read_text())
    told = f"trainer.id='my-run': process {holder.pid} on {os.uname().nodename} is at work on this run, since 20"
    with pytest.raises(RunIsActiveError, match=told), RunLock(tmp_path / "run", "my-run"):
        pytest.fail("two processes work on one run")
    assert time.monotonic() - began < 1.0
    assert json.loads((tmp_path / "run" / LOCK).read_text())["token"] == before["token"]


@pytest.mark.parametrize("is_waited_for", [True, False], ids=["and gone", "and a zombie"])
def test_a_run_that_was_killed_is_taken_over_at_once(holder, tmp_path, is_waited_for):
    holder.send_signal(signal.SIGKILL)
    if is_waited_for:
        holder.wait()
    while process_started(holder.pid) is not None:
        time.sleep(0.01)
    assert (tmp_path / "run" / LOCK).exists()
    began = time.monotonic()
    with RunLock(tmp_path / "run", "my-run") as lock:
        assert json.loads((tmp_path / "run" / LOCK).read_text())["process"] == lock.me["process"] == os.getpid()
    assert time.monotonic() - began < 1.0
    assert list((tmp_path / "run").iterdir()) == []


def test_a_process_of_the_same_number_is_not_taken_for_the_dead_one(tmp_path):
    left_by(tmp_path, started=1)
    with RunLock(tmp_path, "my-run"):
        pass


def test_this_process_counts_too(tmp_path):
    with RunLock(tmp_path, "my-run"):
        with pytest.raises(RunIsActiveError, match=f"process {os.getpid()} on"), RunLock(tmp_path, "my-run"):
            pass
        assert (tmp_path / LOCK).exists()


def test_a_silent_process_of_another_machine_is_taken_over_after_a_while(brief, tmp_path, caplog):
    left_by(tmp_path, **OF_ANOTHER_MACHINE)
    caplog.set_level("INFO", "lora_dpo_jax")
    began = time.monotonic()
    with RunLock(tmp_path, "my-run"):
        assert 1.0 <= time.monotonic() - began < 3.0
    assert "run.lock: waiting for a sign of life of process 4711 on node-7, 1 s at most" in caplog.text


def test_a_process_of_another_machine_that_gives_signs_is_at_work(brief, tmp_path):
    content = left_by(tmp_path, **OF_ANOTHER_MACHINE)
    sign = threading.Timer(0.3, lambda: left_by(tmp_path, **content | {"sign": 4}))
    sign.start()
    with pytest.raises(
        RunIsActiveError, match="process 4711 on node-7 is at work .*process is gone all the same, remove .*run.lock"
    ):
        RunLock(tmp_path, "my-run").__enter__()
    sign.join()
    assert json.loads((tmp_path / LOCK).read_text())["sign"] == 4


def test_a_process_of_another_machine_that_ends_in_the_meantime_is_followed(brief, tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "SILENCE_SECONDS", 60.0)
    left_by(tmp_path, **OF_ANOTHER_MACHINE)
    threading.Timer(0.3, (tmp_path / LOCK).unlink).start()
    with RunLock(tmp_path, "my-run"):
        pass


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "null", '{"kernel": HERE, "process": 1}', '{"kernel": HERE, "process": null, "started": 1}'],
)
def test_a_damaged_lock_is_taken_over_after_a_while(brief, tmp_path, text):
    (tmp_path / LOCK).write_text(text.replace("HERE", json.dumps(run_lock._kernel())))
    with RunLock(tmp_path, "my-run"):
        pass


def test_signs_of_life_are_given_until_the_end(brief, tmp_path):
    def sign() -> int:
        return json.loads((tmp_path / LOCK).read_text())["sign"]

    with RunLock(tmp_path, "my-run"):
        deadline = time.monotonic() + 10
        while sign() < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_was_taken_over_is_told_and_leaves_the_lock_to_the_other(brief, tmp_path, caplog):
    with RunLock(tmp_path, "my-run"):
        content = left_by(tmp_path, **OF_ANOTHER_MACHINE, token="theirs")
        deadline = time.monotonic() + 10
        while "process 4711 on node-7 has taken over this run; end one of the two" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert json.loads((tmp_path / LOCK).read_text()) == content


def test_folders_that_it_made_go_unless_something_came_in(tmp_path):
    with RunLock(tmp_path / "logs" / "run", "my-run"):
        pass
    assert list(tmp_path.iterdir()) == []
    with RunLock(tmp_path / "logs" / "run", "my-run"):
        (tmp_path / "logs" / "run" / "metrics.jsonl").touch()
    assert [path.name for path in (tmp_path / "logs" / "run").iterdir()] == ["metrics.jsonl"]


def test_of_those_that_start_at_the_same_moment_one_has_it(tmp_path):
    start, end = threading.Barrier(8), threading.Barrier(8)

    def takes(_) -> bool:
        start.wait()
        try:
            with RunLock(tmp_path, "my-run"):
                end.wait()
                return True
        except RunIsActiveError:
            end.wait()
            return False

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(takes, range(8))) == 1


def test_a_bucket_has_one_process_too(brief, monkeypatch):
    monkeypatch.setattr(run_lock, "SETTLE_SECONDS", 0.1)
    with google_storage("runs") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        store = fsspec.filesystem("gs", skip_instance_cache=True, use_listings_cache=False)
        with RunLock("gs://runs/checkpoints/my-run", "my-run"):
            with pytest.raises(
                RunIsActiveError, match=f"process {os.getpid()} on .*gs://runs/checkpoints/my-run/run.lock"
            ):
                RunLock("gs://runs/checkpoints/my-run", "my-run").__enter__()
        assert store.find("runs") == []
