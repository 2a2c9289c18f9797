"""How the processes of a run exchange texts, check that they compute the same, and take turns.

All processes must make the same calls. With one process nothing is exchanged.
"""

import itertools
import json
import socket
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from jax._src.distributed import global_state  # Orbax and Levanter use its client, too

T = TypeVar("T")
# Long, because other processes may be tokenizing or exporting. liveness.py notices when one of them has ended.
PATIENCE_MS = 7 * 24 * 3600 * 1000
SHOWN_DIFFERENCES = 8


def service() -> Any:
    """The service through which processes exchange texts, without their devices. Process 0 hosts it."""
    return global_state.client


def is_first_process() -> bool:
    return jax.process_index() == 0


_exchange_numbers = itertools.count()  # all processes make the same exchanges


def from_first_process(text: str) -> str:
    """The text of the first process. All processes must call this."""
    if jax.process_count() == 1:
        return text
    key = f"lora_dpo_jax/exchange/{next(_exchange_numbers)}"
    if is_first_process():
        service().key_value_set(key, text)
        return text
    return service().blocking_key_value_get(key, PATIENCE_MS)


def from_each_process(text: str) -> list[str]:
    """The text of each process, in their order. All processes must call this."""
    if jax.process_count() == 1:
        return [text]
    key = f"lora_dpo_jax/exchange/{next(_exchange_numbers)}"
    service().key_value_set(f"{key}/{jax.process_index()}", text)
    return [service().blocking_key_value_get(f"{key}/{i}", PATIENCE_MS) for i in range(jax.process_count())]


def wait_for_all() -> None:
    """Waits until all processes have called this. No device takes part, so no collective times out."""
    if jax.process_count() > 1:
        service().wait_at_barrier(f"lora_dpo_jax/barrier/{next(_exchange_numbers)}", PATIENCE_MS)


def in_turns(work: Callable[[], T]) -> T:
    """Calls `work` on the first process, then on the first of each host, then on all others; all must call this.

    For work that fills a cache for the later processes: it is filled once, whether hosts share it or not.
    """
    if jax.process_count() == 1:
        return work()
    turn = _turn()
    result = None
    for number in range(3):
        if number == turn:
            result = work()
        wait_for_all()
    return result  # type: ignore[return-value]


def _turn() -> int:
    hosts, mine = from_each_process(socket.gethostname()), jax.process_index()
    if mine == 0:
        return 0
    return 1 if hosts.index(hosts[mine]) == mine else 2


def refuse_differences(mine: Mapping[str, Any]) -> None:
    """Raises ValueError with the differences, on every process, unless all have the same. Values serialize to JSON.

    Processes that compute different things raise no error: they would wait for each other forever.
    """
    if jax.process_count() == 1:
        return
    first = json.loads(from_first_process(json.dumps(mine, default=str)))
    here = json.loads(json.dumps(mine, default=str))
    differing = [name for name in dict.fromkeys([*first, *here]) if first.get(name) != here.get(name)]
    shown = [f"{name}: {here.get(name)!r:.80}, not {first.get(name)!r:.80}" for name in differing[:SHOWN_DIFFERENCES]]
    found = from_each_process("\n".join(shown))
    if any(found):
        lines = [f"  process {i} has {line}" for i, text in enumerate(found) for line in text.splitlines()]
        raise ValueError(
            "the processes of this run do not have the same settings, software or data as process 0:\n"
            + "\n".join(lines[: 2 * SHOWN_DIFFERENCES])
            + "\nStart all with the same command, on the same files"
        )
