"""What a run takes, before it is launched: memory, operations, traffic and time of a step on devices that are not here.

    python -m lora_dpo_jax.main.plan --config_path run.yaml --topology v5e:4x4

The step is compiled for the topology by libtpu (`pip install -e '.[tpu]'`), which needs no TPU; of the model only
`config.json` is read, and of the data nothing. Exit status 1 says that it does not fit.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import equinox as eqx
import jax
import numpy as np

from lora_dpo_jax.cost.compiled import ProgramMemory, collective_bytes
from lora_dpo_jax.cost.devices import DeviceKind, described_devices
from lora_dpo_jax.cost.flops import useful_flops
from lora_dpo_jax.data import Layout, PreferenceBatch, TokenizedPair, plan_rows
from lora_dpo_jax.data.packing import pack
from lora_dpo_jax.data.shapes import LENGTH_MULTIPLE, round_up
from lora_dpo_jax.huggingface.weights import read_config
from lora_dpo_jax.lora import trainable_filter
from lora_dpo_jax.main.errors import told_in_a_line
from lora_dpo_jax.models import CausalLM, DecoderConfig
from lora_dpo_jax.models.quantization import parameter_count
from lora_dpo_jax.printable import printable
from lora_dpo_jax.runs.abstract import bytes_of_a_device, describe_state
from lora_dpo_jax.runs.setup import TrainConfig, folder_of, row_bound
from lora_dpo_jax.settings.arguments import parse_arguments
from lora_dpo_jax.sharding import Placement
from lora_dpo_jax.training.precision import precision_of
from lora_dpo_jax.training.step import TrainState, TrainStep

# Forward passes of the policy that the backward pass makes again.
RECOMPUTED = {"none": 0.0, "products": 0.0, "full": 1.0, "nested": 2.0}


@dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainConfig):
    """A run, and where it would be."""

    topology: str  # a TPU slice (v5e:4x4, v5p:2x2x1, v6e:4x4), or GPUs of one host (h100:8)
    # Mean tokens of prompt, chosen and rejected response; the default is what UltraFeedback has.
    pair_tokens: list[int] = field(default_factory=lambda: [167, 356, 352])

    def __post_init__(self):
        super().__post_init__()
        if len(self.pair_tokens) != 3 or min(self.pair_tokens) < 1:
            raise ValueError(f"pair_tokens={self.pair_tokens} must be three positive numbers: prompt, chosen, rejected")


@dataclass(frozen=True)
class Plan:
    """Bytes, operations and seconds are of one device and one step."""

    kind: DeviceKind
    num_devices: int
    parameters: int
    trainable: int
    weights: int
    adapters: int
    optimizer: int
    peak: int  # all that the step needs while it runs
    flops: float
    memory_traffic: float
    collectives: dict[str, float]
    rows: str  # micro-batches x rows x tokens
    parallelism: int | None  # the largest per_device_parallelism that fits; None if not even 1 does

    @property
    def fits(self) -> bool:
        return self.peak <= self.kind.memory

    @property
    def seconds(self) -> dict[str, float]:
        """What each resource alone would take."""
        return {
            "arithmetic": self.flops / self.kind.flops,
            "memory": self.memory_traffic / self.kind.memory_bandwidth,
            "interconnect": sum(self.collectives.values()) / self.kind.interconnect,
        }


def main(config: PlanConfig) -> Plan:
    """Prints the plan and returns it."""
    found = plan(config)
    print(printable(report(config, found)))
    return found


def plan(config: PlanConfig) -> Plan:
    kind, devices = described_devices(config.topology)
    placement = Placement(config.trainer.mesh, devices)
    name, revision = config.initialize_from_hf, config.hf_revision
    folder = folder_of("initialize_from_hf", name, revision=revision, patterns=["config.json"])
    decoder = read_config(folder)
    optimizer = config.optimizer.build(config.trainer.num_train_steps or 1000)
    state = _state_of_a_run(config, decoder, optimizer, placement)
    step = TrainStep(config.preference_loss, optimizer, scope=placement.scope)

    def compiled(parallelism: int) -> tuple[PreferenceBatch, int, str]:
        batch = expected_batch(config, placement.row_shards, parallelism)
        return batch, *compile_step(step, state, placement.describe_batch(batch), kind)

    batch, peak, program = compiled(config.trainer.per_device_parallelism)
    micro_batches = batch.tokens.axes[0].size
    adapters, weights = eqx.partition(state.model, trainable_filter(state.model))
    layers_read = bytes_of_a_device(weights.model.layers) * _gathered_from(placement)
    return Plan(
        kind=kind,
        num_devices=len(devices),
        parameters=parameter_count(weights),
        trainable=parameter_count(adapters),
        weights=bytes_of_a_device(weights),
        adapters=bytes_of_a_device((adapters, state.reference)),
        optimizer=bytes_of_a_device(state.opt_state),
        peak=peak,
        flops=_flops(config, state.model, batch) / len(devices),
        memory_traffic=micro_batches * _passes(config) * layers_read,
        collectives=collective_bytes(program, unknown_trips=micro_batches),
        rows=" x ".join(str(axis.size) for axis in batch.tokens.axes),
        parallelism=_largest_parallelism(config, kind, compiled, peak, batch),
    )


def expected_batch(config: PlanConfig, row_shards: int, parallelism: int) -> PreferenceBatch:
    """A step's pairs, all of the mean lengths, in rows that would hold the longest."""
    prompt, chosen, rejected = config.pair_tokens
    if prompt + max(chosen, rejected) > config.train_seq_len:
        raise ValueError(
            f"--pair_tokens {config.pair_tokens}: the longer sequence exceeds train_seq_len={config.train_seq_len}. "
            "Give the mean tokens of your prompts, chosen and rejected responses"
        )
    longest_pair = round_up(2 * config.train_seq_len, LENGTH_MULTIPLE)
    at_once = row_bound(parallelism, longest_pair)
    pairs = [TokenizedPair(*(np.zeros(n, np.int32) for n in config.pair_tokens))] * config.trainer.train_batch_size
    a_shard = round_up(math.ceil(sum(pair.size for pair in pairs) / row_shards * 1.05), LENGTH_MULTIPLE)
    row_length = max(longest_pair, min(at_once, a_shard))
    rows = [np.array(row) for row in plan_rows([pair.size for pair in pairs], row_length)]
    pairs_per_row = max(len(row) for row in rows)
    layout = Layout(
        micro_batches=-(-len(rows) // row_shards),
        rows=row_shards,
        row_length=row_length,
        targets=round_up(pairs_per_row * (chosen + rejected), LENGTH_MULTIPLE),
        pairs=pairs_per_row,
    )
    known = np.zeros((len(pairs), 2), np.float32) if config.reference_log_probs == "cached" else None
    return pack(pairs, rows, layout, known)


def compile_step(step: TrainStep, state: TrainState, batch: PreferenceBatch, kind: DeviceKind) -> tuple[int, str]:
    """(bytes that a device needs, the optimized program); the program is empty if it does not fit."""
    try:
        compiled = step.lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        # XLA says how much it would have needed, in one of two ways.
        everything = re.search(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm", str(error))
        temporary = re.search(r"required for HLO temporaries \(([\d.]+)([KMG])\)", str(error))
        if (needed := everything or temporary) is None:
            raise
        num_bytes = int(float(needed[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[needed[2]])
        return num_bytes + (0 if everything else bytes_of_a_device((state, batch))), ""
    return ProgramMemory.of(compiled).total, compiled.as_text()


def report(config: PlanConfig, found: Plan) -> str:
    """For the person at the terminal."""
    gib = 2.0**30
    kind = found.kind
    seconds = found.seconds
    bound = max(seconds, key=lambda name: seconds[name])
    slowest = seconds[bound]
    rest = found.peak - found.weights - found.adapters - found.optimizer
    lines = [
        f"{config.initialize_from_hf} on {config.topology} ({found.num_devices} devices)",
        f"parameters         {found.parameters:,}, and {found.trainable:,} of adapters "
        f"({found.trainable / (found.parameters + found.trainable):.2%} trainable)",
        f"a step             {config.trainer.train_batch_size} pairs in {found.rows} tokens "
        "(micro-batches x rows x tokens)",
        "",
        f"memory of a device {found.peak / gib:.2f} of {kind.memory / gib:.2f} GiB",
        f"  weights          {found.weights / gib:.2f}",
        f"  adapters         {found.adapters / gib:.2f}",
        f"  optimizer        {found.optimizer / gib:.2f}",
        f"  activations      {rest / gib:.2f}  (and all else that the compiled step needs)",
        "",
        f"a step, a device   {found.flops / 1e12:.2f} TFLOP, {found.memory_traffic / 1e9:.1f} GB of weights read, "
        f"{sum(found.collectives.values()) / 1e9:.2f} GB from other devices",
        *(f"  {name:<18} {num_bytes / 1e9:.2f} GB" for name, num_bytes in sorted(found.collectives.items())),
        "at best            "
        + ", ".join(f"{name} {value:.3f} s" for name, value in seconds.items())
        + f": bound by {bound}, {slowest:.2f} s a step, "
        f"{config.trainer.train_batch_size / slowest:,.0f} pairs/s",
        _told_parallelism(found),
    ]
    if not kind.is_tpu:
        lines.append(f"The step was compiled for TPU chips in the place of {kind.name}: memory is an estimate.")
    if not found.fits:
        lines.append(f"DOES NOT FIT. {_suggestion(config, found)}")
    return "\n".join(lines)


def _told_parallelism(found: Plan) -> str:
    if found.parallelism is None:
        return ""
    if found.fits and found.rows.startswith("1 x"):
        return "all pairs of a step are computed at once; a larger per_device_parallelism would change nothing"
    return f"per_device_parallelism fits up to {found.parallelism}"


def _suggestion(config: PlanConfig, found: Plan) -> str:
    if found.parallelism:
        return f"Set trainer.per_device_parallelism to {found.parallelism}: the rest of a step is accumulated."
    ways = []
    if config.model.gradient_checkpointing != "full":
        ways.append("model.gradient_checkpointing=full")
    if found.weights > 0.5 * found.kind.memory:
        ways.append("more devices on the mesh's data axis (trainer.mesh), which split the weights")
        if config.model.quantization == "none":
            ways.append("model.quantization=nf4, which makes the weights of the layers a quarter as large")
    return "Try " + (" or ".join(ways) or "a smaller train_seq_len, or more devices on the mesh's model axis") + "."


def _state_of_a_run(config: PlanConfig, decoder: DecoderConfig, optimizer: Any, placement: Placement) -> TrainState:
    # What a run would compute in on such devices, whatever this machine has.
    policy = precision_of("trainer.mp", config.trainer.mp or "p=f32,c=bfloat16")
    dtype = policy.compute_dtype
    if config.model.dtype is not None:
        dtype = precision_of("model.dtype", config.model.dtype).param_dtype
    return describe_state(
        decoder,
        config.lora,
        optimizer,
        placement,
        dtype=dtype,
        adapter_dtype=policy.param_dtype,
        compute=config.model.compute,
        quantization=config.model.quantization,
        with_frozen_adapters=config.reference_adapter is not None,
    )


def _passes(config: PlanConfig) -> float:
    """Through the layers, in a step: of the policy there and back, of its recomputation, of the reference."""
    return 2.0 + RECOMPUTED[config.model.gradient_checkpointing] + _computes_reference(config)


def _computes_reference(config: PlanConfig) -> bool:
    return config.reference_log_probs != "cached" and not config.loss.reference_free


def _flops(config: PlanConfig, model: CausalLM, batch: PreferenceBatch) -> float:
    """Of all devices, with what is computed again."""
    with_reference = _computes_reference(config)
    useful = float(useful_flops(model, batch, with_reference=with_reference))
    return useful * _passes(config) / (2.0 + with_reference)


def _gathered_from(placement: Placement) -> int:
    """How many devices' shards of a weight make up what one of them reads."""
    split = placement.parameters.get("embed")
    names = (split,) if isinstance(split, str) else tuple(split or ())
    return math.prod(placement.mesh.shape[name] for name in names)


def _largest_parallelism(
    config: PlanConfig, kind: DeviceKind, compiled: Callable, peak: int, batch: PreferenceBatch
) -> int | None:
    """By a line through the peaks at two row lengths: memory is linear in the row."""
    longest_pair = round_up(2 * config.train_seq_len, LENGTH_MULTIPLE)
    length = batch.tokens.axes[-1].size
    other = 1 if length > longest_pair else 2
    other_batch, other_peak, _ = compiled(other)
    other_length = other_batch.tokens.axes[-1].size
    (short, low), (long, high) = sorted([(length, peak), (other_length, other_peak)])
    if low > kind.memory:
        return None
    if high <= low:  # all of a step's pairs are computed at once already
        return max(1, long // longest_pair)
    most = short + (kind.memory - low) / (high - low) * (long - short)
    return max(1, int(most) // longest_pair)


def run() -> None:
    """The command `lora-dpo-plan`."""
    jax.config.update("jax_platforms", "cpu")  # a plan is no work for what may be busy here
    with told_in_a_line():
        if not main(parse_arguments(PlanConfig)).fits:
            raise SystemExit(1)


if __name__ == "__main__":
    run()
