"""The cost of a run before its launch: memory, operations, traffic and time of a step on devices that are not here.

    python -m lora_dpo_jax.main.plan --config_path run.yaml --topology v5e:4x4

The step is compiled for the topology, which needs none of its devices: by libtpu (`pip install -e '.[tpu]'`) for TPUs,
and by JAX's CUDA plugin (`pip install -e '.[gpu-plan]'`) for GPUs. Of the model only `config.json` is read, and of the
data nothing. Sizes are printed at once, and what compiling finds as soon as it is known. Exit status 1 means that the
run does not fit.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import jax

from lora_dpo_jax.cost.devices import GIB
from lora_dpo_jax.cost.gpus import ALLOCATABLE, ALLOCATED, GPUS
from lora_dpo_jax.data.examples import ExampleArrays
from lora_dpo_jax.main.errors import told_in_a_line
from lora_dpo_jax.printable import printable
from lora_dpo_jax.runs.capacity import Plan, expected_example
from lora_dpo_jax.runs.config import TrainConfig
from lora_dpo_jax.settings.arguments import parse_arguments

COMPILING = "compiling ..."  # what is printed above it is known at once


@dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainConfig):
    """A run, and the devices that it would use."""

    topology: str  # a TPU slice (v5e:4x4, v5p:2x2x1, v6e:4x4), or GPUs, eight of a host (h100:8)
    # Mean tokens of prompt, chosen and rejected response; the default is that of UltraFeedback. Of single answers, the
    # second number is that of an answer, and the third that of the answer to another prompt.
    pair_tokens: list[int] = field(default_factory=lambda: [167, 356, 352])

    def __post_init__(self):
        super().__post_init__()
        if len(self.pair_tokens) != 3 or min(self.pair_tokens) < 1:
            raise ValueError(f"pair_tokens={self.pair_tokens} must be three positive numbers: prompt, chosen, rejected")


def main(config: PlanConfig) -> Plan:
    """Prints the plan, each part as soon as it is known, and returns it."""
    plan = Plan(config, config.topology, config.pair_tokens)
    for text in texts(config, plan):
        print(printable(text), flush=True)
    return plan


def texts(config: PlanConfig, plan: Plan) -> Iterator[str]:
    """The parts of the plan for people, in the order in which they become known."""
    yield from _sizes_texts(config, plan)
    yield COMPILING
    yield from _memory_texts(plan)
    yield from _speed_texts(config, plan)
    yield _parallelism_text(config, plan)
    if not plan.fits:
        yield f"DOES NOT FIT. {_suggestion(config, plan)}"


def _sizes_texts(config: PlanConfig, plan: Plan) -> Iterator[str]:
    sizes = plan.sizes
    yield f"{config.initialize_from_hf} on {config.topology} ({sizes.num_devices} devices)"
    yield (
        f"parameters         {sizes.parameters:,}, and {sizes.trainable:,} of adapters "
        f"({sizes.trainable / (sizes.parameters + sizes.trainable):.2%} trainable)"
    )
    yield (
        f"a step             {config.trainer.train_batch_size} {_noun(config)} in "
        f"{' x '.join(map(str, sizes.batch))} tokens (micro-batches x rows x tokens)"
    )
    yield f"arrays of a device {(sizes.weights + sizes.adapters + sizes.optimizer) / GIB:.2f} GiB"
    yield f"  weights          {sizes.weights / GIB:.2f}"
    yield f"  adapters         {sizes.adapters / GIB:.2f}"
    yield f"  optimizer        {sizes.optimizer / GIB:.2f}"
    yield f"work of a device   {sizes.flops / 1e12:.2f} TFLOP, {sizes.memory_traffic / 1e9:.1f} GB of weights read"
    if sizes.is_stand_in:
        yield (
            f"TPU chips stand for {sizes.kind.name} here, so memory is an estimate. For the GPU's own program: "
            "pip install 'lora_dpo_jax[gpu-plan]'"
        )


def _memory_texts(plan: Plan) -> Iterator[str]:
    sizes = plan.sizes
    rest = plan.peak - sizes.weights - sizes.adapters - sizes.optimizer
    yield f"memory of a device {plan.peak / GIB:.2f} of {sizes.kind.memory / GIB:.2f} GiB"
    yield f"  activations      {rest / GIB:.2f}  (and all else that the compiled step needs beside its arrays)"
    gpu = GPUS.get(sizes.kind.name)
    if gpu and plan.fits and plan.peak > ALLOCATED * gpu.memory:
        share = min(ALLOCATABLE, math.ceil(100 * plan.peak / gpu.memory) / 100)
        yield (
            f"  set XLA_PYTHON_CLIENT_MEM_FRACTION={share:.2f} or more for the run: by itself JAX takes "
            f"{ALLOCATED:.0%} of a GPU's memory"
        )


def _speed_texts(config: PlanConfig, plan: Plan) -> Iterator[str]:
    seconds = plan.seconds
    bound = max(seconds, key=lambda name: seconds[name])
    yield f"from other devices {sum(plan.collectives.values()) / 1e9:.2f} GB"
    for name, num_bytes in sorted(plan.collectives.items()):
        yield f"  {name:<16} {num_bytes / 1e9:.2f}"
    yield (
        "at best            "
        + ", ".join(f"{name} {value:.3f} s" for name, value in seconds.items())
        + f": bound by {bound}, {seconds[bound]:.2f} s a step, "
        f"{config.trainer.train_batch_size / seconds[bound]:,.0f} {_noun(config)}/s"
    )


def _noun(config: PlanConfig) -> str:
    return ExampleArrays.of([expected_example(config, config.pair_tokens)], str).noun


def _parallelism_text(config: PlanConfig, plan: Plan) -> str:
    if plan.parallelism is None:
        return "not even per_device_parallelism=1 fits"
    if plan.fits and plan.sizes.batch[0] == 1:
        return (
            f"all {_noun(config)} of a step are computed at once; a larger per_device_parallelism would change nothing"
        )
    return f"per_device_parallelism fits up to {plan.parallelism}"


def _suggestion(config: PlanConfig, plan: Plan) -> str:
    if plan.parallelism:
        return f"Set trainer.per_device_parallelism to {plan.parallelism}: the rest of a step is accumulated."
    ways = []
    if config.model.gradient_checkpointing != "full":
        ways.append("model.gradient_checkpointing=full")
    if plan.sizes.weights > 0.5 * plan.sizes.kind.memory:
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
