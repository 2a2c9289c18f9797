"""Processes that tokenize rows beside this one, which tokenizes too and keeps the order.

    this process     rows 1-256  |  rows 1025-1280  |  ...     reads all rows, writes all results
    worker 1         rows 257-512, 513-768, ...
    worker 2         rows 769-1024, ...

Workers are started once there are enough rows, and take part when they are ready. Each has two batches, one to tokenize
and one to begin with next. A batch that a worker cannot do is done here, so errors are those of a single process.

A worker is a new Python, not a fork: JAX may have threads here. It imports no script of the user's, ignores Ctrl-C and
SIGTERM, and ends when its input does: this process decides, and when it ends in any way, its workers end.
"""

import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from transformers import PreTrainedTokenizerBase

from lora_dpo_jax.data.chat import is_plain_fast_tokenizer
from lora_dpo_jax.data.tokenizing import NumberedRow, RowSettings, RowTokenizer, TokenizedRows, tokenizer_digest

logger = logging.getLogger(__name__)

ENOUGH_ROWS = 2048  # about two seconds of one core, twice what the start of a worker takes
FEWEST_CORES = 4  # for more than one process by default
MOST_PROCESSES = 16  # of an automatic number; more are fed too slowly
BATCHES_OF_WORKER = 2
THREADS = 2  # of one process alone, if the tokenizer lets other threads run Python while it works
MOST_WAITING = 64  # batches that are done, while an earlier one is not
MAIN = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "from lora_dpo_jax.data.workers import main; main()"
)


@dataclass
class _Task:
    rows: Sequence[NumberedRow]
    settings: RowSettings
    message: bytes = b""  # the rows, pickled
    result: "Future[TokenizedRows | None]" = field(default_factory=Future)  # None: the worker could not do it


class Workers:
    """Tokenizes rows with up to `num_proc` processes, of which this is one.

    None: one for each core, at most 16, and this one alone on fewer than 4 cores. A context, which ends the workers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, num_proc: int | None = None):
        self.tokenizer = tokenizer
        cores = usable_cores()
        # One process uses several cores too, through the tokenizer's own threads: on two cores it is the faster way.
        self.num_proc = num_proc or (1 if cores < FEWEST_CORES else min(cores, MOST_PROCESSES))
        self._rows = 0  # read so far
        self._ready = 0  # workers that wait for rows
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._processes: list[subprocess.Popen] = []
        self._death: str | None = None
        self._lock, self._closed, self._has_warned = threading.Lock(), False, False

    @cached_property
    def _can_overlap(self) -> bool:
        # The Python code of other tokenizers may keep state.
        return usable_cores() > 1 and is_plain_fast_tokenizer(self.tokenizer)

    @cached_property
    def tokenizer_digest(self) -> str:
        return tokenizer_digest(self.tokenizer)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_) -> None:
        with self._lock:
            self._closed = True
        for process in self._processes:
            process.kill()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def tokenized(self, settings: RowSettings, batches: Iterable[Sequence[NumberedRow]]) -> Iterator[TokenizedRows]:
        """The result of each batch, in order. Raises RowError for an invalid row that the format forbids to drop.

        Errors of `batches` are raised after the results of the batches before them. Raises RuntimeError if a worker
        was killed.
        """
        tokenize = RowTokenizer(self.tokenizer, settings)
        errors: list[Exception] = []
        if self.num_proc == 1:
            batches = _until_error(batches, errors)
            yield from _in_threads(tokenize, batches) if self._can_overlap else map(tokenize, batches)
            if errors:
                raise errors[0]
            return
        batches = self._with_workers(_until_error(batches, errors))
        tasks: deque[_Task] = deque()
        batch = next(batches, None)
        while batch is not None or tasks:
            is_full = batch is None or len(tasks) >= MOST_WAITING
            if not is_full and self._given(batch, settings, tasks):
                batch = next(batches, None)
            elif tasks and (is_full or tasks[0].result.done()):
                task = tasks.popleft()
                yield self._result_of(task) or tokenize(task.rows)
            else:
                assert batch is not None
                tasks.append(_done_here(tokenize, batch, settings))
                batch = next(batches, None)
        if errors:
            raise errors[0]

    def _with_workers(self, batches: Iterator[Sequence[NumberedRow]]) -> Iterator[Sequence[NumberedRow]]:
        """The batches. Some are read ahead, and if the rows of all calls are enough, the workers are started."""
        ahead = []
        while self._rows < ENOUGH_ROWS and (batch := next(batches, None)) is not None:
            self._rows += len(batch)
            ahead.append(batch)
        if self._rows >= ENOUGH_ROWS and not self._threads:
            self._start()
        return chain(ahead, batches)

    def _given(self, batch: Any, settings: RowSettings, tasks: deque[_Task]) -> bool:
        """Gives a batch to a worker, as the last of `tasks`, unless all have enough to do or it cannot be sent."""
        self._check()
        if sum(not task.result.done() for task in tasks) >= BATCHES_OF_WORKER * self._ready:
            return False
        try:
            message = pickle.dumps(batch, pickle.HIGHEST_PROTOCOL)
        except Exception:  # such as a RecursionError for a row that is nested deeply
            return False
        tasks.append(_Task(batch, settings, message))
        self._tasks.put(tasks[-1])
        return True

    def _result_of(self, task: _Task) -> TokenizedRows | None:
        while not task.result.done():
            self._check()
            wait([task.result], timeout=1)  # no longer: it may have been meant for a worker that has died
        return task.result.result()

    def _check(self) -> None:
        if self._death is not None:
            raise RuntimeError(
                f"data.num_proc={self.num_proc}: a process that tokenized rows {self._death}. If memory was short, set "
                "data.num_proc to a smaller number; 1 starts no other process"
            )

    def _start(self) -> None:
        digest = self.tokenizer_digest.encode()
        try:
            opening = pickle.dumps(self.tokenizer, pickle.HIGHEST_PROTOCOL)
        except Exception as error:  # tokenizers written in Python may hold anything
            self._do_without(f"the tokenizer cannot be sent: {type(error).__name__}: {error}")
            return
        for _ in range(self.num_proc - 1):
            self._threads.append(threading.Thread(target=self._serve, args=(opening, digest), daemon=True))
            self._threads[-1].start()

    def _do_without(self, reason: str) -> None:
        with self._lock:
            is_first, self._has_warned = not self._has_warned, True
        if is_first:
            logger.warning("data.num_proc=%d: fewer processes tokenize: %s", self.num_proc, reason)

    def _serve(self, opening: bytes, digest: bytes) -> None:
        """What a thread does: starts one worker, and hands it tasks until there are no more."""
        try:
            with self._lock:
                if self._closed:
                    return
                process = _new_process()
                self._processes.append(process)
        except OSError as error:
            self._do_without(f"another one cannot be started: {error}")
            return
        try:
            with process:
                self._hand_out(process, opening, digest)
        except (OSError, EOFError):
            status = process.wait()
            if not self._closed:
                self._death = f"was killed by {_signal(-status)}" if status < 0 else f"ended with status {status}"

    def _hand_out(self, process: subprocess.Popen, opening: bytes, digest: bytes) -> None:
        _send(process.stdin, opening)
        answer = _receive(process.stdout)
        if answer != digest:
            self._do_without(f"a worker has no such tokenizer: {answer.decode()}")
            return
        with self._lock:
            self._ready += 1
        settings, sent = None, deque[_Task]()
        while True:
            while len(sent) < BATCHES_OF_WORKER and (task := self._next(must_wait=not sent)) is not None:
                _send(process.stdin, pickle.dumps(None if task.settings is settings else task.settings))
                _send(process.stdin, task.message)
                settings = task.settings
                task.message = b""
                sent.append(task)
            if not sent:
                return
            sent.popleft().result.set_result(pickle.loads(_receive(process.stdout)))

    def _next(self, must_wait: bool) -> _Task | None:
        try:
            return None if self._closed else self._tasks.get(block=must_wait)
        except queue.Empty:
            return None


def _until_error(batches: Iterable[Any], errors: list[Exception]) -> Iterator[Any]:
    try:
        yield from batches
    except Exception as error:
        errors.append(error)


def _in_threads(tokenize: RowTokenizer, batches: Iterable[Sequence[NumberedRow]]) -> Iterator[TokenizedRows]:
    """The result of each batch, in order. One is rendered in Python while another is in the tokenizer's own threads."""
    pool = ThreadPoolExecutor(THREADS, "tokenizing")
    ahead: deque[Future[TokenizedRows]] = deque()
    try:
        for batch in batches:
            ahead.append(pool.submit(tokenize, batch))
            if len(ahead) > THREADS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _done_here(tokenize: RowTokenizer, rows: Sequence[NumberedRow], settings: RowSettings) -> _Task:
    """The task, done. Its error waits for its turn: an earlier task may have one too."""
    task = _Task(rows, settings)
    try:
        task.result.set_result(tokenize(rows))
    except Exception as error:
        task.result.set_exception(error)
    return task


def usable_cores() -> int:
    """The cores that this process may use, by its affinity and by the quota of its container (cgroup v2)."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def _new_process() -> subprocess.Popen:
    # The paths that packages are imported from here. A tokenizer's Rust threads would compete with other workers.
    paths = filter(None, [os.environ.get("PYTHONPATH"), *sys.path])
    more = {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(
        [sys.executable, "-c", MAIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | more
    )


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _send(file: Any, message: bytes) -> None:
    file.write(len(message).to_bytes(8, "little"))
    file.write(message)
    file.flush()


def _receive(file: Any) -> bytes:
    """Raises EOFError if there is no more."""
    size = int.from_bytes(file.read(8), "little")
    message = file.read(size)
    if not size or len(message) < size:
        raise EOFError
    return message


def main() -> None:
    """A worker: answers to its input, until that ends."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    try:
        tokenizer = pickle.loads(_receive(requests))
        answer = tokenizer_digest(tokenizer)
    except Exception as error:
        _send(answers, f"{type(error).__name__}: {error}".encode())
        return
    _send(answers, answer.encode())
    inbox: queue.Queue[tuple[bytes, bytes] | None] = queue.Queue(maxsize=1)
    threading.Thread(target=_read, args=(requests, inbox), daemon=True).start()
    tokenize: Any = None
    while (request := inbox.get()) is not None:
        try:
            settings, rows = map(pickle.loads, request)
            if settings is not None:
                tokenize = RowTokenizer(tokenizer, settings)
            answer = tokenize(rows)
        except Exception:  # the process that asked does it again, and raises the error
            answer = None
        try:
            _send(answers, pickle.dumps(answer, pickle.HIGHEST_PROTOCOL))
        except BrokenPipeError:
            os._exit(0)  # that process has ended


def _read(requests: BinaryIO, inbox: "queue.Queue[tuple[bytes, bytes] | None]") -> None:
    """Reads the next request while the last one is worked on."""
    try:
        while True:
            inbox.put((_receive(requests), _receive(requests)))
    except EOFError:
        inbox.put(None)
