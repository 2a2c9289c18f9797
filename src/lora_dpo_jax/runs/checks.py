"""Checks of each step's metrics, and of each state to save. A run that cannot be right ends, and names faulty pairs."""

import logging
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lora_dpo_jax.columns import LABEL, MARGIN
from lora_dpo_jax.data.table import ExampleTable
from lora_dpo_jax.losses import Loss
from lora_dpo_jax.sharding import on_host
from lora_dpo_jax.training.loop import NonFiniteLossError, StepInfo
from lora_dpo_jax.training.step import StepMetrics, TrainState

logger = logging.getLogger("lora_dpo_jax")

NAMED_PAIRS = 8


def refuse_unfit_data(loss: Loss, examples: ExampleTable) -> None:
    """Raises ValueError with the component's name unless the examples have all data that the loss needs."""
    of_some = {name for source, _ in examples.components for name in source.arrays.columns}
    for name, (source, indices) in zip(examples.names, examples.components, strict=True):
        arrays = source.arrays
        if MARGIN in arrays.columns and not loss.takes_margins:
            raise ValueError(
                f"loss.type={loss.get_choice_name(type(loss))} has no target margin between two rewards, but "
                f"data.components.{name} sets format.margin_field. Leave it out, or choose a loss of the margin"
            )
        if MARGIN not in arrays.columns and MARGIN in of_some:
            raise ValueError(
                f"data.components.{name} has no format.margin_field, and other components have: set it for all of them"
            )
        missing = [column for column in loss.all_columns if column not in arrays.columns]
        if lacking := [column for column in loss.taken_columns if column in of_some and column not in arrays.columns]:
            raise ValueError(
                f"data.components.{name} has no {' and no '.join(lacking)}, and other components have: labels "
                "(format.type=unpaired) and weights of single answers (format.weight_field) are for all or for none"
            )
        if LABEL in missing:
            raise ValueError(
                f"loss.type={loss.get_choice_name(type(loss))} trains on single answers with labels; "
                f"data.components.{name} has others. Set its format.type to unpaired, or choose a loss of comparisons"
            )
        if missing:
            raise ValueError(
                f"loss.type={loss.get_choice_name(type(loss))} needs the columns {missing}; data.components.{name} has "
                f"{sorted(arrays.columns)}. Name them in its format.columns (a number in each row) or "
                "format.response_columns (a list, with a number for each response)"
            )
        if loss.needs_comparisons and not arrays.comparison_counts[indices].all():
            raise ValueError(
                f"loss.type={loss.get_choice_name(type(loss))} compares responses; data.components.{name} has single "
                "ones (format.type=unpaired or supervised). Set loss.type to kto, apo_zero_unpaired or sft, or give "
                "rows with chosen and rejected"
            )


class NonFiniteStateError(RuntimeError):
    """An update made infinities or NaN, though its loss and gradient were finite."""


def refuse_non_finite(info: StepInfo[TrainState]) -> None:
    """Raises NonFiniteStateError unless the state can be saved and exported. All processes must call this.

    It waits for the devices, so it is not for every step.
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


def first_loss_tolerance() -> float:
    """How far the loss of step 0 may be from the expected one, by rounding."""
    # On a CPU, policy and reference have the same scores, bit for bit: only the mean over the batch is rounded. On an
    # accelerator, their products may take different algorithms. In bfloat16, two sums of a few hundred log-probs then
    # differ by some tenths of a nat; beta is about 0.1.
    return 1e-5 if jax.default_backend() == "cpu" else 0.05


class StepCheck:
    """The `check` of `train`: ends the run at a step that cannot be right. All processes call it for the same steps."""

    def __init__(
        self,
        pairs: ExampleTable,
        *,
        expected_first_loss: float | None,
        tolerance: float,
        non_finite: Literal["stop", "skip"],
        max_skips_in_a_row: int,
    ):
        """`expected_first_loss` is None if the loss of step 0 is not known. The last two are settings of `trainer`."""
        self.pairs, self.expected_first_loss, self.tolerance = pairs, expected_first_loss, tolerance
        self.non_finite, self.max_skips_in_a_row = non_finite, max_skips_in_a_row
        self.skipped_in_a_row = 0

    def __call__(self, step: int, metrics: StepMetrics, values: dict[str, float]) -> None:
        if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
            self._skip_or_stop(step, metrics, values)
            return
        self.skipped_in_a_row = 0
        if step == 0 and self.expected_first_loss is not None:
            self._check_first_loss(values["loss"], self.expected_first_loss)

    def _check_first_loss(self, loss: float, expected: float) -> None:
        # The tolerance is for ln 2. Losses that are larger there are steeper too.
        tolerance = self.tolerance * max(1.0, expected / math.log(2))
        if abs(loss - expected) > tolerance:
            raise RuntimeError(
                f"the loss of step 0 is {loss:.6f}, but policy and reference should be equal before the first update, "
                f"which makes it {expected:.6f} (tolerance {tolerance:.3g}). Either the adapters' product is not "
                "zero, or the two are computed differently: please report this."
            )

    def _skip_or_stop(self, step: int, metrics: StepMetrics, values: dict[str, float]) -> None:
        what = (
            f"step {step}: the loss is {values['loss']} and the gradient norm {values['grad_norm']}; the update was "
            f"not made. {self._culprits(metrics)}."
        )
        if self.non_finite == "stop":
            raise NonFiniteLossError(
                f"{what} The run stops. Look at these rows, lower optimizer.learning_rate, or set "
                "trainer.non_finite=skip to continue without such updates."
            )
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.max_skips_in_a_row:
            raise NonFiniteLossError(
                f"{what} This is non-finite step number {self.skipped_in_a_row} in a row, more than "
                f"trainer.max_skips_in_a_row={self.max_skips_in_a_row}, and the run stops. Look at these rows, or "
                "lower optimizer.learning_rate."
            )
        skipped = round(values["skipped_steps"])
        logger.warning("%s The run continues (trainer.non_finite=skip); %d updates were skipped so far.", what, skipped)

    def _culprits(self, metrics: StepMetrics) -> str:
        """The pairs whose loss is not finite; all pairs of the batch if only the gradient is not."""
        ids = np.concatenate([np.ravel(on_host(part.array)) for part in metrics.example_ids])
        losses = np.concatenate([np.ravel(on_host(part.array)) for part in metrics.example_losses])
        is_pair = ids >= 0
        bad = ids[is_pair & ~np.isfinite(losses)]
        which, ids = ("Pairs with such a loss", bad) if len(bad) else ("Pairs of the batch", ids[is_pair])
        names = ", ".join(self.pairs.origin(int(i)) for i in ids[:NAMED_PAIRS])
        more = f" and {len(ids) - NAMED_PAIRS} more" if len(ids) > NAMED_PAIRS else ""
        # NaN spreads through attention to the whole row, even where its weight is zero.
        return f"{which} (one of them spoils those that share its row): {names}{more}"
