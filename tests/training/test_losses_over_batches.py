"""Every loss is the same however the pairs of a batch are laid into rows, micro-batches, parts and devices."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_pairs import adapters_of, moved, new_adapters, packed, random_answers, random_pairs, table_of

from lora_dpo_jax.data.shapes import PartShape
from lora_dpo_jax.data.table import ExampleTable
from lora_dpo_jax.evaluation import Scorer, evaluate_by_sums, evaluate_by_tokens
from lora_dpo_jax.log_probs import score_responses
from lora_dpo_jax.lora import reference_model
from lora_dpo_jax.losses import LOSSES, ComparisonLoss, Loss
from lora_dpo_jax.preference_objective import PreferenceObjective
from lora_dpo_jax.sharding import MeshConfig, Placement
from lora_dpo_jax.training.step import TrainState, TrainStep

PAIRS = table_of(random_pairs(8, seed=11))
ANSWERS = random_answers(8, seed=8)
ONE = PartShape.of_pairs(micro_batches=1, rows=8, row_length=64, targets=128, pairs=8)
# All losses at once: each has a metric of its own in a mix.
OF_SUMS = [name for name, loss in LOSSES.items() if issubclass(loss, ComparisonLoss)]
OF_TOKENS = [("sigmoid", {"use_weighting": True}), ("ipo", {"ld_alpha": 0.3}), ("aot", {"ld_alpha": 0.5})]
ALL: Loss = LOSSES["mix"](
    losses=[*(LOSSES[name]() for name in OF_SUMS), *(LOSSES[name](**settings) for name, settings in OF_TOKENS)],
    weights=[0.01 if name == "sppo_hard" else 1.0 for name in [*OF_SUMS, *(name for name, _ in OF_TOKENS)]],
)
OF_ANSWERS: Loss = LOSSES["mix"](
    losses=[LOSSES["kto"](beta=1.0, desirable_weight=1.5), LOSSES["apo_zero_unpaired"](beta=1.0), LOSSES["sft"]()]
)
AOT: Loss = LOSSES["mix"](losses=[LOSSES["aot"](beta=1.0), LOSSES["aot_unpaired"](beta=1.0), LOSSES["sft"]()])


def step_of(
    loss: Loss, batch: Any, placement: Placement | None = None
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The metrics of one step of gradient descent, and how the adapters moved."""
    scope = {} if placement is None else {"scope": placement.scope}
    step = TrainStep(PreferenceObjective(loss), optax.sgd(0.1), **scope)
    state = TrainState.init(moved(new_adapters()), step.optimizer, key=jax.random.key(0))
    before = adapters_of(state.model)
    if placement is not None:
        state = placement.put_parameters(state)
    state, metrics = step(state, batch)
    after = adapters_of(state.model)
    values = {
        name: float(value) for name, value in metrics.values.items() if name == "kl" or "loss" in name or "/" in name
    }
    return values, {name: after[name] - before[name] for name in before}


def one_pair_a_row() -> list[list[int]]:
    return [[number] for number in range(8)]


def in_parts(table: ExampleTable) -> tuple:
    long = dataclasses.replace(ONE, rows=1, row_length=128)
    short = dataclasses.replace(ONE, micro_batches=4, rows=1)
    return packed(table, long, [[0, 3]]), packed(table, short, [[7, 1], [2], [5, 4], [6]])


LAYOUTS = {
    "padded": lambda table: packed(table, ONE, one_pair_a_row(), share_prefix=False),
    "four micro-batches": lambda table: packed(
        table, dataclasses.replace(ONE, micro_batches=4, rows=2), one_pair_a_row()
    ),
    "parts": in_parts,
}
CASES = {"all": (ALL, PAIRS), "aot": (AOT, PAIRS), "single answers": (OF_ANSWERS, ANSWERS)}


@functools.cache
def expected(name: str) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    loss, table = CASES[name]
    return step_of(loss, packed(table, ONE))


def assert_same(found: tuple, wanted: tuple) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-5, abs=1e-5)
    size = np.sqrt(sum(np.linalg.norm(move) ** 2 for move in wanted[1].values()))
    apart = np.sqrt(sum(np.linalg.norm(found[1][name] - move) ** 2 for name, move in wanted[1].items()))
    assert 0 < size < np.inf and apart < 1e-5 * size


@pytest.mark.parametrize("layout", ["padded", "parts"])
@pytest.mark.parametrize("case", ["all", "single answers"])
def test_layouts_change_no_loss(case, layout):
    loss, table = CASES[case]
    assert_same(step_of(loss, LAYOUTS[layout](table)), expected(case))


@pytest.mark.parametrize("case", ["all", "single answers"])
def test_eight_devices_change_no_loss(case):
    loss, table = CASES[case]
    placement = Placement(MeshConfig({"data": 8}))
    batch = placement.put_batch(packed(table, ONE, one_pair_a_row()))
    assert_same(step_of(loss, batch, placement), expected(case))


def test_the_kl_of_the_batch_is_no_number_that_a_part_could_know():
    assert expected("single answers")[0]["kl"] > 0.1


def test_a_loss_over_the_batch_scores_the_reference_once():
    """The second pass takes its scores from the first one; here, from sums alone."""
    assert not AOT.needs_tokens
    assert_same(step_of(AOT, LAYOUTS["four micro-batches"](PAIRS)), expected("aot"))


@pytest.mark.parametrize("case", ["aot", "single answers"])
def test_a_table_is_one_batch_where_it_is_evaluated(case):
    """However many rows are scored together, by sums or by tokens."""
    loss, table = CASES[case]
    model = moved(new_adapters())
    scorer = Scorer(table, rows=8)
    policy, reference = scorer(model), scorer(reference_model(model, None))
    by_sums = evaluate_by_sums(loss, policy, reference, table)
    objective = PreferenceObjective(loss)
    by_tokens = evaluate_by_tokens(objective, loss.all_columns, Scorer(table, rows=1), model, None)
    assert by_tokens.means == pytest.approx(by_sums.means, rel=1e-5, abs=1e-5)
    assert sorted(by_sums.means) == sorted(objective.metric_names(table.arrays.examples))
    for name in ("policy", "reference"):
        ours, theirs = (np.asarray(getattr(x, name).log_probs.array) for x in (by_tokens, by_sums))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert (by_sums.margins is None) is (case == "single answers")
    if by_sums.margins is not None and by_tokens.margins is not None:
        assert by_sums.margins.mean() == pytest.approx(by_sums.means["rewards/margins"], abs=1e-6)
        np.testing.assert_allclose(by_tokens.margins, by_sums.margins, atol=1e-5)


def test_a_loss_without_a_reference_computes_none():
    free = LOSSES["mix"](losses=[LOSSES[name]() for name in ("simpo", "alphapo", "cpo", "orpo", "sft")])
    batch = packed(PAIRS, ONE)
    objective = PreferenceObjective(free)
    assert not objective.computes_reference(batch)
    micro = batch.micro_batch(0)
    policy, theirs = jax.eval_shape(lambda: objective.scores(new_adapters(), None, micro))
    assert (
        theirs is None
        and policy.log_probs.shape == jax.eval_shape(lambda: score_responses(new_adapters(), micro)).log_probs.shape
    )
    assert jnp.isfinite(step_of(free, batch)[0]["loss"])
