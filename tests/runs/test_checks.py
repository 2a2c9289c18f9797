"""A run that cannot be right ends, and says where."""

import logging
import math
from types import SimpleNamespace
from typing import Any

import haliax as hax
import numpy as np
import pytest
from tiny_pairs import random_pairs

from lora_dpo_jax.data.memory import MemoryExamples
from lora_dpo_jax.data.table import whole_table
from lora_dpo_jax.losses import Dpo, LengthNormalizedDpo, Scores
from lora_dpo_jax.runs.checks import NonFiniteStateError, StepCheck, refuse_non_finite
from lora_dpo_jax.training.loop import NonFiniteLossError, StepInfo
from lora_dpo_jax.training.step import StepMetrics


def check_of(**settings: Any) -> StepCheck:
    defaults = {"expected_first_loss": None, "tolerance": 1e-4, "non_finite": "stop", "max_skips_in_a_row": 1}
    return StepCheck(whole_table({"prefs": random_pairs(4)}), **defaults | settings)


def metrics(loss: float, *, example_losses=(1.0, 1.0, 1.0), skipped: int = 0) -> tuple[StepMetrics, dict[str, float]]:
    """Of a step on pairs 2, 0 and 3, in a row with an empty slot."""
    axes = (hax.Axis("micro", 1), hax.Axis("row", 1), hax.Axis("example", 4))
    ids, losses = np.array([[[2, 0, 3, -1]]]), np.array([[[*example_losses, math.nan]]])
    step_metrics: Any = SimpleNamespace(example_ids=(hax.named(ids, axes),), example_losses=(hax.named(losses, axes),))
    return step_metrics, {"loss": loss, "grad_norm": 1.0, "skipped_steps": skipped}


def test_the_first_loss_is_the_expected_one_or_the_run_ends():
    expected = check_of(expected_first_loss=0.5)
    expected(0, *metrics(0.50005))
    expected(1, *metrics(0.6))
    with pytest.raises(RuntimeError, match=r"step 0 is 0\.600000, .* which makes it 0\.500000 \(tolerance 0\.0001\)"):
        expected(0, *metrics(0.6))
    check_of(expected_first_loss=None)(0, *metrics(0.6))


@pytest.mark.parametrize("loss", [Dpo(), Dpo(label_smoothing=0.2), LengthNormalizedDpo(beta=2.0)], ids=repr)
def test_the_loss_where_policy_and_reference_are_equal_is_that_of_equal_log_probs(loss):
    examples = MemoryExamples([([1], [2], [3])] * 2).arrays.examples
    log_probs = hax.named(np.array([-3.0, -40.0, -70.0, -5.0], np.float32), "response")
    equal = Scores(log_probs, hax.named(np.array([3, 8, 9, 2]), "response"))
    known = loss.loss_where_equal(examples)
    np.testing.assert_allclose(loss(equal, equal, examples).loss.array, known, rtol=1e-6)


def test_it_is_not_known_of_a_loss_without_reference_or_of_ones_own():
    class Mine(Dpo):
        def pair_loss(self, chosen, rejected, policy):
            return hax.nn.relu(1 - self.beta * (chosen - rejected))

    examples = MemoryExamples([([1], [2], [3])]).arrays.examples
    assert Dpo(reference_free=True).loss_where_equal(examples) is None
    assert Mine().loss_where_equal(examples) is None


def test_the_pairs_whose_loss_is_not_finite_are_named():
    of_one = r"^step 3: the loss is nan .* Pairs with such a loss \(.*\): memory, row 0\. The run stops"
    with pytest.raises(NonFiniteLossError, match=of_one):
        check_of()(3, *metrics(math.nan, example_losses=(1.0, math.nan, 1.0)))
    of_all = r"Pairs of the batch \(.*\): memory, row 2, memory, row 0, memory, row 3\. The run stops"
    with pytest.raises(NonFiniteLossError, match=of_all):
        check_of()(3, *metrics(math.inf))


def test_a_step_that_is_finite_ends_a_row_of_skipped_ones(caplog):
    check = check_of(non_finite="skip", max_skips_in_a_row=1)
    caplog.set_level(logging.WARNING)
    for step, loss in enumerate([math.nan, 1.0, math.nan]):
        check(step, *metrics(loss, skipped=step))
    assert ["2 updates were skipped so far" in record.getMessage() for record in caplog.records] == [False, True]
    with pytest.raises(NonFiniteLossError, match="number 2 in a row, more than trainer.max_skips_in_a_row=1"):
        check(3, *metrics(math.nan))


@pytest.mark.parametrize(("part", "name"), [("adapters", "adapters"), ("optimizer", "optimizer's moments")])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_with_any_number_that_is_not_finite_is_named(part, name, value):
    trained = {
        "step": 1,
        "adapters": {"a": np.ones(3, np.float32)},
        "optimizer": {"mu": np.ones(3), "count": np.int32(1)},
    }
    info = StepInfo(7, SimpleNamespace(trained=trained))
    refuse_non_finite(info)  # pyright: ignore[reportArgumentType]
    next(iter(trained[part].values()))[1] = value
    with pytest.raises(NonFiniteStateError, match=f"^after step 7: the update has made the {name} infinite or NaN"):
        refuse_non_finite(info)  # pyright: ignore[reportArgumentType]
