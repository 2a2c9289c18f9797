"""One update: policy and reference log-probs of a packed batch, the loss, gradients of the adapters, AdamW."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import optax
from haliax import NamedArray
from jax.sharding import NamedSharding

from lora_dpo_jax.cost.flops import useful_flops
from lora_dpo_jax.data.packing import MICRO, PreferenceBatch
from lora_dpo_jax.log_probs import pair_log_probs, policy_and_reference_log_probs
from lora_dpo_jax.lora import equals_reference, trainable_filter
from lora_dpo_jax.losses import PairLogProbs, PreferenceLoss, preference_metrics
from lora_dpo_jax.models import CausalLM


class TrainState(eqx.Module):
    """What a step takes and gives. Of `model`, only the adapters change; the weights stay the same arrays."""

    step: jax.Array  # int32: steps so far
    skipped: jax.Array  # int32: those among them whose update was not made, as a number was not finite
    model: CausalLM
    opt_state: optax.OptState
    key: jax.Array  # for dropout
    # The reference's own adapters (a tree like `model`, None at weights); None: the reference is the bare base.
    reference: Any = None

    @staticmethod
    def init(model: CausalLM, optimizer: optax.GradientTransformation, *, key, reference: Any = None) -> "TrainState":
        """`model` has adapters already. `reference`: see `lora.frozen_copy`."""
        adapters = eqx.filter(model, trainable_filter(model))
        none, no_skips = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)  # two, as both are donated
        return TrainState(none, no_skips, model, optimizer.init(adapters), key, reference)

    @property
    def trained(self) -> dict[str, Any]:
        """All that steps change: with the seed and the weights, it is what a run needs to go on."""
        adapters = eqx.filter(self.model, trainable_filter(self.model))
        return {"step": self.step, "skipped": self.skipped, "adapters": adapters, "optimizer": self.opt_state}

    def with_trained(self, trained: dict[str, Any]) -> "TrainState":
        """The state of which `trained` is the trained part; the rest is this one's."""
        model = eqx.combine(trained["adapters"], self.model)
        return TrainState(trained["step"], trained["skipped"], model, trained["optimizer"], self.key, self.reference)


class StepMetrics(eqx.Module):
    """Scalars by name, and for each part of the batch the loss of each pair, for telling which one went wrong."""

    values: dict[str, jax.Array]
    pair_losses: tuple[NamedArray, ...]  # {micro, row, pair}
    pair_ids: tuple[NamedArray, ...]  # likewise; -1 = no pair


class TrainStep:
    """`state, metrics = step(state, batch)`, compiled once per shape of batch.

    A batch is one PreferenceBatch, or several of different shapes whose pairs count together. The adapters and the
    optimizer state are donated: use the returned state. The metrics are the means over the pairs of the batch. Where
    the loss or a gradient is not finite, the update is not made and counts as skipped; schedules go by those made.
    """

    def __init__(
        self,
        loss: PreferenceLoss,
        optimizer: optax.GradientTransformation,
        *,
        schedule: optax.Schedule | None = None,
        scope: Callable[[], AbstractContextManager] = nullcontext,
    ):
        """`schedule` is only for the metric `learning_rate`; `scope`: see `sharding.Placement.scope`."""
        self.loss, self.optimizer, self.schedule, self.scope = loss, optimizer, schedule, scope
        self._compiled: Any = None  # made when it is known where the state lies

    def __call__(
        self, state: TrainState, batch: PreferenceBatch | tuple[PreferenceBatch, ...]
    ) -> tuple[TrainState, StepMetrics]:
        moving, weights = self._split(state)
        with self.scope():
            (step, skipped, adapters, opt_state), metrics = self._program(moving)(moving, weights, _parts(batch))
        model = eqx.combine(adapters, weights.model)
        return TrainState(step, skipped, model, opt_state, state.key, state.reference), metrics

    def lower(self, state: TrainState, batch: PreferenceBatch | tuple[PreferenceBatch, ...]):
        """The lowered step, to compile and ask for its memory and cost; arrays may be ShapeDtypeStructs."""
        moving, weights = self._split(state)
        with self.scope():
            return self._program(moving).lower(moving, weights, _parts(batch))

    @property
    def num_compilations(self) -> int:
        return 0 if self._compiled is None else self._compiled._cache_size()

    def _program(self, moving: tuple) -> Any:
        """Gives the state back split over the mesh as it was: to JAX any other spelling is another program."""
        if self._compiled is None:
            self._compiled = jax.jit(
                self._update, donate_argnums=0, out_shardings=(jax.tree.map(_mesh_sharding, moving), None)
            )
        return self._compiled

    def _split(self, state: TrainState) -> tuple[tuple, "_Weights"]:
        adapters, weights = eqx.partition(state.model, trainable_filter(state.model))
        return (state.step, state.skipped, adapters, state.opt_state), _Weights(weights, state.reference, state.key)

    def _update(self, moving: tuple, weights: "_Weights", parts: tuple[PreferenceBatch, ...]):
        step, skipped, adapters, opt_state = moving
        counts = _counts(parts)
        gradients, sums, pair_losses = self._accumulate(step, adapters, weights, parts, counts["pairs"])
        updates, new_opt_state = self.optimizer.update(gradients, opt_state, adapters)
        grad_norm = optax.tree.norm(gradients)
        is_finite = jnp.isfinite(grad_norm) & jnp.isfinite(sums["dpo_loss"])
        new = optax.apply_updates(adapters, updates), new_opt_state
        adapters, opt_state = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), new, (adapters, opt_state))
        values = {name: value / counts["pairs"] for name, value in sums.items()}
        updates_before = step - skipped
        skipped = skipped + (~is_finite).astype(jnp.int32)
        values |= {"loss": values["dpo_loss"], "grad_norm": grad_norm, "skipped_steps": skipped, **counts}
        model = eqx.combine(adapters, weights.model)
        computes_reference = not self.loss.reference_free and parts[0].reference_chosen is None
        values["flops"] = sum(useful_flops(model, part, with_reference=computes_reference) for part in parts)
        if self.schedule is not None:
            values["learning_rate"] = self.schedule(updates_before)
        moved = step + 1, skipped, adapters, opt_state
        return moved, StepMetrics(values, pair_losses, tuple(part.pair_ids for part in parts))

    def _accumulate(self, step, adapters, weights: "_Weights", parts: tuple[PreferenceBatch, ...], num_pairs):
        """Gradients of the mean loss, sums of the metrics, and each pair's loss, one micro-batch after the other."""
        key = jax.random.fold_in(weights.key, step)
        all_ties: Any = False
        if not self.loss.reference_free:
            all_ties = equals_reference(adapters, weights.reference, training=True)

        def micro_loss(adapters, micro: PreferenceBatch):
            model = eqx.combine(adapters, weights.model)
            reference = None if self.loss.reference_free else _known_reference(micro)
            if self.loss.reference_free or reference is not None:
                policy = pair_log_probs(model, micro, key=key)
            else:
                policy, reference = policy_and_reference_log_probs(model, weights.reference, micro, key=key)
            losses = self.loss(policy, reference)
            sums = preference_metrics(losses, policy, reference, micro.is_pair, all_ties=all_ties)
            sums = {name: value.scalar() for name, value in sums.items()}
            return sums["dpo_loss"] / num_pairs, (sums, losses.loss)

        def add_part(totals, part: PreferenceBatch):
            def add_micro_batch(index, carry):
                gradients, sums, pair_loss = carry
                micro = part.micro_batch(index)
                (_, (more_sums, micro_pair_loss)), more = jax.value_and_grad(micro_loss, has_aux=True)(adapters, micro)
                gradients, sums = jax.tree.map(jnp.add, (gradients, sums), (more, more_sums))
                return gradients, sums, pair_loss.updated_slice({MICRO: index}, micro_pair_loss)

            start = (*totals, hax.zeros_like(part.pair_ids, dtype=jnp.float32))
            # Micro-batches that this step does not fill cost nothing.
            used = part.num_used_micro_batches
            if part.pair_ids.resolve_axis(MICRO).size > 1:
                return jax.lax.fori_loop(0, used, add_micro_batch, start)
            if len(parts) == 1:
                return add_micro_batch(0, start)
            # No loop: what is the same in each turn, here everything, XLA computes before it even if there is no turn.
            return jax.lax.cond(used > 0, lambda carry: add_micro_batch(0, carry), lambda carry: carry, start)

        shapes = jax.eval_shape(lambda: micro_loss(adapters, parts[0].micro_batch(0))[1][0])
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (adapters, shapes))
        gradients, sums = zeros
        pair_losses = []
        for part in parts:
            gradients, sums, pair_loss = add_part((gradients, sums), part)
            pair_losses.append(pair_loss)
        return gradients, sums, tuple(pair_losses)


def _parts(batch: PreferenceBatch | tuple[PreferenceBatch, ...]) -> tuple[PreferenceBatch, ...]:
    return (batch,) if isinstance(batch, PreferenceBatch) else batch


class _Weights(eqx.Module):
    """What a step reads and never writes."""

    model: Any
    reference: Any
    key: jax.Array


def _known_reference(batch: PreferenceBatch) -> PairLogProbs | None:
    """The reference's log-probs if the batch brings them: no forward pass is then compiled for it."""
    if batch.reference_chosen is None or batch.reference_rejected is None:
        return None
    return PairLogProbs(batch.reference_chosen, batch.reference_rejected, batch.chosen_tokens, batch.rejected_tokens)


def _mesh_sharding(array: Any) -> NamedSharding | None:
    """None off a mesh, where arrays stay on the device that they are on."""
    sharding = getattr(array, "sharding", None)  # a tracer has none
    return sharding if isinstance(sharding, NamedSharding) else None


def _counts(parts: tuple[PreferenceBatch, ...]) -> dict[str, jax.Array]:
    """Pairs, real tokens (a prompt counts once per sequence), and how much of the rows computed is padding."""
    num_tokens: Any = 0
    num_shared: Any = 0
    computed: Any = 0
    num_pairs: Any = 0
    for part in parts:
        is_token = part.segment_ids > 0
        num_tokens += hax.sum(is_token).scalar()
        num_shared += hax.sum(is_token & (part.branch_ids == 0)).scalar()
        computed += part.tokens.array[0].size * part.num_used_micro_batches
        num_pairs += hax.sum(part.is_pair).scalar()
    padding = 1.0 - num_tokens / jnp.maximum(computed, 1)
    return {"tokens": num_tokens + num_shared, "pairs": num_pairs, "padding_fraction": padding}
