"""A train step whose reference log-probabilities are known before it runs.

Until batches carry them themselves, they travel where the counts of response tokens do: a batch's `chosen_tokens` and
`rejected_tokens` reach the loss untouched, and plain DPO has no use for the counts.
"""

import dataclasses
from dataclasses import dataclass

import haliax as hax
import numpy as np

from lora_dpo_jax.data.packing import PreferenceBatch
from lora_dpo_jax.losses import Dpo, PairLogProbs


@dataclass(frozen=True)
class DpoOnCachedReference(Dpo):
    """`Dpo` on batches made by `with_reference`. To the step it needs no reference, so none is computed."""

    reference_free: bool = True

    def pair_loss(self, chosen, rejected, policy):
        return super().pair_loss(chosen - policy.chosen_tokens, rejected - policy.rejected_tokens, policy)


def with_reference(batch: PreferenceBatch, reference: PairLogProbs) -> PreferenceBatch:
    """The batch with the reference's log-probs, of {pair} in the order of the table, in place of the counts."""
    ids = np.asarray(batch.pair_ids.array)

    def of_pairs(values: hax.NamedArray) -> hax.NamedArray:
        return hax.named(np.where(ids >= 0, np.asarray(values.array)[ids], np.float32(0)), batch.pair_ids.axes)

    return dataclasses.replace(
        batch, chosen_tokens=of_pairs(reference.chosen), rejected_tokens=of_pairs(reference.rejected)
    )
