"""How fast this library trains, and in what memory:

    python -m bench.throughput --shape 22m --data uf512 --trainer.train_batch_size 4 --steps 5

Prints one line of JSON. `Options` in wiring.py lists what can be set; README.md here says what the line holds.
"""

import time
from pathlib import Path
from typing import Any

import draccus
import jax
import numpy as np

import lora_dpo_jax
from bench import pairs as benchmark_pairs
from bench.measure import Meter, emit, host
from bench.models import decoder_config
from bench.wiring import Options, Wired, wire
from lora_dpo_jax.cost.devices import peak_flops
from lora_dpo_jax.data import ExampleTable, PreferenceBatch
from lora_dpo_jax.losses import Loss
from lora_dpo_jax.settings.arguments import parse


def main() -> None:
    options = parse(Options)
    emit(measure(options), options.out)


def measure(options: Options, devices: list | None = None) -> dict[str, Any]:
    """Trains through the warm-up and the timed steps, and says what the latter took."""
    pairs = load_examples(options)
    run = wire(options, pairs, devices)
    meter, programs = Meter(options.warmup), _Programs()
    metrics = _train(run, options, meter, programs)

    timed = run.steps.ids[options.warmup : options.warmup + options.steps]
    tokens = [benchmark_pairs.real_tokens(pairs.sizes[ids]) for ids in timed]
    result = meter.report(tokens, options.trainer.train_batch_size * options.comparisons)
    if (peak_bytes := _device_peak_bytes()) is not None:
        result["peak_memory_mb"] = round(peak_bytes / 2**20, 1)
    values = [jax.device_get(step.values) for step in metrics]
    flops_per_second = sum(float(v["flops"]) for v in values[options.warmup :]) / sum(meter.seconds[options.warmup :])
    peak = peak_flops(list(run.learner.placement.mesh.devices.flat))
    return {
        "system": "lora_dpo_jax",
        "shape": options.shape,
        "data": options.pairs_file or options.data,
        "pairs": len(pairs),
        "pairs_per_step": options.trainer.train_batch_size * options.comparisons,
        **result,
        "mfu": None if peak is None else round(flops_per_second / peak, 4),
        "gflops_per_second": round(flops_per_second / 1e9, 2),
        "padding_fraction": round(float(np.mean([v["padding_fraction"] for v in values[options.warmup :]])), 4),
        "temporary_memory_mb": round(programs.temporary_bytes / 2**20, 1),
        "compile_seconds": round(programs.seconds, 2),
        "programs": programs.count,
        "reference_seconds": None if run.reference_seconds is None else round(run.reference_seconds, 2),
        "loss_first": float(values[0]["loss"]),
        "loss_last": float(values[-1]["loss"]),
        "device": _device(run),
        "versions": {"lora_dpo_jax": lora_dpo_jax.__version__, "jax": jax.__version__},
        "settings": _settings(options),
    }


def load_examples(options: Options) -> ExampleTable:
    if options.pairs_file is not None:
        return benchmark_pairs.load_jsonl(Path(options.pairs_file), options.pairs)
    return benchmark_pairs.load(
        options.data,
        options.pairs,
        vocab_size=decoder_config(options.shape).vocab_size,
        tokenizer=options.tokenizer,
        cap=options.train_seq_len,
        responses=options.responses,
        apart=options.apart,
    )


class _Programs:
    """Compiles the step for each new shape of batch before it runs; the call that follows finds it compiled."""

    def __init__(self):
        self.shapes: set[tuple] = set()
        self.seconds, self.temporary_bytes = 0.0, 0

    @property
    def count(self) -> int:
        return len(self.shapes)

    def prepare(self, run: Wired, batch: tuple[PreferenceBatch, ...]) -> None:
        shape = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        if shape in self.shapes:
            return
        self.shapes.add(shape)
        began = time.perf_counter()
        compiled = run.learner.compile(batch)
        self.seconds += time.perf_counter() - began
        self.temporary_bytes = max(self.temporary_bytes, compiled.memory_analysis().temp_size_in_bytes)


def _train(run: Wired, options: Options, meter: Meter, programs: _Programs) -> list[Any]:
    """All steps; their metrics."""
    metrics, learner = [], run.learner
    batches = run.steps.batches(learner.placement, reference=run.reference)
    meter.begin()
    for _ in range(options.warmup):
        batch = next(batches)
        programs.prepare(run, batch)
        metrics.append(learner(batch))
        # JAX runs ahead of itself: without this the warm-up would be counted in the first timed step.
        jax.block_until_ready((learner.state, metrics))
        meter.end_step()
    compiled = learner.step.num_compilations
    # A CPU is host and device at once, so each step is awaited there; an accelerator is kept busy to the end.
    await_each = jax.default_backend() == "cpu"
    for _ in range(options.steps):
        metrics.append(learner(next(batches)))
        if await_each:
            jax.block_until_ready((learner.state, metrics[-1]))
            meter.end_step()
    if not await_each:
        jax.block_until_ready((learner.state, metrics))
        meter.end_step(options.steps)
    if learner.step.num_compilations != compiled:
        raise RuntimeError(f"a timed step met a new shape of batch and was compiled; raise warmup={options.warmup}")
    if options.profile is not None:
        with jax.profiler.trace(options.profile):
            jax.block_until_ready((learner(next(batches)), learner.state))
    return metrics


def _device_peak_bytes() -> int | None:
    """Of the device that needed most; None where JAX does not count, as on a CPU."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    return max((s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s), default=None)


def _device(run: Wired) -> str:
    devices = run.learner.placement.mesh.devices
    return host() if devices.flat[0].platform == "cpu" else f"{devices.size} x {devices.flat[0].device_kind}"


def _settings(options: Options) -> dict[str, Any]:
    """What tells two measurements of one shape and one data set apart."""
    trainer = options.trainer
    return {
        "reference": options.reference,
        "loss": draccus.encode(options.loss, Loss),
        "responses": options.responses,
        "apart": options.apart,
        "layout": draccus.encode(options.layout),
        "model": draccus.encode(options.model),
        "lora": draccus.encode(options.lora),
        "mp": trainer.mp,
        "per_device_parallelism": trainer.per_device_parallelism,
        "mesh": trainer.mesh.axes,
    }


if __name__ == "__main__":
    main()
