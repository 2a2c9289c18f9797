"""The objective of preference losses: from a model and a packed micro-batch to a loss for each example.

Only this module decides whether the reference is computed live, was computed before, or is not needed.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
from haliax import NamedArray

from lora_dpo_jax.axes import EXAMPLE, MICRO
from lora_dpo_jax.cost.flops import useful_flops
from lora_dpo_jax.data.packing import PreferenceBatch
from lora_dpo_jax.log_probs import score_responses, score_with_reference
from lora_dpo_jax.lora import equals_reference
from lora_dpo_jax.losses import Examples, Loss, Scores
from lora_dpo_jax.losses.interface import equal_scores
from lora_dpo_jax.losses.token_metrics import STATISTICS as TOKEN_STATISTICS
from lora_dpo_jax.losses.token_metrics import token_metrics
from lora_dpo_jax.losses.whole_batch import ScoredPart, of_whole_batch
from lora_dpo_jax.models import CausalLM
from lora_dpo_jax.models.experts import BALANCE, SEGMENT
from lora_dpo_jax.objective import ExampleLosses, Mean, Metric
from lora_dpo_jax.platforms import jitted
from lora_dpo_jax.sharding import on_host


@dataclass(frozen=True)
class PreferenceObjective:
    """An `objective.Objective` of `PreferenceBatch`es."""

    loss: Loss
    token_metrics: bool = False  # also the metrics of losses.token_metrics, from the same pass over the head
    router_aux_loss_coef: float = 0.0  # the weight of how unevenly routers treat an example; 0 leaves it out

    @property
    def needs_tokens(self) -> bool:
        """Whether it needs scores of single tokens, and not only sums over responses."""
        return self.token_metrics or self.loss.needs_tokens

    def __call__(self, model: CausalLM, reference: Any, micro: PreferenceBatch, /, *, key=None) -> ExampleLosses:
        policy, theirs = self.scores(model, reference, micro, key=key)
        return self._losses(policy, theirs, micro, are_equal=self._are_equal(model, reference, theirs))

    def evaluated(self, model: CausalLM, reference: Any, micro: PreferenceBatch) -> "EvaluatedRows":
        """The losses, and the scores that they are made of."""
        policy, theirs = self.scores(model, reference, micro)
        are_equal = self._are_equal(model, reference, theirs)
        losses = self._losses(policy, theirs, micro, are_equal=are_equal)
        margins = self.loss.margins(policy, theirs, micro.examples)
        if margins is not None:
            margins = hax.where(are_equal, 0.0, margins)  # rounding differences between two programs
        return EvaluatedRows(losses, policy.log_probs, None if theirs is None else theirs.log_probs, margins)

    def metric_names(self, examples: Examples) -> list[str]:
        """The names of the means that an evaluation of these examples, without rows, finds. It needs no model."""

        def metrics(examples: Examples) -> dict[str, Metric]:
            scores = equal_scores(examples, (*self.loss.all_statistics, *TOKEN_STATISTICS))
            found = self.loss(scores, scores if self.loss.needs_reference else None, examples).metrics
            return found | token_metrics(scores, examples) if self.token_metrics else found

        router = ["router_aux_loss"] if self.router_aux_loss_coef and self.needs_tokens else []
        return ["loss", *jax.eval_shape(metrics, examples), *router]

    @staticmethod
    def _are_equal(model: CausalLM, reference: Any, theirs: Scores | None) -> jax.Array | bool:
        return False if theirs is None else equals_reference(model, reference, training=True)

    def _losses(
        self, policy: Scores, theirs: Scores | None, micro: PreferenceBatch, *, are_equal: jax.Array | bool
    ) -> ExampleLosses:
        losses = self.loss(policy, theirs, micro.examples, are_equal=are_equal)
        if self.router_aux_loss_coef:
            losses = self._with_router_loss(losses, policy, micro)
        if self.token_metrics:
            losses = ExampleLosses(losses.loss, losses.metrics | token_metrics(policy, micro.examples))
        return losses

    def _with_router_loss(self, losses: ExampleLosses, policy: Scores, micro: PreferenceBatch) -> ExampleLosses:
        """Adds the auxiliary loss of each example to its own, so that neither depends on what shares a batch."""
        Example = losses.loss.resolve_axis(EXAMPLE)
        of_examples = policy.auxiliary[BALANCE][SEGMENT, : Example.size].rename({SEGMENT: EXAMPLE})
        weight = micro.examples.is_example.astype(jnp.float32)
        loss = losses.loss + self.router_aux_loss_coef * weight * of_examples
        mean = Mean.over(of_examples, weight)
        return ExampleLosses(loss.rearrange(losses.loss.axes), losses.metrics | {"router_aux_loss": mean})

    def prepare(
        self, model: CausalLM, reference: Any, parts: tuple[PreferenceBatch, ...], *, key=None
    ) -> tuple[PreferenceBatch, ...]:
        """The parts of a batch with what the loss needs to know of the whole batch. See `Loss.of_batch`."""
        if self.loss.needs_of_batch == "nothing" or sum(part.num_micro_batches for part in parts) == 1:
            return parts  # the loss sees the whole batch
        scored = [self._scored(model, reference, part, key=key) for part in parts]
        prepared = []
        for part, (_, theirs, _), known in zip(parts, scored, of_whole_batch(self.loss, scored), strict=True):
            part = _with(part, known)
            if theirs is not None and not self.loss.needs_tokens_of_reference:
                part = dataclasses.replace(part, reference=theirs.log_probs)
            prepared.append(part)
        return tuple(prepared)

    def prepare_table(
        self,
        model: CausalLM,
        reference: Any,
        micro_batches: Callable[[], Iterator[PreferenceBatch]],
        *,
        scope: Callable[[], AbstractContextManager],
    ) -> Iterator[PreferenceBatch]:
        """The same for a whole table as one batch. `micro_batches` is called twice if the loss needs it."""
        if self.loss.needs_of_batch == "nothing":
            yield from micro_batches()
            return
        with scope():
            scores_of = jitted(self._scores_for_batch)
        scored = []
        for micro in micro_batches():
            with scope():
                scores = scores_of(model, reference, micro)
            scored.append(jax.tree.map(on_host, ScoredPart(*scores, micro.examples)))
        for micro, known in zip(micro_batches(), of_whole_batch(self.loss, scored), strict=True):
            yield _with(micro, known)

    def _scored(self, model: CausalLM, reference: Any, part: PreferenceBatch, *, key) -> ScoredPart:
        """The scores {micro, row, ...} of a whole part. Empty micro-batches are not computed."""
        if self.loss.needs_of_batch == "tokens":
            return ScoredPart(*self._scores_for_batch(model, reference, part), part.examples)

        def scores_of(index) -> Any:
            return self._scores_for_batch(model, reference, part.micro_batch(index), key=key)

        def add(index, found):
            return jax.tree.map(functools.partial(write, index), found, scores_of(index), is_leaf=_is_named)

        def write(index, into: NamedArray, of_micro: NamedArray) -> NamedArray:
            # Without an axis of size 1, updated_slice would write to all micro-batches.
            return into.updated_slice({MICRO: index}, of_micro.broadcast_axis(Micro.resize(1)))

        Micro = part.tokens.resolve_axis(MICRO)
        shapes = jax.eval_shape(scores_of, 0)
        empty = jax.tree.map(lambda x: hax.zeros((Micro, *x.axes), dtype=x.dtype), shapes, is_leaf=_is_named)
        policy, theirs = jax.lax.fori_loop(0, part.num_used_micro_batches, add, empty)
        return ScoredPart(policy, theirs, part.examples)

    def _scores_for_batch(
        self, model: CausalLM, reference: Any, micro: PreferenceBatch, *, key=None
    ) -> tuple[Scores, Scores | None]:
        """The scores that `Loss.of_batch` reads. Numbers of tokens alone, if it needs no more, are of any batch."""
        if self.loss.needs_of_batch == "tokens":
            return Scores(hax.zeros_like(micro.response_tokens, dtype=jnp.float32), micro.response_tokens), None
        policy, theirs = self.scores(model, reference, micro, key=key)
        return dataclasses.replace(policy, auxiliary={}), theirs

    def scores(
        self, model: CausalLM, reference: Any, micro: PreferenceBatch, *, key=None
    ) -> tuple[Scores, Scores | None]:
        """The scores of the policy and, if the loss needs them, of the reference; both {row, response}."""
        loss = self.loss
        statistics = loss.all_statistics + (TOKEN_STATISTICS if self.token_metrics else ())
        asked: Any = {"per_token": self.needs_tokens, "statistics": tuple(dict.fromkeys(statistics))}
        if self.computes_reference(micro):
            of_reference = loss.needs_tokens_of_reference
            return score_with_reference(model, reference, micro, key=key, per_token_of_reference=of_reference, **asked)
        policy = score_responses(model, micro, key=key, **asked)
        if micro.reference is None or not loss.needs_reference:
            return policy, None
        return policy, Scores(micro.reference, micro.response_tokens)

    def computes_reference(self, batch: PreferenceBatch) -> bool:
        """Whether each step computes the reference's scores."""
        known = batch.reference is not None and not self.loss.needs_tokens_of_reference
        return self.loss.needs_reference and not known

    def flops(self, model: CausalLM, batch: PreferenceBatch) -> jax.Array:
        """Useful floating-point operations of a part of a step; float32 scalar."""
        return useful_flops(model, batch, with_reference=self.computes_reference(batch))


class EvaluatedRows(eqx.Module):
    """What an evaluation finds of a micro-batch."""

    losses: ExampleLosses
    policy: NamedArray  # float32 {row, response}: log p(response | prompt) in nats
    reference: NamedArray | None  # likewise; None if the loss has none
    margins: NamedArray | None  # float32 {row, comparison}: see Loss.margins


def _with(batch: PreferenceBatch, known: dict[str, NamedArray]) -> PreferenceBatch:
    return dataclasses.replace(batch, examples=dataclasses.replace(batch.examples, of_batch=known))


def _is_named(leaf: Any) -> bool:
    return isinstance(leaf, NamedArray)
