"""How the processes of a run find each other.

A process is one Python interpreter: one on each host of a TPU slice, one for each host or each GPU elsewhere. All run
the same program on the same settings.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax._src.clusters import ClusterEnv

# The variables of torchrun, of Kubeflow's PyTorchJob, and of many launch scripts.
TORCH_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
FOUND_BY_JAX = "a TPU pod, a GKE job, SLURM's srun or Open MPI's mpirun"
LONGEST_TIMEOUT = 10**6  # seconds
SECONDS_FOR_WORDS = 10  # PeerMonitor's, on a busy machine, from noticing an end to its own


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run find each other; names are Levanter's where it has one.

    Nothing needs to be set on TPU pods, on GKE, under SLURM, or if the variables of torchrun are set.
    """

    coordinator_address: str | None = None  # host:port of process 0
    num_processes: int | None = None  # how many processes the run has
    process_id: int | None = None  # the number of this process, from 0
    local_device_ids: list[int] | None = None  # the GPUs of its host that this process uses; null: all, or see jax
    initialize_jax_distributed: bool = True  # false: one process, whatever the environment says
    heartbeat_timeout_seconds: int = 30  # the run ends if a process is silent for so long

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


def start_processes(config: DistributedConfig) -> bool:
    """Connects this process with the others of the run. Returns False if there are none.

    To be called before JAX is asked for devices. Raises ValueError if only some of the required settings or variables
    are set.
    """
    arguments = _arguments(config) if config.initialize_jax_distributed else None
    if arguments is None or jax.distributed.is_initialized():
        return jax.distributed.is_initialized()
    # PeerMonitor ends the run first, with a message. If Python itself hangs, JAX ends it later, without a message. A
    # process sends JAX a sign twice in its timeout, so that JAX may miss one that was killed after half of it.
    timeout = 2 * (config.heartbeat_timeout_seconds + SECONDS_FOR_WORDS)
    jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=timeout)
    return True


def _arguments(config: DistributedConfig) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize`; None for one process."""
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
    """The arguments from the variables of torchrun; None if these are not set."""
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
        arguments["local_device_ids"] = [int(local_rank)]  # its GPU; other devices do not depend on it
    return arguments


def _is_found_by_jax() -> bool:
    """Whether there are other processes, and JAX finds them by itself."""
    on_cpu = jax.config.jax_platforms == "cpu"  # pyright: ignore[reportAttributeAccessIssue]
    for environment in ClusterEnv._cluster_types:
        if environment.opt_in_only_method or (environment.name in ("gcetpu", "gketpu", "tpu") and on_cpu):
            continue
        # A Kubernetes pod outside an indexed job is alone. Asking Kubernetes about it needs permissions.
        if environment.__name__ == "K8sCluster" and "JOB_COMPLETION_INDEX" not in os.environ:
            continue
        if environment.is_env_present():
            return environment.get_process_count() > 1
    return False


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isascii() and port.isdigit() and 0 < int(port[:6]) < 2**16
