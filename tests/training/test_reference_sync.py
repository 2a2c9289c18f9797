"""A reference that moves is, after each sync, the mixture that was asked for, and it alone holds the policy."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_pairs import moved, new_adapters, random_pairs, table_of
from tiny_runs import run_config

from lora_dpo_jax.data.packing import pack
from lora_dpo_jax.data.shapes import PartShape
from lora_dpo_jax.lora import frozen_copy
from lora_dpo_jax.losses import Dpo
from lora_dpo_jax.preference_objective import PreferenceObjective
from lora_dpo_jax.training.reference_sync import ReferenceSync
from lora_dpo_jax.training.step import TrainState, TrainStep

pytestmark = pytest.mark.usefixtures("two_devices")

DESCENT = optax.sgd(0.3)
OBJECTIVE = PreferenceObjective(Dpo(beta=0.5))


def numbers(tree: Any) -> list[np.ndarray]:
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def copied(state: TrainState) -> TrainState:
    """A state of its own arrays, because a step takes those that it is given."""
    own = jax.tree.map(jnp.copy, state.trained)
    return state.with_trained(own)


@pytest.fixture(scope="module")
def batch():
    pairs = table_of(random_pairs(4, seed=3))
    layout = PartShape.of_pairs(micro_batches=1, rows=4, row_length=64, targets=64, pairs=1)
    return jax.tree.map(jnp.asarray, pack(pairs, [np.array([i]) for i in range(4)], layout))


@pytest.fixture(scope="module")
def states(batch) -> list[TrainState]:
    """Before the first step, and after each of five, of which each second one moves the reference."""
    model = moved(new_adapters(attention="dense"))
    state = TrainState.init(model, DESCENT, key=jax.random.key(0), reference=frozen_copy(model), reference_moves=True)
    step = TrainStep(OBJECTIVE, DESCENT, reference_sync=ReferenceSync(mixup_alpha=0.25, sync_steps=2))
    states = [copied(state)]
    for _ in range(5):
        state, _ = step(state, batch)
        states.append(copied(state))
    assert step.num_compilations == 1
    return states


def test_every_so_many_steps_the_factors_are_mixed(states):
    wanted = numbers(states[0].reference)
    for number, state in enumerate(states):
        if number in (2, 4):
            policy = numbers(state.trained["adapters"])
            wanted = [0.25 * mine + 0.75 * its for mine, its in zip(policy, wanted, strict=True)]
            assert max(np.abs(mine - its).max() for mine, its in zip(policy, wanted, strict=True)) > 1e-4
        for found, expected in zip(numbers(state.reference), wanted, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


def test_a_step_is_that_of_a_run_that_is_held_to_the_reference_of_the_moment(states, batch):
    fixed = TrainStep(OBJECTIVE, DESCENT)
    for before, after in ((states[2], states[3]), (states[4], states[5])):
        state = copied(dataclasses.replace(before, reference_moves=False))
        state, _ = fixed(state, batch)
        for found, expected in zip(numbers(after.trained["adapters"]), numbers(state.trained["adapters"]), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_a_checkpoint_holds_the_reference(states):
    resumed = states[0].with_trained(states[3].trained)
    for found, expected in zip(numbers(resumed.reference), numbers(states[3].reference), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert "reference" not in dataclasses.replace(states[3], reference_moves=False).trained


@pytest.mark.parametrize(
    "settings", [{"mixup_alpha": 0.0}, {"mixup_alpha": 1.5}, {"mixup_alpha": 0.5}, {"sync_steps": 0}]
)
def test_values_of_no_sense_are_named(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"reference_sync.{name}={value}"):
        ReferenceSync(**settings)


def test_a_state_whose_reference_rests_is_no_state_for_a_step_that_moves_it(states, batch):
    step = TrainStep(OBJECTIVE, DESCENT, reference_sync=ReferenceSync(sync_steps=2))
    with pytest.raises(ValueError, match="reference_moves=False"):
        step(dataclasses.replace(states[0], reference_moves=False), batch)


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"loss": {"type": "simpo"}}, "reference_sync .* loss.type=simpo has none"),
        ({"reference_log_probs": "cached"}, "reference_log_probs=cached .* reference_sync"),
        ({"initialize_from_peft": "adapter", "peft_reference": "base"}, "peft_reference=base"),
    ],
)
def test_what_has_no_reference_that_could_move_is_refused(settings, named, tmp_path):
    with pytest.raises(Exception, match=named):
        run_config(tmp_path, tmp_path / "rows.jsonl", reference_sync={"sync_steps": 4}, **settings)
