"""One update: the objective's loss over all micro-batches of a batch, gradients of the adapters, the optimizer."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import optax
from haliax import NamedArray
from jax.core import Tracer
from jax.sharding import NamedSharding

from lora_dpo_jax.axes import MICRO
from lora_dpo_jax.data.packing import PreferenceBatch
from lora_dpo_jax.lora import constant_filter, trainable_filter
from lora_dpo_jax.models import CausalLM
from lora_dpo_jax.objective import Metric, Objective
from lora_dpo_jax.platforms import compiler_options
from lora_dpo_jax.training.optimizer import adapters_to_evaluate
from lora_dpo_jax.training.reference_sync import ReferenceSync

Batch = PreferenceBatch | tuple[PreferenceBatch, ...]  # the parts of a step, of different shapes


class TrainState(eqx.Module):
    """The input and output of a step. In `model`, only the adapters change; the weights stay the same arrays."""

    step: jax.Array  # int32: steps so far
    skipped: jax.Array  # int32: steps so far without an update, because a number was not finite
    model: CausalLM
    opt_state: optax.OptState
    key: jax.Array  # for dropout
    # The reference's adapters (a tree like `model`, with None for weights). None: the reference is the base alone.
    reference: Any = None
    reference_moves: bool = eqx.field(static=True, default=False)  # whether steps change the reference's adapters

    @staticmethod
    def init(
        model: CausalLM,
        optimizer: optax.GradientTransformation,
        *,
        key,
        reference: Any = None,
        reference_moves: bool = False,
    ) -> "TrainState":
        """The state before the first step. `model` must have adapters. `reference`: see `lora.frozen_copy`.

        `reference_moves` is for a step with a `ReferenceSync`; the reference must then have adapters.
        """
        adapters = eqx.filter(model, trainable_filter(model))
        none, no_skips = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)  # two arrays: both are donated
        return TrainState(none, no_skips, model, optimizer.init(adapters), key, reference, reference_moves)

    @property
    def trained(self) -> dict[str, Any]:
        """Everything that steps change, and the constants of the adapters. A run can resume from it and the weights."""
        constants = eqx.filter(self.model, constant_filter(self.model))
        return self.moving | ({"constants": constants} if jax.tree.leaves(constants) else {})

    @property
    def moving(self) -> dict[str, Any]:
        """Everything that steps change."""
        adapters = eqx.filter(self.model, trainable_filter(self.model))
        moving = {"step": self.step, "skipped": self.skipped, "adapters": adapters, "optimizer": self.opt_state}
        return moving | ({"reference": self.reference} if self.reference_moves else {})

    @property
    def evaluated(self) -> "TrainState":
        """The state to evaluate and to export: with averaged adapters if the optimizer keeps averages, else itself."""
        adapters = eqx.filter(self.model, trainable_filter(self.model))
        chosen = adapters_to_evaluate(self.opt_state, adapters)
        return self if chosen is adapters else dataclasses.replace(self, model=eqx.combine(chosen, self.model))

    def with_trained(self, trained: dict[str, Any]) -> "TrainState":
        """This state with `trained`, or `moving`, in place of its own."""
        constants = [trained["constants"]] if "constants" in trained else []
        return dataclasses.replace(
            self,
            step=trained["step"],
            skipped=trained["skipped"],
            model=eqx.combine(trained["adapters"], *constants, self.model),
            opt_state=trained["optimizer"],
            reference=trained.get("reference", self.reference),
        )


class StepMetrics(eqx.Module):
    """Scalars by name, and the loss of each example, by part of the batch, to find an example that went wrong."""

    values: dict[str, jax.Array]
    example_losses: tuple[NamedArray, ...]  # {micro, row, example}
    example_ids: tuple[NamedArray, ...]  # likewise; -1 = no example


class Accumulated(eqx.Module):
    """The gradients, loss and metrics of a whole batch."""

    gradients: Any  # of the mean loss over all examples, with respect to the adapters: a tree like the model
    loss: jax.Array  # the mean over all examples
    metrics: dict[str, Metric]
    example_losses: tuple[NamedArray, ...]  # {micro, row, example} of each part


class TrainStep:
    """`state, metrics = step(state, batch)`, compiled once per shape of batch.

    A batch is one PreferenceBatch, or several of different shapes. The loss is the mean over all examples of the batch.
    The adapters and the optimizer state are donated: use the returned state. If the loss or a gradient is not finite,
    the step makes no update and counts as skipped. Schedules count only updates that were made.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: optax.GradientTransformation,
        *,
        schedule: optax.Schedule | None = None,
        reference_sync: ReferenceSync | None = None,
        scope: Callable[[], AbstractContextManager] = nullcontext,
    ):
        """`schedule` is only for the metric `learning_rate`; `scope`: see `sharding.Placement.scope`.

        With `reference_sync`, the reference moves; see `TrainState.init`.
        """
        self.objective, self.optimizer, self.schedule, self.scope = objective, optimizer, schedule, scope
        self.reference_sync = reference_sync if reference_sync is not None and reference_sync.moves else None
        self._compiled: Any = None  # compiled at the first call, which shows the sharding of the state

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        moving, frozen = self._split(state)
        # In another program, which has options of its own, JAX allows none here.
        is_traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(moving))
        with self.scope():
            update = self._update if is_traced else self._program(moving)
            moved, metrics = update(moving, frozen, _parts(batch))
        return state.with_trained(moved), metrics

    def lower(self, state: TrainState, batch: Batch):
        """The lowered step, for compiling it and reading its memory and cost. Arrays may be ShapeDtypeStructs."""
        moving, frozen = self._split(state)
        with self.scope():
            return self._program(moving).lower(moving, frozen, _parts(batch))

    def compile(self, state: TrainState, batch: Batch) -> Any:
        """The compiled step, to ask for its memory and cost. Calls with arrays of the same shapes use it, too."""
        return self.lower(state, batch).compile()

    @property
    def num_compilations(self) -> int:
        return 0 if self._compiled is None else self._compiled._cache_size()

    def _program(self, moving: dict[str, Any]) -> Any:
        """The jitted update. It returns the state with unchanged shardings: others would make JAX compile it again."""
        if self._compiled is None:
            self._compiled = jax.jit(
                self._update,
                donate_argnums=0,
                out_shardings=(jax.tree.map(_mesh_sharding, moving), None),
                compiler_options=compiler_options(),
            )
        return self._compiled

    def _split(self, state: TrainState) -> tuple[dict[str, Any], "_Frozen"]:
        if state.reference_moves is (self.reference_sync is None):
            raise ValueError(
                "needed: TrainState.init(reference_moves=True) and TrainStep(reference_sync=...), or neither of them; "
                f"found: reference_moves={state.reference_moves}, reference_sync={self.reference_sync}"
            )
        weights = eqx.filter(state.model, trainable_filter(state.model), inverse=True)
        return state.moving, _Frozen(weights, None if state.reference_moves else state.reference, state.key)

    def _update(self, moving: dict[str, Any], frozen: "_Frozen", parts: tuple[PreferenceBatch, ...]):
        step, skipped, adapters, opt_state = (moving[name] for name in ("step", "skipped", "adapters", "optimizer"))
        model = eqx.combine(adapters, frozen.model)
        key = jax.random.fold_in(frozen.key, step)
        reference = moving.get("reference", frozen.reference)
        found = accumulate(self.objective, model, reference, parts, key=key)
        updates, new_opt_state = self.optimizer.update(found.gradients, opt_state, adapters)
        grad_norm = optax.tree.norm(found.gradients)
        is_finite = jnp.isfinite(grad_norm) & jnp.isfinite(found.loss)
        new = optax.apply_updates(adapters, updates), new_opt_state
        adapters, opt_state = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), new, (adapters, opt_state))
        updates_before = step - skipped
        skipped = skipped + (~is_finite).astype(jnp.int32)
        values: dict[str, Any] = {name: metric.value for name, metric in found.metrics.items()}
        values |= {"loss": found.loss, "grad_norm": grad_norm, "skipped_steps": skipped, **_counts(parts)}
        if flops := getattr(self.objective, "flops", None):
            values["flops"] = sum(flops(model, part) for part in parts)
        if self.schedule is not None:
            values["learning_rate"] = self.schedule(updates_before)
        moved = {"step": step + 1, "skipped": skipped, "adapters": adapters, "optimizer": opt_state}
        if self.reference_sync is not None:
            policy = adapters_to_evaluate(opt_state, adapters)
            moved["reference"] = self.reference_sync(step + 1, policy, reference)
        return moved, StepMetrics(values, found.example_losses, tuple(part.examples.ids for part in parts))


def accumulate(objective: Objective, model: CausalLM, reference: Any, batch: Batch, *, key) -> Accumulated:
    """Gradients, loss and metrics of a whole batch, one micro-batch after the other; for use under `jax.jit`.

    `reference` is that of the train state. `key`, for dropout, is the same for all micro-batches, or None.
    """
    parts = _parts(batch)
    if prepare := getattr(objective, "prepare", None):
        parts = prepare(model, reference, parts, key=key)
    adapters, weights = eqx.partition(model, trainable_filter(model))
    num_examples: Any = sum(hax.sum(part.examples.is_example).scalar() for part in parts)

    def micro_loss(adapters, weights, reference, micro: PreferenceBatch, num_examples, key):
        losses = objective(eqx.combine(adapters, weights), reference, micro, key=key)
        total = losses.loss.sum().scalar()
        return total / num_examples, (total, losses)

    # Traced once for each shape: its shapes are asked for below, before its first use. JAX knows such a function again
    # only if it closes over no traced array.
    traced = jax.jit(jax.value_and_grad(micro_loss, has_aux=True), inline=True)

    def losses_and_gradients(micro: PreferenceBatch):
        (_, (total, losses)), gradients = traced(adapters, weights, reference, micro, num_examples, key)
        return gradients, total, losses

    def add_part(totals, part: PreferenceBatch):
        def add_micro_batch(index, carry):
            gradients, total, metrics, example_losses = carry
            micro = part.micro_batch(index)
            more, more_total, losses = losses_and_gradients(micro)
            gradients, total, metrics = jax.tree.map(
                jnp.add, (gradients, total, metrics), (more, more_total, losses.metrics)
            )
            # Without an axis of size 1, updated_slice would write to all micro-batches.
            of_micro = losses.loss.broadcast_axis(hax.Axis(MICRO, 1))
            return gradients, total, metrics, example_losses.updated_slice({MICRO: index}, of_micro)

        start = (*totals, hax.zeros_like(part.examples.ids, dtype=jnp.float32))
        # Empty micro-batches cost nothing.
        used = part.num_used_micro_batches
        if part.num_micro_batches > 1:
            return jax.lax.fori_loop(0, used, add_micro_batch, start)
        if len(parts) == 1:
            return add_micro_batch(0, start)
        # cond, not a loop: XLA hoists loop-invariant work, here all of it, so even zero iterations would pay.
        return jax.lax.cond(used > 0, lambda carry: add_micro_batch(0, carry), lambda carry: carry, start)

    gradients, total, losses = jax.eval_shape(lambda: losses_and_gradients(parts[0].micro_batch(0)))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (gradients, total, losses.metrics))
    totals, example_losses = zeros, []
    for part in parts:
        *totals, of_part = add_part(totals, part)
        example_losses.append(of_part)
    gradients, total, metrics = totals
    return Accumulated(gradients, total / num_examples, metrics, tuple(example_losses))


def micro_batches(batch: Batch) -> Iterator[PreferenceBatch]:
    """All micro-batches of a batch that hold examples. Not for use under `jax.jit`; use `accumulate` there."""
    for part in _parts(batch):
        for index in range(int(part.num_used_micro_batches)):
            yield part.micro_batch(index)


def _parts(batch: Batch) -> tuple[PreferenceBatch, ...]:
    return (batch,) if isinstance(batch, PreferenceBatch) else batch


class _Frozen(eqx.Module):
    """The part of the state that a step reads but does not change."""

    model: Any  # its weights
    reference: Any
    key: jax.Array


def _mesh_sharding(array: Any) -> NamedSharding | None:
    """The array's sharding on a mesh. None without a mesh: the array then stays on its device."""
    sharding = getattr(array, "sharding", None)  # a tracer has none
    return sharding if isinstance(sharding, NamedSharding) else None


def _counts(parts: tuple[PreferenceBatch, ...]) -> dict[str, jax.Array]:
    """Counts of a batch. `tokens` counts a prompt once for each response; `padding_fraction` is of the computed rows.

    `pairs` counts comparisons, if the batch has any. Examples that are no pairs are counted too: as `answers` if they
    have labels, else as `examples`.
    """
    num_tokens: Any = 0
    in_sequences: Any = 0
    computed: Any = 0
    num_examples: Any = 0
    num_pairs: Any = 0
    for part in parts:
        num_tokens += hax.sum(part.segment_ids > 0).scalar()
        in_sequences += part.num_tokens_of_sequences
        computed += part.tokens.array[0].size * part.num_used_micro_batches
        num_examples += hax.sum(part.examples.is_example).scalar()
        num_pairs += hax.sum(part.examples.is_comparison).scalar()
    padding = 1.0 - num_tokens / jnp.maximum(computed, 1)
    counts = {"tokens": in_sequences, "padding_fraction": padding}
    if any(part.examples.chosen.size for part in parts):
        counts["pairs"] = num_pairs
    return counts | {noun: num_examples for noun in {part.noun for part in parts} - {"pairs"}}
