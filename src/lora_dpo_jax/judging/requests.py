"""Several requests at once, whose results come as they arrive."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

A = TypeVar("A")
R = TypeVar("R")


def concurrently(function: Callable[[A], R], arguments: Sequence[A], workers: int) -> Iterator[tuple[int, R]]:
    """(index, result) of each argument, as soon as it is there; at most `workers` calls run at once.

    After an error no further call begins. The results of the calls that are running still come, and then the error is
    raised. If the iterator is closed, running calls are left to themselves: they never delay the end of the process.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    results: queue.SimpleQueue[tuple[int, R | None, BaseException | None]] = queue.SimpleQueue()
    stopped = threading.Event()
    for index in range(len(arguments)):
        waiting.put(index)

    def work() -> None:
        while not stopped.is_set():
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                results.put((index, function(arguments[index]), None))
            except BaseException as error:  # raised in the thread that asked
                stopped.set()
                results.put((index, None, error))

    threads = [
        threading.Thread(target=work, daemon=True, name=f"request {number}")
        for number in range(min(workers, len(arguments)))
    ]
    for thread in threads:
        thread.start()
    try:
        yield from _arriving(results, threads, len(arguments))
    finally:
        stopped.set()


def _arriving(
    results: "queue.SimpleQueue[tuple[int, R | None, BaseException | None]]",
    threads: Sequence[threading.Thread],
    count: int,
) -> Iterator[tuple[int, R]]:
    first_error: BaseException | None = None
    arrived = 0
    while arrived < count:
        try:
            index, result, error = results.get(timeout=0.05 if first_error else None)
        except queue.Empty:
            if not any(thread.is_alive() for thread in threads) and results.empty():
                break
            continue
        arrived += 1
        if error is None:
            yield index, result  # type: ignore[misc]  # a result, as there was no error
        elif first_error is None:
            first_error = error
    if first_error is not None:
        raise first_error
