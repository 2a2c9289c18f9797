"""A command: its settings, the processes that it runs on, and how it ends."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lora_dpo_jax.main.errors import print_trace, told_in_a_line
from lora_dpo_jax.processes.exchange import DistributedConfig, is_first_process, start_processes
from lora_dpo_jax.processes.liveness import Liveness
from lora_dpo_jax.processes.signals import InterruptedTrainingError


@contextmanager
def command(parse: Callable[[], Any], distributed: Callable[[Any], DistributedConfig]) -> Iterator[Any]:
    """Around a whole command: its settings, on all of its processes if the environment or they say that there are more.

    Mistakes are told in a line (see errors.py). When one process ends, all do. All but the first log warnings alone.
    """
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
    liveness = Liveness(silence_seconds=settings.heartbeat_timeout_seconds)
    liveness.start()
    try:
        with told_in_a_line(), liveness.explaining_errors():
            yield config
    except BaseException as ended:
        # All processes stop together when a signal tells them to.
        if not isinstance(ended.__cause__, InterruptedTrainingError):
            _end_all(ended, liveness)
        liveness.end()
        raise
    liveness.end()


def _end_all(ended: BaseException, liveness: Liveness) -> None:
    if isinstance(ended, KeyboardInterrupt):
        liveness.fail("was stopped by Ctrl-C", 130)
    told, status = ended.__cause__, 1
    if isinstance(ended, SystemExit) and isinstance(ended.code, int):
        status = ended.code
    else:
        print_trace(type(ended), ended, ended.__traceback__)
        told = ended
    liveness.fail(f"ended with an error: {str(told).strip()}", status)
