"""The source of the reference's log-probs in a run: a cache, which is filled first, or each step itself."""

import logging
from collections.abc import Callable
from typing import Literal

import numpy as np

from lora_dpo_jax.data.order import StepIds
from lora_dpo_jax.data.table import ExampleTable
from lora_dpo_jax.evaluation import Scorer, scores_of
from lora_dpo_jax.losses import Scores
from lora_dpo_jax.models import CausalLM
from lora_dpo_jax.reference_cache import ReferenceCache, missing_examples

logger = logging.getLogger("lora_dpo_jax")


class ReferenceLogProbs:
    """The log-probs of the model `reference`, as the setting reference_log_probs asks."""

    def __init__(
        self,
        reference: CausalLM,
        setting: Literal["auto", "live", "cached"],
        cache: ReferenceCache | None,
        scorer: Callable[[ExampleTable], Scorer],
    ):
        """`cache` is None if the setting is live. `scorer` makes a scorer of a table."""
        self.reference, self.setting, self.cache, self.scorer = reference, setting, cache, scorer

    def of_steps(self, pairs: ExampleTable, steps: StepIds, *, choice: str = "auto") -> np.ndarray | None:
        """The values of all responses of `pairs`, float32 [response]; NaN where no batch needs one.

        None if the steps should compute them.

        `auto` chooses the way with fewer forward passes. This is the steps' way for one epoch of which nothing is
        cached, even if the next epoch fills up its last batch. A resumed run keeps its former `choice`, live or
        cached, because the two differ in their last bits.
        """
        if self.cache is None:
            logger.info("reference log-probs: live, in each step, as reference_log_probs asks")
            return None
        visits, visited = steps.num_visits, steps.visited()
        values = self.cache.find(pairs)
        missing = visited[missing_examples(pairs, values)[visited]]
        if self.setting == "auto" and choice == "live":
            logger.info("reference log-probs: live, in each step, as in the steps before")
            return None
        is_one_epoch = visits - len(visited) < steps.size
        is_live = choice == "auto" and is_one_epoch and len(missing) == len(visited)
        if self.setting == "auto" and is_live:
            logger.info(
                "reference log-probs: live, in each step; the run visits its %s %s once, and none of them is cached",
                f"{len(visited):,}",
                pairs.arrays.noun,
            )
            return None
        self._log(pairs, len(visited), len(missing), f"the run visits each {visits / len(visited):.1f} times")
        self._fill(self.cache, pairs, values, missing)
        return values

    def of_table(self, score: Scorer) -> Scores:
        """The values of all pairs that `score` scores."""
        if self.cache is None:
            return score(self.reference)
        pairs = score.examples
        values = self.cache.find(pairs)
        missing = np.flatnonzero(missing_examples(pairs, values))
        self._log(pairs, len(pairs), len(missing), "to score them")
        self._fill(self.cache, pairs, values, missing)
        return scores_of(pairs, values)

    def _fill(self, cache: ReferenceCache, pairs: ExampleTable, values: np.ndarray, missing: np.ndarray) -> None:
        if len(missing):
            ids = cache.to_compute(pairs, missing)
            responses = pairs.arrays.responses_of(ids)
            values[responses] = cache.compute(self.reference, self.scorer(pairs.subset(ids)), values[responses])
            cache.all_computed(pairs)

    def _log(self, pairs: ExampleTable, wanted: int, missing: int, why: str) -> None:
        noun = pairs.arrays.noun
        found = f"{wanted - missing:,} of {wanted:,} {noun} found in {self.cache and self.cache.folder}"
        computed = f"; computing {missing:,} once ({why})" if missing else ""
        logger.info("reference log-probs: %s%s", found, computed)
