"""Commands on several processes of this machine, that find each other by torchrun's variables."""

import os
import socket
from collections.abc import Sequence

from preloaded import Preloaded
from xla_flags import ONE_DEVICE


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def start(arguments: Sequence[str], *, count: int, **environment: str) -> list[Preloaded]:
    """`python <arguments>` on `count` processes of one CPU device each."""
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(count),
        "XLA_FLAGS": ONE_DEVICE,
    }
    return [Preloaded(arguments, os.environ | shared | {"RANK": str(rank)} | environment) for rank in range(count)]


def ended(processes: Sequence[Preloaded], *, seconds: float = 900) -> list[tuple[int, str, str]]:
    """Their exit statuses and what they wrote, to stdout and to stderr. None is left behind."""
    try:
        told = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, told, strict=True)]
