"""Scores of a whole table under a model, and a loss's metrics from the scores of policy and reference."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import haliax as hax
import jax
import numpy as np

from lora_dpo_jax.axes import RESPONSE
from lora_dpo_jax.data.batches import packed_rows
from lora_dpo_jax.data.packing import PreferenceBatch
from lora_dpo_jax.data.table import ExampleTable
from lora_dpo_jax.log_probs import score_responses
from lora_dpo_jax.losses import Examples, Loss, Scores
from lora_dpo_jax.models import CausalLM
from lora_dpo_jax.objective import Metric, Objective
from lora_dpo_jax.platforms import jitted
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
        ids, is_response = on_host(micro.examples.ids.array), on_host(micro.examples.is_response.array)
        return ids[ids >= 0], on_host(scores.log_probs.array)[is_response]


def scores_of(examples: ExampleTable, log_probs: np.ndarray) -> Scores:
    """Scores from log p of every response of a table, float32 [response] in nats."""
    tokens = examples.arrays.scored_tokens
    Response = hax.Axis(RESPONSE, len(tokens))
    return Scores(hax.named(log_probs, Response), hax.named(np.asarray(tokens), Response))


def summarize_by_tokens(
    objective: Objective, columns: Sequence[str], score: Scorer, model: CausalLM, reference: Any
) -> dict[str, float]:
    """`summarize` for an objective that needs more than the sums from `score`. It is called for each batch.

    `reference` is the adapters of the reference, or None. `columns` are those that the objective reads.
    """

    def losses_of(model: CausalLM, reference: Any, micro: PreferenceBatch) -> tuple[jax.Array, dict[str, Metric]]:
        found = objective(model, reference, micro, key=None)
        return found.loss.sum().scalar(), found.metrics

    with score.scope():
        compiled = jitted(losses_of)

    def micro_batches() -> Iterator[PreferenceBatch]:
        _, batches = packed_rows(score.examples, rows=score.rows, place=score.put_batch, columns=columns)
        return (batch.micro_batch(0) for batch in batches)

    prepared = micro_batches()
    if over_table := getattr(objective, "prepare_table", None):
        prepared = over_table(model, reference, micro_batches, scope=score.scope)
    found = []
    for micro in prepared:
        with score.scope():
            found.append(compiled(model, reference, micro))
    loss, metrics = jax.tree.map(lambda *parts: sum(float(part) for part in parts), *found)
    return _means(loss / len(score.examples), metrics)


def summarize(loss: Loss, policy: Scores, reference: Scores | None, examples: Examples) -> dict[str, float]:
    """The means of the loss and its metrics over all examples, under the names of the training metrics."""
    losses = loss(policy, reference, examples)
    return _means(float(losses.loss.sum().scalar()) / losses.loss.size, losses.metrics)


def _means(loss: float, metrics: dict[str, Metric]) -> dict[str, float]:
    in_float64 = jax.tree.map(np.float64, metrics)
    return {"loss": loss, **{name: float(metric.value) for name, metric in in_float64.items()}}
