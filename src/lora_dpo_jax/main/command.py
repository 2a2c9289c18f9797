"""A command: its settings, the processes that it runs on, and how it ends."""

import gc
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lora_dpo_jax.main.errors import print_trace, told_in_a_line
from lora_dpo_jax.processes.exchange import is_first_process
from lora_dpo_jax.processes.liveness import PeerMonitor
from lora_dpo_jax.processes.run_lock import process_started
from lora_dpo_jax.processes.signals import StoppedBySignalError
from lora_dpo_jax.processes.start import DistributedConfig, start_processes


@contextmanager
def command(parse: Callable[[], Any], distributed: Callable[[Any], DistributedConfig]) -> Iterator[Any]:
    """Wraps a whole command: connects the processes that its settings or the environment name. Yields its settings.

    Mistakes are reported in one line (see errors.py). When one process ends, all end. All but the first process log
    only warnings.
    """
    gc.freeze()  # what is imported stays: looking through it again and again is a sixth of the time to trace a step
    with told_in_a_line():
        config = parse()
        settings = distributed(config)
        is_one_of_many = start_processes(settings)
    if not is_one_of_many:
        with told_in_a_line():
            yield config
        return
    if not is_first_process():
        logging.getLogger().setLevel(logging.WARNING)
    peers = PeerMonitor(silence_seconds=settings.heartbeat_timeout_seconds)
    peers.start()
    try:
        with told_in_a_line(), peers.explaining_errors():
            yield config
    except BaseException as ended:
        # On a signal all processes stop together.
        if not isinstance(ended.__cause__, StoppedBySignalError):
            _end_all(ended, peers)
        peers.end()
        raise
    peers.end()


def process_start() -> float:
    """The start of this process, as a time of time.perf_counter. On Linux it is before Python and its imports."""
    now, ticks = time.perf_counter(), process_started(os.getpid())
    if ticks is None:  # not Linux
        return now
    return now - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def _end_all(ended: BaseException, peers: PeerMonitor) -> None:
    if isinstance(ended, KeyboardInterrupt):
        peers.fail("was stopped by Ctrl-C", 130)
    cause, status = ended.__cause__, 1
    if isinstance(ended, SystemExit) and isinstance(ended.code, int):
        status = ended.code
    else:
        print_trace(type(ended), ended, ended.__traceback__)
        cause = ended
    peers.fail(f"ended with an error: {str(cause).strip()}", status)
