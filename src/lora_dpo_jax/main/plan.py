"""The cost of a run before its launch: memory, operations, traffic and time of a step on devices that are not here.

    python -m lora_dpo_jax.main.plan --config_path run.yaml --topology v5e:4x4

The step is compiled for the topology by libtpu (`pip install -e '.[tpu]'`), which needs no TPU. Of the model only
`config.json` is read, and of the data nothing. Exit status 1 means that the run does not fit.
"""

from dataclasses import dataclass, field

import jax

from lora_dpo_jax.data.examples import ExampleArrays
from lora_dpo_jax.main.errors import told_in_a_line
from lora_dpo_jax.printable import printable
from lora_dpo_jax.runs.capacity import Capacity, capacity_of, expected_example
from lora_dpo_jax.runs.config import TrainConfig
from lora_dpo_jax.settings.arguments import parse_arguments


@dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainConfig):
    """A run, and the devices that it would use."""

    topology: str  # a TPU slice (v5e:4x4, v5p:2x2x1, v6e:4x4), or GPUs of one host (h100:8)
    # Mean tokens of prompt, chosen and rejected response; the default is that of UltraFeedback. Of single answers, the
    # second number is that of an answer, and the third that of the answer to another prompt.
    pair_tokens: list[int] = field(default_factory=lambda: [167, 356, 352])

    def __post_init__(self):
        super().__post_init__()
        if len(self.pair_tokens) != 3 or min(self.pair_tokens) < 1:
            raise ValueError(f"pair_tokens={self.pair_tokens} must be three positive numbers: prompt, chosen, rejected")


def main(config: PlanConfig) -> Capacity:
    """Prints the plan and returns it."""
    found = capacity_of(config, config.topology, config.pair_tokens)
    print(printable(report(config, found)))
    return found


def report(config: PlanConfig, found: Capacity) -> str:
    """The plan as a text for people."""
    gib = 2.0**30
    kind = found.kind
    seconds = found.seconds
    bound = max(seconds, key=lambda name: seconds[name])
    slowest = seconds[bound]
    rest = found.peak - found.weights - found.adapters - found.optimizer
    noun = ExampleArrays.of([expected_example(config, config.pair_tokens)], str).noun
    lines = [
        f"{config.initialize_from_hf} on {config.topology} ({found.num_devices} devices)",
        f"parameters         {found.parameters:,}, and {found.trainable:,} of adapters "
        f"({found.trainable / (found.parameters + found.trainable):.2%} trainable)",
        f"a step             {config.trainer.train_batch_size} {noun} in {found.rows} tokens "
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
        f"{config.trainer.train_batch_size / slowest:,.0f} {noun}/s",
        _parallelism_text(found, noun),
    ]
    if not kind.is_tpu:
        lines.append(f"The step was compiled for TPU chips instead of {kind.name}: memory is an estimate.")
    if not found.fits:
        lines.append(f"DOES NOT FIT. {_suggestion(config, found)}")
    return "\n".join(lines)


def _parallelism_text(found: Capacity, noun: str) -> str:
    if found.parallelism is None:
        return ""
    if found.fits and found.rows.startswith("1 x"):
        return f"all {noun} of a step are computed at once; a larger per_device_parallelism would change nothing"
    return f"per_device_parallelism fits up to {found.parallelism}"


def _suggestion(config: PlanConfig, found: Capacity) -> str:
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


def run() -> None:
    """The command `lora-dpo-plan`."""
    jax.config.update("jax_platforms", "cpu")  # a plan needs no accelerator, which may be busy
    with told_in_a_line():
        if not main(parse_arguments(PlanConfig)).fits:
            raise SystemExit(1)


if __name__ == "__main__":
    run()
