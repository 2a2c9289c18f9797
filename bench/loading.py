"""Memory of the host while several processes load a model that is split over their devices, on this machine:

    python -m bench.loading --shape 1b --processes 8

Makes the folder of a bfloat16 model with random weights, starts the processes, and prints a table and JSON: how much
each one's memory grew while it read its part, beside what it then holds. On a CPU the part itself is host memory too.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import draccus
import jax
import jax.numpy as jnp

from bench import models
from bench.measure import emit
from lora_dpo_jax.huggingface.weights import load_model, read_config
from lora_dpo_jax.models.quantization import parameter_count
from lora_dpo_jax.settings.arguments import parse
from lora_dpo_jax.sharding import MeshConfig, Placement

FIELDS = {"resident": "VmRSS", "own": "RssAnon"}  # with the pages of files that were read, and without


@dataclass(frozen=True)
class Options:
    shape: str = "1b"
    processes: int = 8
    quantization: str = "none"
    mesh: MeshConfig = field(default_factory=MeshConfig)
    folder: str | None = None  # where the model is, or is written and kept
    coordinator: str | None = None  # of a process among several: set by the one that starts them
    process: int = 0
    out: str | None = None


def main() -> None:
    options = parse(Options)
    if options.coordinator is not None:
        print(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = models.write_folder(options.shape, Path(options.folder or temporary), dtype="bfloat16")
        rows = run_processes(options, folder)
    print(markdown(rows))
    emit({"shape": options.shape, "processes": options.processes, "rows": rows}, options.out)


def run_processes(options: Options, folder: Path) -> list[dict[str, Any]]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{taken.getsockname()[1]}"
    settings = ["--folder", str(folder), "--coordinator", coordinator, "--processes", str(options.processes)]
    settings += ["--quantization", options.quantization, "--mesh", json.dumps(draccus.encode(options.mesh))]
    command = [sys.executable, "-m", "bench.loading", *settings]
    started = [
        subprocess.Popen([*command, "--process", str(number)], stdout=subprocess.PIPE, text=True)
        for number in range(options.processes)
    ]
    printed = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("a process failed; see above")
    return [json.loads(text.splitlines()[-1]) for text in printed]


def measure(options: Options) -> dict[str, Any]:
    """In one of the processes: bytes before, at most, and of the arrays it holds."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(options.coordinator, options.processes, options.process)
    placement = Placement(options.mesh)
    folder = Path(str(options.folder))
    config = read_config(folder)
    jax.block_until_ready(jnp.ones(8) + 1)  # what any program needs is there before
    before = _memory()
    with _Peak() as peak, placement.scope():
        model = load_model(
            folder, config, dtype=jnp.bfloat16, mapping=placement.parameters, quantization=options.quantization
        )
        jax.block_until_ready(model)
    leaves = jax.tree.leaves(model)
    return {
        "model": parameter_count(model) * 2,
        "held": sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards),
        **{f"{name}_grew": peak.highest[name] - before[name] for name in FIELDS},
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| process | model MB | holds MB | grew MB | of the model | without file pages MB | of the model |"]
    lines.append("|---" * 7 + "|")
    for number, row in enumerate(rows):
        shares = " | ".join(
            f"{row[f'{name}_grew'] / 1e6:,.0f} | {row[f'{name}_grew'] / row['model']:.1%}" for name in FIELDS
        )
        lines.append(f"| {number} | {row['model'] / 1e6:,.0f} | {row['held'] / 1e6:,.0f} | {shares} |")
    return "\n".join(lines)


class _Peak(threading.Thread):
    """Samples this process's memory while the block runs."""

    def __init__(self, every_seconds: float = 0.01):
        super().__init__(daemon=True, name="memory")
        self.every_seconds, self.highest, self._stopped = every_seconds, _memory(), threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(self.every_seconds):
            now = _memory()
            self.highest = {name: max(self.highest[name], now[name]) for name in FIELDS}

    def __enter__(self) -> "_Peak":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self._stopped.set()
        self.join()


def _memory() -> dict[str, int]:
    """Bytes; of Linux."""
    lines = dict(line.split(":") for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) * 1024 for name, key in FIELDS.items()}


if __name__ == "__main__":
    main()
