"""One run on many processes: how they find each other, agree on what they compute, and take turns.

A process is one Python interpreter: one on each host of a TPU slice, one for each host or each GPU elsewhere. All run
the same program on the same settings. With one process nothing here does anything.
"""

import itertools
import json
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
from jax._src.clusters import ClusterEnv
from jax._src.distributed import global_state  # its client is what Orbax and Levanter talk over, too

T = TypeVar("T")
# The variables of torchrun, of Kubeflow's PyTorchJob, and of many a launch script.
TORCH_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
FOUND_BY_JAX = "a TPU pod, a GKE job, SLURM's srun or Open MPI's mpirun"
# Others may tokenize, or write an export, for long. That one of them is gone, liveness.py finds out.
PATIENCE_MS = 7 * 24 * 3600 * 1000
SHOWN_DIFFERENCES = 8
LONGEST_TIMEOUT = 10**6  # seconds


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run find each other; names are Levanter's where it has one.

    Nothing needs to be set on TPU pods, on GKE, under SLURM, or where the variables of torchrun are.
    """

    coordinator_address: str | None = None  # host:port of process 0
    num_processes: int | None = None  # of the run
    process_id: int | None = None  # which of them this is, from 0
    local_device_ids: list[int] | None = None  # which of its host's GPUs are this process's; null: all, or see jax
    initialize_jax_distributed: bool = True  # false: one process, whatever the environment says
    heartbeat_timeout_seconds: int = 30  # a process that is silent for so long is given up, and the run ends

    def __post_init__(self):
        if not 5 <= self.heartbeat_timeout_seconds <= LONGEST_TIMEOUT:
            raise ValueError(
                f"trainer.distributed.heartbeat_timeout_seconds={self.heartbeat_timeout_seconds} must be between 5 and "
                f"{LONGEST_TIMEOUT}"
            )
        if self.coordinator_address is not None and not _is_address(self.coordinator_address):
            raise ValueError(
                f"trainer.distributed.coordinator_address={self.coordinator_address!r} must be host:port of process 0"
            )
        if self.num_processes is not None and self.num_processes < 1:
            raise ValueError(f"trainer.distributed.num_processes={self.num_processes} must be at least 1")
        if self.process_id is not None and not 0 <= self.process_id < (self.num_processes or 2**31):
            raise ValueError(
                f"trainer.distributed.process_id={self.process_id} must be counted from 0, below num_processes"
            )
        if any(number < 0 for number in self.local_device_ids or ()):
            raise ValueError(f"trainer.distributed.local_device_ids={self.local_device_ids} must be counted from 0")

    @property
    def explicit(self) -> dict[str, Any]:
        names = ("coordinator_address", "num_processes", "process_id", "local_device_ids")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isascii() and port.isdigit() and 0 < int(port[:6]) < 2**16


def start_processes(config: DistributedConfig) -> bool:
    """Joins this process with the others of the run; False if there are none.

    To be called before JAX is asked for devices. Raises ValueError if settings or variables say it only by half.
    """
    arguments = _arguments(config) if config.initialize_jax_distributed else None
    if arguments is None or jax.distributed.is_initialized():
        return jax.distributed.is_initialized()
    # Our own watch ends the run first, in words; what JAX does later, without any, is for when Python itself hangs.
    jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=2 * config.heartbeat_timeout_seconds)
    return True


def _arguments(config: DistributedConfig) -> dict[str, Any] | None:
    """Of `jax.distributed.initialize`; None for one process."""
    given = config.explicit
    named = [name for name in ("coordinator_address", "num_processes", "process_id") if name in given]
    if len(named) == 3:
        return given if given["num_processes"] > 1 else None
    is_found = _is_found_by_jax()
    if named:
        if is_found:
            return given
        missing = {"coordinator_address", "num_processes", "process_id"} - given.keys()
        raise ValueError(
            f"trainer.distributed sets {', '.join(named)} but not {', '.join(sorted(missing))}. All three are needed "
            f"outside of {FOUND_BY_JAX}; for one process, set none"
        )
    arguments = _torch_arguments(os.environ, is_found)
    if arguments is not None:
        return arguments | given if arguments["num_processes"] > 1 else None
    return given if is_found else None


def _torch_arguments(environment: Mapping[str, str], is_found: bool) -> dict[str, Any] | None:
    """From the variables of torchrun, if they are there."""
    present = [name for name in TORCH_VARIABLES if environment.get(name)]
    if not present or (is_found and "RANK" not in present):
        return None  # job scripts often export MASTER_ADDR, whoever starts the processes
    if environment.get("WORLD_SIZE") == "1":
        return {"num_processes": 1}
    if missing := [name for name in TORCH_VARIABLES if name not in present]:
        raise ValueError(
            f"the environment has {', '.join(present)} but not {', '.join(missing)}: set all of "
            f"{', '.join(TORCH_VARIABLES)} for several processes, or none of them for one"
        )
    numbers = {name: environment.get(name) for name in (*TORCH_VARIABLES[1:], "LOCAL_RANK")}
    if bad := {name: value for name, value in numbers.items() if value is not None and not value.isdigit()}:
        raise ValueError(f"the environment has {bad}; needed: whole numbers")
    port, rank, world_size = (int(environment[name]) for name in TORCH_VARIABLES[1:])
    if rank >= world_size:
        raise ValueError(f"the environment has RANK={rank} and WORLD_SIZE={world_size}; ranks are counted from 0")
    # torchrun itself listens at MASTER_PORT.
    port += environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    arguments = {
        "coordinator_address": f"{environment['MASTER_ADDR']}:{port}",
        "num_processes": world_size,
        "process_id": rank,
    }
    if local_rank := environment.get("LOCAL_RANK"):
        arguments["local_device_ids"] = [int(local_rank)]  # its GPU; other devices are not told apart by it
    return arguments


def _is_found_by_jax() -> bool:
    """Whether JAX knows where the other processes are, and there are some."""
    on_cpu = jax.config.jax_platforms == "cpu"  # pyright: ignore[reportAttributeAccessIssue]
    for environment in ClusterEnv._cluster_types:
        if environment.opt_in_only_method or (environment.name in ("gcetpu", "gketpu", "tpu") and on_cpu):
            continue
        # A pod in Kubernetes that is no part of an indexed job is alone; to ask about it needs permissions.
        if environment.__name__ == "K8sCluster" and "JOB_COMPLETION_INDEX" not in os.environ:
            continue
        if environment.is_env_present():
            return environment.get_process_count() > 1
    return False


def service() -> Any:
    """Through it processes exchange texts, without their devices; process 0 hosts it."""
    return global_state.client


def is_first_process() -> bool:
    return jax.process_index() == 0


_exchange_numbers = itertools.count()  # all processes make the same exchanges


def from_first_process(text: str) -> str:
    """What the first process gave. All must call this."""
    if jax.process_count() == 1:
        return text
    key = f"lora_dpo_jax/exchange/{next(_exchange_numbers)}"
    if is_first_process():
        service().key_value_set(key, text)
        return text
    return service().blocking_key_value_get(key, PATIENCE_MS)


def from_each_process(text: str) -> list[str]:
    """What each process gave, in their order. All must call this."""
    if jax.process_count() == 1:
        return [text]
    key = f"lora_dpo_jax/exchange/{next(_exchange_numbers)}"
    service().key_value_set(f"{key}/{jax.process_index()}", text)
    return [service().blocking_key_value_get(f"{key}/{i}", PATIENCE_MS) for i in range(jax.process_count())]


def wait_for_all() -> None:
    """Until all processes have called this. No device takes part, so that none gives up waiting."""
    if jax.process_count() > 1:
        service().wait_at_barrier(f"lora_dpo_jax/barrier/{next(_exchange_numbers)}", PATIENCE_MS)


def in_turns(work: Callable[[], T]) -> T:
    """Calls `work` on the first process, then on the first of each host, then on all others; all must call this.

    For what fills a cache that the later ones may find: whether hosts share it or not, it is filled once.
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
    """Raises ValueError, on every process, unless all have the same; it names what differs. Values serialize to JSON.

    Processes that computed different things would not end with an error: they would wait for each other for ever.
    """
    if jax.process_count() == 1:
        return
    first = json.loads(from_first_process(json.dumps(mine, default=str)))
    here = json.loads(json.dumps(mine, default=str))
    differing = [name for name in dict.fromkeys([*first, *here]) if first.get(name) != here.get(name)]
    shown = [f"{name}: {here.get(name)!r:.80}, not {first.get(name)!r:.80}" for name in differing[:SHOWN_DIFFERENCES]]
    told = from_each_process("\n".join(shown))
    if any(told):
        lines = [f"  process {i} has {line}" for i, text in enumerate(told) for line in text.splitlines()]
        raise ValueError(
            "the processes of this run do not have the same settings, software or data as process 0:\n"
            + "\n".join(lines[: 2 * SHOWN_DIFFERENCES])
            + "\nStart all with the same command, on the same files"
        )
