"""Two processes save one checkpoint, stop after the same step, and any number of processes goes on from it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from many_processes import free_port
from xla_flags import TWO_DEVICES

from lora_dpo_jax.checkpoints.config import CheckpointerConfig
from lora_dpo_jax.checkpoints.store import Checkpoints

# Goes on until the first process is sent SIGTERM: after 150 steps, or before the first one of a run that goes on. Only
# that process knows what run it is, as in main/train.py.
PROCESS = """
import os, signal, sys, time
import jax, numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

process, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)

from lora_dpo_jax.checkpoints.config import CheckpointerConfig
from lora_dpo_jax.checkpoints.store import Checkpoints
from lora_dpo_jax.processes.signals import StopSignals

place = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
state = jax.make_array_from_callback((4, 2), place, lambda index: np.arange(8.0, dtype=np.float32).reshape(4, 2)[index])
train_step = jax.jit(lambda x: x + 1, donate_argnums=0)
identity = {"run": "this"} if process == 0 else {}
checkpoints = Checkpoints(
    epath.Path(folder), CheckpointerConfig(save_interval="0.5s", keep=[]), identity=identity, settings={}
)
with StopSignals() as stop, checkpoints:
    found = checkpoints.restore({"x": state})
    first = found.step if found else 0
    state = found.arrays["x"] if found else state
    if found and process == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(2.0)  # until JAX has noticed
    for step in range(first + 1, first + 2000):
        state = train_step(state)
        time.sleep(0.01)
        if step == 150 and process == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        stopped_by = stop()
        if stopped_by or checkpoints.is_due(step):
            checkpoints.save(step, {"x": state}, notes={})
        if stopped_by:
            print(f"stopped after {step}", flush=True)
            break
"""


def stopped_after(folder: Path) -> int:
    """The last step of both processes."""
    port = free_port()
    environment = os.environ | {"XLA_FLAGS": TWO_DEVICES}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(number), str(port), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    told = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    stopped = [re.findall(r"stopped after (\d+)", out) for out, _ in told]
    assert stopped[0] == stopped[1] and len(stopped[0]) == 1
    return int(stopped[0][0])


def test_processes_save_together_and_stop_after_the_same_step(tmp_path):
    folder = tmp_path / "checkpoints"
    first = stopped_after(folder)
    assert first >= 150
    step = stopped_after(folder)
    assert first < step < first + 1000, "a signal that comes before the first step of a run that goes on is heard"
    assert [path.name for path in folder.iterdir()] == [f"step-{step}"], "those by the clock have gone"

    # Here it is one process, with both devices.
    place = NamedSharding(Mesh(np.array(jax.devices()[:2]), ("data",)), PartitionSpec("data"))
    checkpoints = Checkpoints(epath.Path(folder), CheckpointerConfig(), identity={"run": "this"}, settings={})
    found = checkpoints.restore({"x": jax.device_put(jnp.zeros((4, 2)), place)})
    assert found is not None and found.step == step
    np.testing.assert_array_equal(found.arrays["x"], np.arange(8.0).reshape(4, 2) + step)
