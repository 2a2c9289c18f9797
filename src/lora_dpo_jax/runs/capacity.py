"""The cost of a step of a run on devices that are not here: memory, operations, traffic and time.

The step is compiled for the devices by libtpu, or by JAX's CUDA plugin. Of the model only config.json is read, and of
the data nothing.
"""

import math
import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from lora_dpo_jax.columns import LABEL, WEIGHT
from lora_dpo_jax.cost.devices import DeviceKind, devices_of_topology
from lora_dpo_jax.cost.flops import useful_flops
from lora_dpo_jax.cost.memory import ProgramMemory
from lora_dpo_jax.cost.traffic import collective_bytes
from lora_dpo_jax.data import PartShape, PreferenceBatch, TokenizedExample, fill_rows
from lora_dpo_jax.data.examples import PAIR
from lora_dpo_jax.data.packing import pack
from lora_dpo_jax.data.shapes import LENGTH_MULTIPLE, round_up
from lora_dpo_jax.lora import trainable_filter
from lora_dpo_jax.models import CausalLM
from lora_dpo_jax.models.quantization import parameter_count
from lora_dpo_jax.runs.base import folder_of, read_decoder
from lora_dpo_jax.runs.best import kept_like
from lora_dpo_jax.runs.config import TrainConfig
from lora_dpo_jax.runs.learner import Learner, abstract_learner
from lora_dpo_jax.runs.steps import row_bound
from lora_dpo_jax.sharding import Placement

# Forward passes of the policy that the backward pass repeats.
RECOMPUTED = {"none": 0.0, "products": 0.0, "full": 1.0, "nested": 2.0}
# XLA's effort to make a program fast, from -1 to 1. Without it, libtpu takes 26 s of processor time for the step of an
# 8B model in place of 86 s, and finds 0.8% less memory. JAX 0.12 has no such option.
QUICK = {"exec_time_optimization_effort": -1.0} if hasattr(jax.config, "jax_exec_time_optimization_effort") else {}
UNSURE = 0.03  # a share of the memory
STEPS = 1_000_000  # used if their number depends on the data; it only affects the schedule, and none is longer


@dataclass(frozen=True)
class Sizes:
    """What is known of a step before it is compiled. Bytes and operations are of one device."""

    kind: DeviceKind
    is_stand_in: bool  # whether TPU chips stand for the GPUs of `kind`
    num_devices: int
    parameters: int
    trainable: int
    weights: int
    adapters: int
    optimizer: int
    batch: tuple[int, ...]  # micro-batches, rows, tokens
    flops: float
    memory_traffic: float


class Plan:
    """The cost of a step of a run on `topology`. Its `sizes` are there at once; the rest is compiled at first use.

    For a TPU, the step is compiled with less effort than a run takes, which is three times as fast. If the peak is then
    within UNSURE of the device's memory, the step is compiled as a run would compile it.
    """

    def __init__(self, config: TrainConfig, topology: str, pair_tokens: Sequence[int]):
        """Both `topology` and `pair_tokens` are settings of main.plan."""
        described = devices_of_topology(topology)
        self._config, self._kind = config, described.kind
        self._placement = Placement(config.trainer.mesh, described.devices)
        self._learner = _learner(config, self._placement)
        # Those of the best evaluation are there while a step runs, and are no part of its program.
        self._kept = bytes_of_a_device(kept_like(config.trainer, self._learner.state.model))
        self._longest_pair = round_up(2 * config.train_seq_len, LENGTH_MULTIPLE)
        shards, parallelism = self._placement.row_shards, config.trainer.per_device_parallelism
        self._batch = expected_batch(config, pair_tokens, shards, parallelism)
        other = 1 if _row_length(self._batch) > self._longest_pair else 2
        self._other_batch = expected_batch(config, pair_tokens, shards, other)
        self.sizes = self._sizes(described.is_stand_in)

    @property
    def peak(self) -> int:
        """The bytes of a device that the step needs while it runs."""
        return self._program[0]

    @property
    def fits(self) -> bool:
        return self.peak <= self._kind.memory

    @cached_property
    def collectives(self) -> dict[str, float]:
        """The bytes that a device gets from others, by kind of exchange."""
        return collective_bytes(self._program[1], unknown_trips=self.sizes.batch[0])

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds that each resource alone would take."""
        return {
            "arithmetic": self.sizes.flops / self._kind.flops,
            "memory": self.sizes.memory_traffic / self._kind.memory_bandwidth,
            "interconnect": sum(self.collectives.values()) / self._kind.interconnect,
        }

    @cached_property
    def parallelism(self) -> int | None:
        """The largest per_device_parallelism that fits; None if not even 1 does.

        It lies on a line through the peaks at two row lengths: memory is linear in the row.
        """
        length, other_length = _row_length(self._batch), _row_length(self._other_batch)
        if length == other_length:  # all of a step's pairs are computed at once already
            return length // self._longest_pair if self.fits else None
        other_peak = self._compiling[1].result()[0]
        (short, low), (long, high) = sorted([(length, self.peak), (other_length, other_peak)])
        if low > self._kind.memory:
            return None
        if high <= low:
            return max(1, long // self._longest_pair)
        most = short + (self._kind.memory - low) / (high - low) * (long - short)
        return max(1, int(most) // self._longest_pair)

    @cached_property
    def _compiling(self) -> list[Future]:
        """(peak, text) of the steps at both row lengths, which are compiled together: XLA uses one core for each."""
        batches = [self._batch]
        if _row_length(self._other_batch) != _row_length(self._batch):
            batches.append(self._other_batch)
        pool = ThreadPoolExecutor(len(batches), "compiling")
        return [pool.submit(self._compile, batch, self._quick) for batch in batches]

    @cached_property
    def _program(self) -> tuple[int, str]:
        peak, text = self._compiling[0].result()
        if self._quick and abs(peak / self._kind.memory - 1) < UNSURE:
            peak, text = self._compile(self._batch, {})
        return peak, text

    @property
    def _quick(self) -> dict[str, Any]:
        """XLA's options for compiling with less effort. For a GPU they make no difference."""
        return QUICK if self._placement.mesh.devices.flat[0].platform == "tpu" else {}

    def _compile(self, batch: PreferenceBatch, options: dict[str, Any]) -> tuple[int, str]:
        """(bytes that a device needs, the text of the compiled program); the text is empty if it does not fit."""
        shapes = self._placement.abstract_batch(batch)
        lowered = self._learner.step.lower(self._learner.state, shapes)
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            # XLA reports the needed memory in one of two forms.
            everything = re.search(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm", str(error))
            temporary = re.search(r"required for HLO temporaries \(([\d.]+)([KMG])\)", str(error))
            if (needed := everything or temporary) is None:
                raise
            num_bytes = int(float(needed[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[needed[2]])
            arguments = 0 if everything else bytes_of_a_device((self._learner.state, shapes))
            return num_bytes + arguments + self._kept, ""
        return ProgramMemory.of(compiled).total + self._kept, compiled.as_text()

    def _sizes(self, is_stand_in: bool) -> Sizes:
        config, state = self._config, self._learner.state
        num_devices = self._placement.mesh.size
        adapters, weights = eqx.partition(state.model, trainable_filter(state.model))
        layers_read = bytes_of_a_device(weights.model.layers) * _gathered_from(self._placement)
        micro_batches = self._batch.tokens.axes[0].size
        return Sizes(
            kind=self._kind,
            is_stand_in=is_stand_in,
            num_devices=num_devices,
            parameters=parameter_count(weights),
            trainable=parameter_count(adapters),
            weights=bytes_of_a_device(weights),
            adapters=bytes_of_a_device((adapters, state.reference)) + self._kept,
            optimizer=bytes_of_a_device(state.opt_state),
            batch=tuple(axis.size for axis in self._batch.tokens.axes),
            flops=_flops(config, state.model, self._batch) / num_devices,
            memory_traffic=micro_batches * _passes(config) * layers_read,
        )


def expected_batch(
    config: TrainConfig, pair_tokens: Sequence[int], row_shards: int, parallelism: int
) -> PreferenceBatch:
    """The examples of a step, all of the mean lengths, in rows that would hold the longest one.

    They are pairs or, for a loss of single answers, answers. KTO's second response is the answer to another prompt.
    """
    prompt, chosen, rejected = pair_tokens
    if prompt + max(chosen, rejected) > config.train_seq_len:
        raise ValueError(
            f"--pair_tokens {pair_tokens}: the longer sequence exceeds train_seq_len={config.train_seq_len}. "
            "Give the mean tokens of your prompts, chosen and rejected responses"
        )
    longest_pair = round_up(2 * config.train_seq_len, LENGTH_MULTIPLE)
    at_once = row_bound(parallelism, longest_pair)
    example = expected_example(config, pair_tokens)
    examples, responses = [example] * config.trainer.train_batch_size, len(example.responses)
    a_shard = round_up(math.ceil(len(examples) * example.size / row_shards * 1.05), LENGTH_MULTIPLE)
    row_length = max(longest_pair, min(at_once, a_shard))
    rows = [np.array(row) for row in fill_rows([example.size] * len(examples), row_length)]
    per_row = max(len(row) for row in rows)
    shape = PartShape(
        micro_batches=-(-len(rows) // row_shards),
        rows=row_shards,
        row_length=row_length,
        targets=round_up(per_row * sum(map(len, example.responses)), LENGTH_MULTIPLE),
        examples=per_row,
        responses=per_row * responses,
        comparisons=per_row * len(example.comparisons),
    )
    known = (lambda number: np.zeros(responses, np.float32)) if config.reference_log_probs == "cached" else None
    per_response = {name: np.ndim(values) == 1 for name, values in example.columns.items()}
    return pack(examples, rows, shape, known, columns=per_response)


def expected_example(config: TrainConfig, pair_tokens: Sequence[int]) -> TokenizedExample:
    """An example of the kind that the loss takes, with these numbers of tokens and the columns that it reads."""
    loss, formats = config.preference_loss, [component.format for component in config.data.components.values()]
    prompt, *responses = (np.zeros(count, np.int32) for count in pair_tokens)
    types = {format.type for format in formats}
    columns = loss.columns_in([LABEL, WEIGHT] if types == {"unpaired"} else [])
    is_single = LABEL in columns or types <= {"unpaired", "supervised"} and not loss.needs_comparisons
    if is_single and not loss.needs_mismatched:
        del responses[1:]
    per_response = {LABEL, *(name for format in formats for name in format.response_columns)}
    values = {name: [0.0] * len(responses) if name in per_response else 0.0 for name in columns}
    return TokenizedExample(prompt, tuple(responses), () if is_single else PAIR, columns=values)


def bytes_of_a_device(tree: Any) -> int:
    """The bytes that one device holds of the arrays in `tree`, which may be shapes alone."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def _learner(config: TrainConfig, placement: Placement) -> Learner:
    name, revision = config.initialize_from_hf, config.hf_revision
    folder = folder_of("initialize_from_hf", name, revision=revision, patterns=["config.json"])
    return abstract_learner(
        config.objective,
        config.optimizer.build(config.trainer.num_train_steps or STEPS),
        read_decoder(folder, config.model, config.lora),
        placement,
        lora=config.lora,
        model=config.model,
        precision=config.trainer.precision_on(placement.mesh.devices.flat[0].platform),
        has_reference_adapters=config.reference_has_adapters,
        reference_sync=config.reference_sync,
    )


def _passes(config: TrainConfig) -> float:
    """The passes through the layers in a step: forward, backward, recomputed, and the reference's."""
    return 2.0 + RECOMPUTED[config.model.gradient_checkpointing] + _computes_reference(config)


def _computes_reference(config: TrainConfig) -> bool:
    return config.loss.needs_reference and config.reference_log_probs != "cached"


def _flops(config: TrainConfig, model: CausalLM, batch: PreferenceBatch) -> float:
    """The operations of all devices in a step, with recomputation."""
    with_reference = _computes_reference(config)
    useful = float(useful_flops(model, batch, with_reference=with_reference))
    return useful * _passes(config) / (2.0 + with_reference)


def _gathered_from(placement: Placement) -> int:
    """How many devices share a weight that each of them gathers and reads whole."""
    split = placement.parameters.get("embed")
    names = (split,) if isinstance(split, str) else tuple(split or ())
    return math.prod(placement.mesh.shape[name] for name in names)


def _row_length(batch: PreferenceBatch) -> int:
    return batch.tokens.axes[-1].size
