"""The source of the reference's log-probs in a run: a cache, which is filled first, or each step itself."""

import logging
from collections.abc import Iterator
from typing import Literal

import numpy as np

from lora_dpo_jax.data.order import StepIds
from lora_dpo_jax.data.table import ExampleTable
from lora_dpo_jax.evaluation import MicroBatchScorer, Scorer, scores_of
from lora_dpo_jax.losses import Scores
from lora_dpo_jax.models import CausalLM
from lora_dpo_jax.reference_cache import ReferenceCache, missing_examples
from lora_dpo_jax.runs.steps import Steps
from lora_dpo_jax.sharding import Placement
from lora_dpo_jax.training.step import micro_batches

logger = logging.getLogger("lora_dpo_jax")


class ReferenceLogProbs:
    """The log-probs of the model `reference`, as the setting reference_log_probs asks."""

    def __init__(
        self,
        reference: CausalLM,
        setting: Literal["auto", "live", "cached"],
        cache: ReferenceCache | None,
        placement: Placement,
    ):
        """`cache` is None if the setting is live."""
        self.reference, self.setting, self.cache, self.placement = reference, setting, cache, placement

    def of_steps(self, steps: Steps, *, choice: str = "auto") -> np.ndarray | None:
        """The values of all responses of the pairs of `steps`, float32 [response]; NaN where no batch needs one.

        None if the steps should compute them.

        `auto` chooses the way with fewer forward passes. This is the steps' way for one epoch of which nothing is
        cached, even if the next epoch fills up its last batch. A resumed run keeps its former `choice`, live or
        cached, because the two may differ in their last bits.

        Missing values are computed in the rows of the step that needs them first. The pairs of step 0 get values of
        its own rows, even if other values are cached. So equal policy and reference have equal scores, bit for bit.
        """
        if self.cache is None:
            logger.info("reference log-probs: live, in each step, as reference_log_probs asks")
            return None
        assert isinstance(steps.ids, StepIds), "as runs.assembly makes them"
        visits, visited = steps.ids.num_visits, steps.ids.visited()
        values = self.cache.find(steps.pairs)
        missing = visited[missing_examples(steps.pairs, values)[visited]]
        if self.setting == "auto" and choice == "live":
            logger.info("reference log-probs: live, in each step, as in the steps before")
            return None
        is_one_epoch = visits - len(visited) < steps.ids.size
        is_live = choice == "auto" and is_one_epoch and len(missing) == len(visited)
        if self.setting == "auto" and is_live:
            logger.info(
                "reference log-probs: live, in each step; the run visits its %s %s once, and none of them is cached",
                f"{len(visited):,}",
                steps.pairs.arrays.noun,
            )
            return None
        self._log(steps.pairs, len(visited), len(missing), f"the run visits each {visits / len(visited):.1f} times")
        return self._completed(self.cache, steps, visited, values)

    def _completed(self, cache: ReferenceCache, steps: Steps, visited: np.ndarray, values: np.ndarray) -> np.ndarray:
        """`values` with those computed that are missing, or belong to step 0 but were computed in other rows."""
        pairs, first = steps.pairs, np.unique(steps.ids[0])
        of_first = pairs.arrays.responses_of(first)
        values[of_first] = cache.find(pairs.subset(first), rows=steps.number_of_rows(0, self.placement))
        is_visited = np.zeros(len(pairs), bool)
        is_visited[visited] = True
        numbers = [*steps.first_visits(missing_examples(pairs, values) & is_visited)]
        score = MicroBatchScorer(self.placement.scope)

        def computed() -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
            for step, parts in zip(numbers, steps.batches(self.placement, steps=numbers), strict=True):
                rows = steps.number_of_rows(step, self.placement)
                for micro in micro_batches(parts):
                    yield rows, *score(self.reference, micro)

        return cache.record(pairs, computed(), values) if numbers else values

    def of_table(self, score: Scorer) -> Scores:
        """The values of all pairs that `score` scores."""
        if self.cache is None:
            return score(self.reference)
        pairs = score.examples
        values = self.cache.find(pairs)
        missing = int(missing_examples(pairs, values).sum())
        self._log(pairs, len(pairs), missing, "to score them")
        return scores_of(pairs, self.cache.compute(self.reference, score, values) if missing else values)

    def _log(self, pairs: ExampleTable, wanted: int, missing: int, why: str) -> None:
        noun = pairs.arrays.noun
        found = f"{wanted - missing:,} of {wanted:,} {noun} found in {self.cache and self.cache.folder}"
        computed = f"; computing {missing:,} once ({why})" if missing else ""
        logger.info("reference log-probs: %s%s", found, computed)
