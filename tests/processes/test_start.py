"""What the settings and the environment say of the processes of a run. tests/test_processes.py starts some."""

import jax
import pytest

from lora_dpo_jax.processes.start import DistributedConfig, start_processes

TORCH = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "8476", "RANK": "1", "WORLD_SIZE": "4"}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


@pytest.fixture
def started(monkeypatch):
    """What `jax.distributed.initialize` would be called with; None: it would not be."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))

    def start(config: DistributedConfig | None = None, **environment: str):
        for name in (*TORCH, *SLURM, "LOCAL_RANK", "TORCHELASTIC_USE_AGENT_STORE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        calls.clear()
        start_processes(config or DistributedConfig())
        return calls[0] if calls else None

    return start


def test_one_process_is_left_alone(started):
    assert started() is None
    assert started(WORLD_SIZE="1", RANK="0") is None
    assert started(**SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None
    assert started(DistributedConfig("10.0.0.1:1", 1, 0)) is None
    assert started(DistributedConfig(initialize_jax_distributed=False), **TORCH) is None
    # A shell of salloc, in which no step runs.
    assert started(SLURM_JOB_ID="77", SLURM_NTASKS="4", MASTER_ADDR="") is None


def test_the_variables_of_torchrun_are_understood(started):
    found = {"coordinator_address": "10.0.0.1:8476", "num_processes": 4, "process_id": 1}
    assert started(**TORCH) == found | {"heartbeat_timeout_seconds": 80}
    assert started(**TORCH, LOCAL_RANK="0") == found | {"local_device_ids": [0], "heartbeat_timeout_seconds": 80}
    by_torchrun = started(**TORCH, TORCHELASTIC_USE_AGENT_STORE="True")
    assert by_torchrun["coordinator_address"] == "10.0.0.1:8477", "torchrun itself listens at MASTER_PORT"


def test_what_jax_finds_by_itself_is_left_to_it(started):
    left = {"heartbeat_timeout_seconds": 80}
    assert started(**SLURM) == left
    assert started(**SLURM, MASTER_ADDR="node07", MASTER_PORT="1234") == left, "job scripts export these for others"
    assert started(DistributedConfig(local_device_ids=[0]), **SLURM) == left | {"local_device_ids": [0]}


def test_settings_come_before_the_environment(started):
    settings = DistributedConfig("host:1", 2, 1, heartbeat_timeout_seconds=10)
    assert started(settings, **TORCH) == {
        "coordinator_address": "host:1", "num_processes": 2, "process_id": 1, "heartbeat_timeout_seconds": 40
    }  # fmt: skip


@pytest.mark.parametrize(
    "environment, says",
    [
        ({"RANK": "0"}, "has RANK but not MASTER_ADDR, MASTER_PORT, WORLD_SIZE"),
        ({"MASTER_ADDR": "host"}, "has MASTER_ADDR but not MASTER_PORT, RANK, WORLD_SIZE"),
        (TORCH | {"WORLD_SIZE": ""}, "has MASTER_ADDR, MASTER_PORT, RANK but not WORLD_SIZE"),
        (TORCH | {"RANK": "4"}, "RANK=4 and WORLD_SIZE=4; ranks are counted from 0"),
        (TORCH | {"RANK": "first"}, "'RANK': 'first'.*whole numbers"),
        (TORCH | {"LOCAL_RANK": "x"}, "'LOCAL_RANK': 'x'.*whole numbers"),
    ],
)
def test_variables_that_are_set_in_part_are_named(started, environment, says):
    with pytest.raises(ValueError, match=says):
        started(**environment)


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"process_id": 1}, "sets process_id but not coordinator_address, num_processes"),
        ({"coordinator_address": "host:1", "num_processes": 2}, "sets .* but not process_id"),
        ({"coordinator_address": "host"}, "coordinator_address='host' must be host:port"),
        ({"heartbeat_timeout_seconds": 1}, "heartbeat_timeout_seconds=1 must be between 5 and"),
    ],
)
def test_settings_that_are_set_in_part_are_named(started, settings, says):
    with pytest.raises(ValueError, match=says):
        started(DistributedConfig(**settings))
