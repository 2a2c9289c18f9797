"""Scores of a whole table under a model, and a loss's metrics from the scores of policy and reference."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import haliax as hax
import jax
import numpy as np
from haliax import NamedArray

from lora_dpo_jax.accuracy import Comparisons
from lora_dpo_jax.axes import RESPONSE
from lora_dpo_jax.data.batches import packed_rows
from lora_dpo_jax.data.packing import PreferenceBatch
from lora_dpo_jax.data.table import ExampleTable
from lora_dpo_jax.log_probs import score_responses
from lora_dpo_jax.losses import Examples, Loss, Scores
from lora_dpo_jax.models import CausalLM
from lora_dpo_jax.objective import Metric
from lora_dpo_jax.platforms import jitted
from lora_dpo_jax.preference_objective import EvaluatedRows, PreferenceObjective
from lora_dpo_jax.sharding import on_host


class Scorer:
    """Scores of every response of a table under a model; compiled once, each response scored exactly once."""

    def __init__(
        self,
        examples: ExampleTable,
        *,
        rows: int,
        put_batch: Callable = jax.device_put,
        scope: Callable[[], AbstractContextManager] = nullcontext,
    ):
        """`rows` of packed examples are computed together."""
        self.examples, self.rows, self.put_batch, self.scope = examples, rows, put_batch, scope
        self._scores = MicroBatchScorer(scope)

    def __call__(self, model: CausalLM, progress: Callable = lambda batches, total: batches) -> Scores:
        """NumPy-backed arrays {response}, in the table's order. `progress` wraps the iterator over batches."""
        values = np.full(len(self.examples.arrays.response_tokens), np.nan, np.float32)
        for ids, log_probs in self.in_batches(model, progress):
            values[self.examples.arrays.responses_of(ids)] = log_probs
        return scores_of(self.examples, values)

    def in_batches(
        self,
        model: CausalLM,
        progress: Callable = lambda batches, total: batches,
        *,
        wanted: np.ndarray | None = None,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The same scores, batch by batch: (numbers of examples, log p of their responses, float32 in nats).

        Batches without any example that is `wanted` (bool [example]; None: all are) are left out.
        """
        total, batches = packed_rows(self.examples, rows=self.rows, place=self.put_batch)
        for batch in progress(batches, total):
            micro: PreferenceBatch = batch.micro_batch(0)
            ids = on_host(micro.examples.ids.array)
            if wanted is None or wanted[ids[ids >= 0]].any():
                yield self._scores(model, micro)


class MicroBatchScorer:
    """Scores of packed micro-batches under a model; compiled once for each shape."""

    def __init__(self, scope: Callable[[], AbstractContextManager] = nullcontext):
        self.scope = scope
        with scope():
            self._compiled = jitted(score_responses)

    def __call__(self, model: CausalLM, micro: PreferenceBatch) -> tuple[np.ndarray, np.ndarray]:
        """(ids of the examples, log p of their responses, float32 in nats)"""
        with self.scope():
            scores = self._compiled(model, micro)
        examples = micro.examples
        ids, example_of_response = on_host(examples.ids.array), on_host(examples.example_of_response.array)
        return ids[ids >= 0], on_host(scores.log_probs.array)[example_of_response >= 0]


def scores_of(examples: ExampleTable, log_probs: np.ndarray) -> Scores:
    """Scores from log p of every response of a table, float32 [response] in nats."""
    tokens = examples.arrays.scored_tokens
    Response = hax.Axis(RESPONSE, len(tokens))
    return Scores(hax.named(log_probs, Response), hax.named(np.asarray(tokens), Response))


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found of a table."""

    means: dict[str, float]  # of the loss and its metrics, under the names of the training metrics
    policy: Scores  # {response}, in the table's order
    reference: Scores | None  # likewise; None if the loss has none
    margins: np.ndarray | None  # float32 [comparison]: see Loss.margins


def evaluate_by_sums(loss: Loss, policy: Scores, reference: Scores | None, table: ExampleTable) -> Evaluation:
    """From the scores of all responses of the table."""
    total, metrics, margins = _of_table(_Identical(loss), policy, reference, table.arrays.examples)
    means = _means(float(total) / len(table), metrics)
    if margins is None or not len(table.arrays.comparisons):
        return Evaluation(means, policy, reference, None)
    return Evaluation(means, policy, reference, np.asarray(margins.array))


@dataclass(frozen=True, eq=False)
class _Identical:
    """A loss that equals only itself. As a static argument it may hold lists."""

    loss: Loss

    def __hash__(self) -> int:
        return id(self.loss)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identical) and self.loss is other.loss


@functools.partial(jax.jit, static_argnums=0)
def _of_table(
    of: _Identical, policy: Scores, reference: Scores | None, examples: Examples
) -> tuple[jax.Array, dict[str, Metric], NamedArray | None]:
    """(the sum of the losses, their metrics, the margins)"""
    losses = of.loss(policy, reference, examples)
    return losses.loss.sum().scalar(), losses.metrics, of.loss.margins(policy, reference, examples)


def evaluate_by_tokens(
    objective: PreferenceObjective, columns: Sequence[str], score: Scorer, model: CausalLM, reference: Any
) -> Evaluation:
    """The same for an objective that needs more than the sums from `score`. It is called for each batch.

    `reference` is the adapters of the reference, or None. `columns` are those that the objective reads.
    """
    table = score.examples
    with score.scope():
        compiled = jitted(objective.evaluated)

    def micro_batches() -> Iterator[PreferenceBatch]:
        _, batches = packed_rows(table, rows=score.rows, place=score.put_batch, columns=columns)
        return (batch.micro_batch(0) for batch in batches)

    sums, found = [], []
    for micro in objective.prepare_table(model, reference, micro_batches, scope=score.scope):
        with score.scope():
            of_rows: EvaluatedRows = compiled(model, reference, micro)
        sums.append(jax.tree.map(float, (of_rows.losses.loss.sum().scalar(), of_rows.losses.metrics)))
        found.append(_on_host(of_rows, micro))
    loss, metrics = jax.tree.map(lambda *parts: sum(parts), *sums)
    arrays, (ids, *values) = table.arrays, zip(*found, strict=True)
    responses, comparisons = (places(np.concatenate(ids)) for places in (arrays.responses_of, arrays.comparisons_of))
    policy, theirs = (_in_order(parts, responses) for parts in values[:2])
    assert policy is not None
    return Evaluation(
        _means(loss / len(table), metrics),
        scores_of(table, policy),
        None if theirs is None else scores_of(table, theirs),
        _in_order(values[2], comparisons) if len(comparisons) else None,
    )


def _on_host(found: EvaluatedRows, micro: PreferenceBatch) -> tuple[np.ndarray | None, ...]:
    """(ids of examples, log-probs of their responses under policy and reference, margins); None: there are none."""
    ids, is_response, is_comparison = (
        on_host(mask.array) for mask in (micro.examples.ids, micro.examples.is_response, micro.examples.is_comparison)
    )
    values = ((found.policy, is_response), (found.reference, is_response), (found.margins, is_comparison))
    return ids[ids >= 0], *(None if x is None else on_host(x.array)[mask] for x, mask in values)


def _in_order(parts: Sequence[np.ndarray | None], places: np.ndarray) -> np.ndarray | None:
    """The numbers of all parts, one after the other, at their places."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    values = np.full(len(places), np.nan, np.float32)
    values[places] = np.concatenate(known)
    return values


def comparisons_of(table: ExampleTable) -> Comparisons:
    """The comparisons of a table, as statistics see them."""
    arrays = table.arrays
    examples = arrays.examples
    chosen, rejected = (arrays.scored_tokens[np.asarray(side.array)] for side in (examples.chosen, examples.rejected))
    example = np.asarray(examples.example_of_comparison.array)
    total = np.bincount(example, arrays.weights, len(arrays)) if len(example) else np.zeros(len(arrays))
    share = np.divide(arrays.weights, total[example], out=np.zeros(len(example)), where=total[example] > 0)
    return Comparisons(chosen, rejected, share, table.prompt_hashes[example])


def summarize(loss: Loss, policy: Scores, reference: Scores | None, examples: Examples) -> dict[str, float]:
    """The means of the loss and its metrics over all examples, under the names of the training metrics."""
    total, metrics, _ = _of_table(_Identical(loss), policy, reference, examples)
    return _means(float(total) / examples.ids.size, metrics)


def _means(loss: float, metrics: dict[str, Metric]) -> dict[str, float]:
    in_float64 = jax.tree.map(np.float64, metrics)
    return {"loss": loss, **{name: float(metric.value) for name, metric in in_float64.items()}}
