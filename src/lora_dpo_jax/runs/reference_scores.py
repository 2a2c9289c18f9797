"""Where a run takes the reference's log-probs from: the cache, filled where it must be, or each step itself."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np

from lora_dpo_jax.data.batches import PairTable
from lora_dpo_jax.evaluation import PairScorer
from lora_dpo_jax.lora import trainable_filter
from lora_dpo_jax.losses import PairLogProbs
from lora_dpo_jax.models import CausalLM
from lora_dpo_jax.reference_cache import ReferenceCache
from lora_dpo_jax.runs.identity import cache_folder, dtypes_of, weights_identity
from lora_dpo_jax.runs.setup import Base, TrainConfig, scorer
from lora_dpo_jax.sharding import Placement

logger = logging.getLogger("lora_dpo_jax")

# Settings of `model` that change how log-probs are computed, not what they are; the dtype is asked of the arrays.
CHANGE_NO_NUMBERS = ("gradient_checkpointing", "attention", "dtype")


class ReferenceLogProbs:
    """What `reference_log_probs` asks for. `model` is the reference."""

    def __init__(self, config: TrainConfig, base: Base, model: CausalLM, placement: Placement):
        self.config, self.model, self.placement = config, model, placement
        self.cache: ReferenceCache | None = None
        if config.reference_log_probs != "live":
            # Read now: a run may export over the adapter that it began with.
            identity = _identity(config, base, model) if jax.process_index() == 0 else {}
            self.cache = ReferenceCache(cache_folder(config) / "reference", identity)

    def of_steps(self, pairs: PairTable, batches: Sequence[np.ndarray], *, choice: str = "auto") -> np.ndarray | None:
        """Those of the pairs in `batches`, float32 [pair of `pairs`, chosen / rejected]; None: the steps compute them.

        `auto` takes the way of fewer forward passes: that of the steps for one epoch, be its last batch filled up from
        the next one or not, of which nothing is cached. A resumed run keeps its former `choice`, live or cached:
        the two differ in their last bits.
        """
        if self.cache is None:
            logger.info("reference log-probs: live, in each step, as reference_log_probs asks")
            return None
        visits = np.concatenate(batches)
        visited = np.unique(visits)
        values = self.cache.find(pairs)
        missing = visited[np.isnan(values[visited]).any(axis=1)]
        if self.config.reference_log_probs == "auto" and choice == "live":
            logger.info("reference log-probs: live, in each step, as in the steps before")
            return None
        is_one_epoch = len(visits) - len(visited) < max(map(len, batches))
        is_live = choice == "auto" and is_one_epoch and len(missing) == len(visited)
        if self.config.reference_log_probs == "auto" and is_live:
            logger.info(
                "reference log-probs: live, in each step; the run visits its %s pairs once, and none of them is cached",
                f"{len(visited):,}",
            )
            return None
        self._tell(len(visited), len(missing), f"the run visits each {len(visits) / len(visited):.1f} times")
        self._fill(self.cache, pairs, values, missing)
        return values

    def of_table(self, score: PairScorer) -> PairLogProbs:
        """Those of all pairs that `score` scores."""
        if self.cache is None:
            return score(self.model)
        pairs = score.pairs
        values = self.cache.find(pairs)
        missing = np.flatnonzero(np.isnan(values).any(axis=1))
        self._tell(len(pairs), len(missing), "to score them")
        self._fill(self.cache, pairs, values, missing)
        Pair = hax.Axis("pair", len(pairs))
        columns = [*values.T, *pairs.lengths[:, 1:].T.astype(np.float32)]
        return PairLogProbs(*(hax.named(column, Pair) for column in columns))

    def _fill(self, cache: ReferenceCache, pairs: PairTable, values: np.ndarray, missing: np.ndarray) -> None:
        if len(missing):
            planned = cache.plan(pairs, missing)
            score = scorer(self.config, pairs.subset(planned), self.placement)
            values[planned] = cache.compute(self.model, score, values[planned])
            cache.end_plan(pairs)

    def _tell(self, wanted: int, missing: int, why: str) -> None:
        found = f"{wanted - missing:,} of {wanted:,} pairs found in {self.cache and self.cache.folder}"
        computed = f"; computing {missing:,} once ({why})" if missing else ""
        logger.info("reference log-probs: %s%s", found, computed)


def _identity(config: TrainConfig, base: Base, model: CausalLM) -> dict[str, Any]:
    """All that shapes the reference's log-probs but the pairs. Nothing of the loss, the optimizer or the layout."""
    settings = dataclasses.asdict(config.model)
    adapters, weights = eqx.partition(model, trainable_filter(model))
    return {
        **weights_identity(config, base),
        "model": {name: value for name, value in settings.items() if name not in CHANGE_NO_NUMBERS},
        "dtypes": [dtypes_of(tree) for tree in (weights, adapters)],
        "compute_dtype": str(jnp.dtype(config.trainer.precision.compute_dtype)),
        "platform": jax.default_backend(),
        "matmul_precision": jax.config.jax_default_matmul_precision,  # pyright: ignore[reportAttributeAccessIssue]
    }
