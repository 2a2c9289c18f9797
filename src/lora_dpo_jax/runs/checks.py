"""Looks at every step's metrics, and at each state to save: a run that cannot be right ends, and says where.

Of a step the pairs are named that it went wrong at.
"""

import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_dpo_jax.data.batches import PairTable
from lora_dpo_jax.runs.setup import TrainConfig
from lora_dpo_jax.sharding import on_host
from lora_dpo_jax.training.loop import NonFiniteLossError, StepInfo
from lora_dpo_jax.training.step import StepMetrics, TrainState

logger = logging.getLogger("lora_dpo_jax")

NAMED_PAIRS = 8


class NonFiniteStateError(RuntimeError):
    """An update made numbers that are not finite, out of a loss and a gradient that were."""


def refuse_non_finite(info: StepInfo[TrainState]) -> None:
    """Raises NonFiniteStateError unless the state can be saved and exported. All processes must call this.

    The devices reduce it to two values, which are waited for: not to be called in every step.
    """
    trained = info.state.trained
    parts = {"adapters": trained["adapters"], "optimizer's moments": trained["optimizer"]}
    spoiled = [name for name, is_finite in _are_finite(parts).items() if not on_host(is_finite)]
    if spoiled:
        raise NonFiniteStateError(
            f"after step {info.step}: the update has made the {' and the '.join(spoiled)} infinite or NaN. They are "
            "neither saved nor exported; earlier checkpoints and exports are as they were. Lower "
            "optimizer.learning_rate, and start again: a run with a trainer.id resumes from its newest checkpoint."
        )


@jax.jit
def _are_finite(parts: dict[str, Any]) -> dict[str, jax.Array]:
    return {
        name: jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(part)]).all() for name, part in parts.items()
    }


class Guard:
    """For the `check` of `train`. With several processes, all call it for the same steps."""

    def __init__(self, config: TrainConfig, pairs: PairTable, starts_equal: bool):
        """`starts_equal`: before the first update the policy is the reference, so that the loss is known."""
        # Dropout moves the policy away from an adapter that is not zero.
        is_fresh = config.initialize_from_peft is None
        self.expects_ln2 = starts_equal and not config.loss.reference_free and (is_fresh or config.lora.dropout == 0.0)
        # An accelerator's products of float32 numbers are by default of fewer bits too.
        low_precision = config.trainer.precision.compute_dtype != jnp.float32 or jax.default_backend() != "cpu"
        # In bfloat16 two sums of a few hundred log-probs differ by some tenths of a nat; beta is about 0.1.
        self.tolerance = 0.05 if low_precision else 1e-4
        self.pairs, self.trainer = pairs, config.trainer
        self.skipped_in_a_row = 0

    def __call__(self, step: int, metrics: StepMetrics, values: dict[str, float]) -> None:
        if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
            self._skip_or_stop(step, metrics, values)
            return
        self.skipped_in_a_row = 0
        if step == 0 and self.expects_ln2 and abs(values["loss"] - math.log(2)) > self.tolerance:
            raise RuntimeError(
                f"the loss of step 0 is {values['loss']:.6f}, but policy and reference should be equal before the "
                f"first update, which makes it ln 2 = {math.log(2):.6f} (tolerance {self.tolerance}). Either the "
                "adapters' product is not zero, or the two are computed differently: please report this."
            )

    def _skip_or_stop(self, step: int, metrics: StepMetrics, values: dict[str, float]) -> None:
        told = (
            f"step {step}: the loss is {values['loss']} and the gradient norm {values['grad_norm']}; the update was "
            f"not made. {self._culprits(metrics)}."
        )
        if self.trainer.non_finite == "stop":
            raise NonFiniteLossError(
                f"{told} The run stops. Look at these rows, lower optimizer.learning_rate, or set "
                "trainer.non_finite=skip to go on without such updates."
            )
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > (most := self.trainer.max_skips_in_a_row):
            raise NonFiniteLossError(
                f"{told} Of such steps it is number {self.skipped_in_a_row} in a row, more than "
                f"trainer.max_skips_in_a_row={most}, and the run stops. Look at these rows, or lower "
                "optimizer.learning_rate."
            )
        skipped = round(values["skipped_steps"])
        logger.warning("%s The run goes on (trainer.non_finite=skip); %d updates were skipped so far.", told, skipped)

    def _culprits(self, metrics: StepMetrics) -> str:
        """The pairs whose loss is not finite, as far as that tells them from the others."""
        ids = np.concatenate([np.ravel(on_host(part.array)) for part in metrics.pair_ids])
        losses = np.concatenate([np.ravel(on_host(part.array)) for part in metrics.pair_losses])
        is_pair = ids >= 0
        bad = ids[is_pair & ~np.isfinite(losses)]
        which, ids = ("Pairs with such a loss", bad) if len(bad) else ("Pairs of the batch", ids[is_pair])
        names = ", ".join(self.pairs.origin(int(i)) for i in ids[:NAMED_PAIRS])
        more = f" and {len(ids) - NAMED_PAIRS} more" if len(ids) > NAMED_PAIRS else ""
        # What is not a number comes through attention to all of a row, even where its weight is zero.
        return f"{which} (one of them spoils those that share its row): {names}{more}"
