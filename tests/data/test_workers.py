"""Rows that several processes tokenize become what one process makes of them."""

import json
import logging
import os
import pickle
import signal
import threading
import time

import pytest

from lora_dpo_jax.data import cache, workers
from lora_dpo_jax.data.cache import load_examples
from lora_dpo_jax.data.config import ComponentConfig, FormatConfig, PreferenceDataConfig
from lora_dpo_jax.data.sources import RowError, UrlSource
from lora_dpo_jax.data.tokenizing import RowSettings, RowTokenizer
from lora_dpo_jax.data.workers import Workers, usable_cores

ROWS = [{"prompt": f"The cat {n}", "chosen": " sat there." * (n % 5 + 1), "rejected": " is good."} for n in range(90)]
EMPTY = {"prompt": "The cat", "chosen": "", "rejected": " is good."}
SAME = {"prompt": "The cat", "chosen": " is good.", "rejected": " is good."}


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    return make_tokenizer("chatml")


@pytest.fixture(scope="module", autouse=True)
def small_amounts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "ENOUGH_ROWS", 1)
        patch.setattr(cache, "ROWS_PER_BATCH", 4)
        yield


@pytest.fixture(scope="module")
def pool(tokenizer, small_amounts):
    """This process and a worker, which is started by the first use."""
    with Workers(tokenizer, 2) as pool:
        yield pool


@pytest.fixture
def at_second_batch(monkeypatch):
    """at_second_batch(what): is called with the pool when the workers are started, before the second batch is read."""

    def arrange(call):
        original = Workers.tokenized

        def interrupted(pool, batches):
            for number, batch in enumerate(batches):
                if number == 1:
                    call(pool)
                yield batch

        monkeypatch.setattr(Workers, "tokenized", lambda pool, settings, batches: original(
            pool, settings, interrupted(pool, batches)))  # fmt: skip

    return arrange


def wait_until(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def wait_until_ready(pool):
    if pool.num_proc > 1:
        wait_until(lambda: pool._ready or pool._death)


@pytest.fixture
def rows_here(monkeypatch):
    """The numbers of the rows that this process tokenizes."""
    numbers, original = [], RowTokenizer.__call__

    def noting(self, rows):
        numbers.extend(number for _, number, _ in rows)
        return original(self, rows)

    monkeypatch.setattr(RowTokenizer, "__call__", noting)
    return numbers


@pytest.fixture
def write(tmp_path):
    def write(rows, name="rows.jsonl"):
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
        return str(tmp_path / name)

    return write


def load(pool, urls, cache_dir, **format):
    component = ComponentConfig(UrlSource(urls), FormatConfig(**format))
    return cache._load(component, pool, "train", 48, cache_dir, "data")


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.glob("examples/*/*")}


def test_two_processes_write_the_bytes_of_one(
    pool, tokenizer, write, tmp_path, at_second_batch, rows_here, caplog, monkeypatch
):
    caplog.set_level(logging.INFO)
    deep = json.dumps({**ROWS[8], "more": 0}).replace("0}", "[" * 300 + "]" * 300 + "}")
    bad = [EMPTY, '{"chosen": "cut', SAME, {**ROWS[0], "chosen": " cat" * 50}, {"chosen": 5}, deep]
    urls = [write([*ROWS[:30], *bad, *ROWS[30:60]]), write([*bad, *ROWS[60:]], "more.jsonl")]
    drop = dict(slice_strategy="drop", invalid_rows="drop")
    one = load(Workers(tokenizer, 1), urls, tmp_path / "one", **drop)
    [told_by_one], tokenized_by_one = caplog.messages, list(rows_here)
    caplog.clear()
    rows_here.clear()

    at_second_batch(wait_until_ready)
    two = load(pool, urls, tmp_path / "two", **drop)
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")
    assert 0 < len(rows_here) < len(tokenized_by_one) == one.report["rows"] == two.report["rows"]
    assert caplog.messages == [told_by_one] and "10 dropped" in told_by_one


def test_the_first_bad_row_is_the_error_whoever_tokenizes_it(pool, tokenizer, tmp_path, at_second_batch):
    def halt(pool):  # so that this process finds a later bad row, and the end of the file, before the worker the first
        if pool.num_proc > 1:
            wait_until_ready(pool)
            pool._processes[0].send_signal(signal.SIGSTOP)
            threading.Timer(0.5, pool._processes[0].send_signal, [signal.SIGCONT]).start()

    at_second_batch(halt)
    # The worker is given the second batch of four.
    rows = [*ROWS[:6], SAME, *ROWS[7:9], EMPTY, *ROWS[10:13], EMPTY, *ROWS[14:40]]
    (tmp_path / "rows.json").write_text("[" + ",".join(map(json.dumps, rows)))
    for processes in (Workers(tokenizer, 1), pool):
        with pytest.raises(RowError, match="rows.json, row 7: chosen and rejected are the same 4 tokens$"):
            load(processes, [str(tmp_path / "rows.json")], tmp_path / "cache")
    assert list((tmp_path / "cache" / "examples").iterdir()) == []


def test_a_batch_that_cannot_be_sent_is_tokenized_here(pool, rows_here):
    settings = RowSettings(FormatConfig(), None, 48, ("table",))
    batches = [[(0, number, row)] for number, row in enumerate(ROWS, start=1)]
    batches[5] = [(0, 6, {**ROWS[5], "more": lambda: None})]
    results = list(pool.tokenized(settings, batches))
    assert [result.origins.tolist() for result in results] == [[[0, number]] for number in range(1, 91)]
    assert 6 in rows_here


@pytest.mark.parametrize("moment", ["before it is ready", "with rows"])
def test_a_worker_that_is_killed_ends_the_run_with_a_message(moment, tokenizer, write, tmp_path, at_second_batch):
    def kill(pool):
        wait_until(lambda: pool._processes)
        if moment == "with rows":
            wait_until_ready(pool)
        pool._processes[0].kill()
        if moment == "before it is ready":
            wait_until(lambda: pool._death)

    at_second_batch(kill)
    message = "^data.num_proc=2: a process that tokenized rows was killed by SIGKILL. If memory was short, set"
    with Workers(tokenizer, 2) as pool, pytest.raises(RuntimeError, match=message):
        load(pool, [write(ROWS)], tmp_path / "cache")
    assert list((tmp_path / "cache" / "examples").iterdir()) == []


def test_ctrl_c_ends_the_workers(tokenizer, write, tmp_path, at_second_batch):
    def stop(pool):
        wait_until(lambda: pool._processes)
        raise KeyboardInterrupt

    at_second_batch(stop)
    with pytest.raises(KeyboardInterrupt), Workers(tokenizer, 3) as pool:
        load(pool, [write(ROWS)], tmp_path / "cache")
    assert not [thread for thread in pool._threads if thread.is_alive()]
    assert [process.returncode for process in pool._processes] == [-signal.SIGKILL] * len(pool._processes)
    assert list((tmp_path / "cache" / "examples").iterdir()) == []


def test_a_worker_ends_with_the_process_that_started_it_and_not_by_signals(tokenizer):
    with workers._new_process() as worker:
        workers._send(worker.stdin, pickle.dumps(tokenizer))
        assert workers._receive(worker.stdout) == workers.tokenizer_digest(tokenizer).encode()
        for signum in (signal.SIGINT, signal.SIGTERM):  # as a terminal or a scheduler sends to all processes
            worker.send_signal(signum)
        workers._send(worker.stdin, pickle.dumps(RowSettings(FormatConfig(), None, 48, ("table",))))
        workers._send(worker.stdin, pickle.dumps([(0, 1, ROWS[0])]))
        assert pickle.loads(workers._receive(worker.stdout)).counts["kept"] == 1
        worker.stdin.close()  # as when that process is gone
        assert worker.wait(120) == 0


def test_a_tokenizer_that_cannot_be_sent_is_told_once(make_tokenizer, write, tmp_path, caplog):
    tokenizer = make_tokenizer("chatml")
    tokenizer.own = lambda: None
    with Workers(tokenizer, 3) as pool:
        assert len(load(pool, [write(ROWS)], tmp_path / "cache", strings="plain")) == len(ROWS)
    [message] = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert message.startswith("data.num_proc=3: fewer processes tokenize: the tokenizer cannot be sent: ")


@pytest.mark.parametrize("cores, is_plain, at_once", [(2, True, 2), (1, True, 1), (2, False, 1)])
def test_one_process_renders_a_batch_while_another_is_tokenized(tokenizer, monkeypatch, cores, is_plain, at_once):
    monkeypatch.setattr(workers, "usable_cores", lambda: cores)
    monkeypatch.setattr(workers, "is_plain_fast_tokenizer", lambda tokenizer: is_plain)
    running, most, original, lock = [0], [0], RowTokenizer.__call__, threading.Lock()
    both = threading.Barrier(at_once, timeout=60)

    def counting(self, rows):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        both.wait()
        with lock:
            running[0] -= 1
        both.wait()
        return original(self, rows)

    monkeypatch.setattr(RowTokenizer, "__call__", counting)
    batches = [[(0, number, row)] for number, row in enumerate(ROWS[:10], start=1)]
    results = [*Workers(tokenizer, 1).tokenized(RowSettings(FormatConfig(), None, 48, ("table",)), batches)]
    assert [result.origins.tolist() for result in results] == [[[0, number]] for number in range(1, 11)]
    assert most[0] == at_once


def test_few_rows_start_no_process(tokenizer, write, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "ENOUGH_ROWS", len(ROWS) + 1)
    with Workers(tokenizer, 2) as pool:
        assert len(load(pool, [write(ROWS)], tmp_path / "cache")) == len(ROWS)
        assert not pool._threads


def test_a_tokenizer_is_serialized_once_for_all_components(tokenizer, write, tmp_path, monkeypatch):
    calls, original = [], workers.tokenizer_digest
    monkeypatch.setattr(workers, "tokenizer_digest", lambda tokenizer: calls.append(1) or original(tokenizer))
    path = write(ROWS[:3])
    components = {
        f"part{n}": ComponentConfig(UrlSource([path], [path]), FormatConfig(label_field=str(n))) for n in range(3)
    }
    config = PreferenceDataConfig(components, cache_dir=str(tmp_path / "cache"), num_proc=1)
    train, validation = load_examples(config, tokenizer, train_seq_len=48)
    assert len(train) == len(validation) == 3 and len(calls) == 1


def test_the_automatic_number_of_processes_is_that_of_usable_cores(tokenizer, monkeypatch):
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    for cores, processes in ((1, 1), (3, 1), (4, 4), (200, 16)):
        monkeypatch.setattr(workers, "usable_cores", lambda cores=cores: cores)
        assert Workers(tokenizer).num_proc == processes
    assert Workers(tokenizer, 40).num_proc == 40
