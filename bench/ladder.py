"""What each saving is worth, predicted by counting operations and measured:

    python -m bench.ladder --shape 22m --data uf512 --trainer.train_batch_size 8

padded, packed, + shared prefix, + response-only head, + cached reference: each rung adds one to those before it, on the
same pairs, weights and adapters. Checks that losses and gradients stay the same. Prints a table and JSON.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bench import pairs as benchmark_pairs
from bench.layouts import Savings, lay_out
from bench.measure import Meter, emit
from bench.models import decoder_config
from bench.wiring import Subject, adapted_model, reference_log_probs
from lora_dpo_jax.cost.flops import useful_flops
from lora_dpo_jax.data import ExampleTable, PreferenceBatch
from lora_dpo_jax.lora import LoraLinear, map_linear_layers, trainable_filter
from lora_dpo_jax.losses import Dpo
from lora_dpo_jax.models import CausalLM
from lora_dpo_jax.preference_objective import PreferenceObjective
from lora_dpo_jax.runs.learner import real_learner
from lora_dpo_jax.settings.arguments import parse
from lora_dpo_jax.sharding import Placement


@dataclass(frozen=True)
class Options(Subject):
    tolerance: float = 1e-5  # relative, of losses and gradients, against the padded rung

    def __post_init__(self):
        super().__post_init__()
        if self.model.gradient_checkpointing != "none":
            raise ValueError("model.gradient_checkpointing must be none: the prediction counts no recomputation")
        if self.trainer.per_device_parallelism != -1:
            raise ValueError("trainer.per_device_parallelism must be -1: the ladder computes its pairs at once")


@dataclass(frozen=True)
class Rung:
    name: str
    savings: Savings
    cached_reference: bool = False


RUNGS = (
    Rung("padded", Savings(packing=False, shared_prefix=False, response_only=False)),
    Rung("packed", Savings(shared_prefix=False, response_only=False)),
    Rung("+ shared prefix", Savings(response_only=False)),
    Rung("+ response-only head", Savings()),
    Rung("+ cached reference", Savings(), cached_reference=True),
)


@dataclass
class Measured:
    """A rung's figures, and the gradients that tell whether it computed the same."""

    name: str
    rows: str
    predicted_gflop: float
    seconds: float
    cpu_seconds: float
    temporary_mb: float
    loss: float
    gradients: list[np.ndarray] = dataclasses.field(repr=False)
    loss_difference: float = 0.0  # relative to the first rung
    gradient_difference: float = 0.0


def main() -> None:
    options = parse(Options)
    rungs = climb(options)
    print(markdown(rungs))
    shown = [{k: v for k, v in vars(rung).items() if k != "gradients"} for rung in rungs]
    emit(
        {"shape": options.shape, "data": options.data, "pairs": options.trainer.train_batch_size, "rungs": shown},
        options.out,
    )
    check(rungs, options.tolerance)


def climb(options: Options, devices: list | None = None) -> list[Measured]:
    """Measures each rung on one batch, over and over."""
    placement = Placement(options.trainer.mesh, devices)
    pairs = benchmark_pairs.load(
        options.data,
        options.trainer.train_batch_size,
        vocab_size=decoder_config(options.shape).vocab_size,
        tokenizer=options.tokenizer,
        cap=options.train_seq_len,
    )
    # New adapters would make every loss ln 2 and half of the gradients zero: nothing to compare.
    model = _moved(adapted_model(options, placement))
    measured = [_measure(rung, options, model, pairs, placement) for rung in RUNGS]
    for rung in measured:
        rung.loss_difference = abs(rung.loss - measured[0].loss) / abs(measured[0].loss)
        rung.gradient_difference = _distance(rung.gradients, measured[0].gradients)
    return measured


def check(rungs: Sequence[Measured], tolerance: float) -> None:
    for rung in rungs:
        if not max(rung.loss_difference, rung.gradient_difference) <= tolerance:
            raise SystemExit(
                f"{rung.name}: loss and gradients differ from those of {rungs[0].name} by {rung.loss_difference:.1e} "
                f"and {rung.gradient_difference:.1e}, more than {tolerance:.0e}"
            )


def markdown(rungs: Sequence[Measured]) -> str:
    lines = [
        "| rung | rows x tokens | GFLOP | predicted | s/step | measured | CPU s/step | measured "
        "| temporary MB | loss differs | gradients differ |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    first = rungs[0]
    for rung in rungs:
        predicted, seconds, cpu = (
            getattr(first, name) / getattr(rung, name) for name in ("predicted_gflop", "seconds", "cpu_seconds")
        )
        lines.append(
            f"| {rung.name} | {rung.rows} | {rung.predicted_gflop:.0f} | {predicted:.2f}x | {rung.seconds:.3f} "
            f"| {seconds:.2f}x | {rung.cpu_seconds:.3f} | {cpu:.2f}x | {rung.temporary_mb:,.0f} "
            f"| {rung.loss_difference:.1e} | {rung.gradient_difference:.1e} |"
        )
    return "\n".join(lines)


def predicted_flops(model: CausalLM, batch: PreferenceBatch, *, with_reference: bool) -> float:
    """Operations of a step on one micro-batch: the formula of MFU, but for all that is computed, the padding too."""
    everything = dataclasses.replace(
        batch,
        # Padding passes through the layers, though it attends to nothing.
        segment_ids=hax.maximum(batch.segment_ids, 1),
        position_ids=hax.where(batch.segment_ids > 0, batch.position_ids, -1),
    )
    return float(eqx.filter_jit(useful_flops)(model, everything, with_reference=with_reference))


def _measure(rung: Rung, options: Options, model: CausalLM, pairs: ExampleTable, placement: Placement) -> Measured:
    laid_out = lay_out(list(pairs), rung.savings, row_multiple=placement.row_shards)
    if rung.cached_reference:
        laid_out = _with_reference(laid_out, reference_log_probs(model, pairs, placement))
    batch = placement.put_batch(laid_out)
    total = options.warmup + options.steps
    optimizer = optax.chain(_remember_gradients(), options.optimizer.build(total))
    learner = real_learner(PreferenceObjective(Dpo()), optimizer, _fresh(model), placement, key=jax.random.key(1))
    temporary = learner.compile(batch).memory_analysis().temp_size_in_bytes

    meter = Meter(options.warmup)
    first: tuple[float, list[np.ndarray]] | None = None
    for _ in range(total):
        metrics = learner(batch)
        jax.block_until_ready((learner.state, metrics))
        meter.end_step()
        if first is None:
            gradients = [np.array(leaf) for leaf in jax.tree.leaves(learner.state.opt_state[0])]
            first = float(metrics.values["loss"]), gradients
            meter.begin()
    assert first is not None
    timing = meter.report([benchmark_pairs.real_tokens(pairs.sizes)] * options.steps, len(pairs))
    return Measured(
        rung.name,
        rows=" x ".join(str(axis.size) for axis in laid_out.tokens.axes[1:]),
        predicted_gflop=predicted_flops(model, laid_out, with_reference=not rung.cached_reference) / 1e9,
        seconds=timing["seconds_per_step"],
        cpu_seconds=timing["cpu_seconds_per_step"],
        temporary_mb=temporary / 2**20,
        loss=first[0],
        gradients=first[1],
    )


def _with_reference(batch: PreferenceBatch, reference: np.ndarray) -> PreferenceBatch:
    """`reference` is float32 [response of the table]; those of pair n are 2n and 2n + 1."""
    ids = np.repeat(np.asarray(batch.examples.ids.array), 2, axis=-1)
    is_rejected = np.arange(ids.shape[-1]) % 2
    values = np.where(ids >= 0, reference[2 * ids + is_rejected], np.float32(0))
    return dataclasses.replace(batch, reference=hax.named(values, batch.response_tokens.axes))


def _remember_gradients() -> optax.GradientTransformation:
    """Its state is the last step's gradients."""
    return optax.GradientTransformation(
        init=lambda params: jax.tree.map(jnp.zeros_like, params), update=lambda updates, *_: (updates, updates)
    )


def _moved(model: CausalLM, size: float = 0.02) -> CausalLM:
    """With adapters whose product is not zero, as if it had been trained."""

    def move(linear: Any, names: list[str]) -> Any:
        if not isinstance(linear, LoraLinear):
            return linear
        rng = np.random.default_rng(len(names[0]))
        old = linear.lora_B.array
        new = jax.device_put(jnp.asarray(rng.normal(0, size, old.shape), old.dtype), old.sharding)
        return eqx.tree_at(lambda node: node.lora_B.array, linear, new)

    return map_linear_layers(move, model)


def _fresh(model: CausalLM) -> CausalLM:
    """A copy of the adapters, of which a step takes possession, around the same weights."""
    adapters, weights = eqx.partition(model, trainable_filter(model))
    return eqx.combine(jax.tree.map(jnp.copy, adapters), weights)


def _distance(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """Relative, over all adapters together, summed in float64."""
    squares = [
        (float(np.sum((a.astype(np.float64) - b) ** 2)), float(np.sum(b.astype(np.float64) ** 2)))
        for a, b in zip(found, expected, strict=True)
    ]
    difference, size = np.sum(squares, axis=0)
    return float(np.sqrt(difference / size))


if __name__ == "__main__":
    main()
