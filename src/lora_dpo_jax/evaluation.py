"""Scores of preference pairs: log-probs of policy and reference, pair by pair, and their summary."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import equinox as eqx
import haliax as hax
import jax
import numpy as np

from lora_dpo_jax.data.batches import PairTable, packed_rows
from lora_dpo_jax.data.packing import PreferenceBatch
from lora_dpo_jax.log_probs import pair_log_probs
from lora_dpo_jax.losses import PairLogProbs, PreferenceLoss, preference_metrics
from lora_dpo_jax.models import CausalLM
from lora_dpo_jax.sharding import on_host

FIELDS = tuple(field.name for field in dataclasses.fields(PairLogProbs))


class PairScorer:
    """Log-probs of every pair of a table under a model; compiled once, each pair scored exactly once."""

    def __init__(
        self,
        pairs: PairTable,
        *,
        rows: int,
        put_batch: Callable = jax.device_put,
        scope: Callable[[], AbstractContextManager] = nullcontext,
    ):
        """`rows` of packed pairs are computed together."""
        self.pairs, self.rows, self.put_batch, self.scope = pairs, rows, put_batch, scope
        self._compiled = eqx.filter_jit(pair_log_probs)

    def __call__(self, model: CausalLM, progress: Callable = lambda batches, total: batches) -> PairLogProbs:
        """float32 NumPy-backed arrays {pair}, in the table's order. `progress` wraps the iterator over batches."""
        scores = {name: np.full(len(self.pairs), np.nan, np.float32) for name in FIELDS}
        for ids, found in self.in_batches(model, progress):
            for name, values in scores.items():
                values[ids] = found[name]
        Pair = hax.Axis("pair", len(self.pairs))
        return PairLogProbs(**{name: hax.named(values, Pair) for name, values in scores.items()})

    def in_batches(
        self,
        model: CausalLM,
        progress: Callable = lambda batches, total: batches,
        *,
        wanted: np.ndarray | None = None,
    ) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """The same as it comes: the numbers of some pairs, and the arrays of their `PairLogProbs` by name.

        Batches without any pair that is `wanted` (bool [pair]; None: all are) are left out.
        """
        total, batches = packed_rows(self.pairs, rows=self.rows, place=self.put_batch)
        for batch in progress(batches, total):
            micro: PreferenceBatch = batch.micro_batch(0)
            ids = on_host(micro.pair_ids.array)
            if wanted is not None and not wanted[ids[ids >= 0]].any():
                continue
            with self.scope():
                log_probs = self._compiled(model, micro)
            yield ids[ids >= 0], {name: on_host(getattr(log_probs, name).array)[ids >= 0] for name in FIELDS}


def summarize(loss: PreferenceLoss, policy: PairLogProbs, reference: PairLogProbs | None) -> dict[str, float]:
    """The means over all pairs, under the names of the training metrics."""
    is_pair = hax.ones_like(policy.chosen, dtype=bool)
    sums = preference_metrics(loss(policy, reference), policy, reference, is_pair)
    means = {name: float(value.scalar()) / is_pair.size for name, value in sums.items()}
    return {"loss": means["dpo_loss"], **means}
