"""What makes a checkpoint that of another run."""

from types import SimpleNamespace
from typing import Any

import pytest
from tiny_pairs import random_pairs
from tiny_runs import run_config

from lora_dpo_jax.data.order import MIXING
from lora_dpo_jax.data.table import whole_table
from lora_dpo_jax.runs import identity as identity_module
from lora_dpo_jax.runs.identity import run_identity
from lora_dpo_jax.runs.steps import pair_order

BY_EPOCHS = {"trainer__num_train_steps": None, "trainer__num_train_epochs": 2}


@pytest.fixture
def identity(monkeypatch, tmp_path):
    """identity(**settings): of a run over nine pairs in batches of 4."""
    monkeypatch.setattr(identity_module, "weights_identity", lambda config, base: {"adapter": None})
    pairs = whole_table({"prefs": random_pairs(9)})
    base: Any = SimpleNamespace(model=())

    def of(**settings) -> dict[str, Any]:
        config = run_config(tmp_path, tmp_path, **settings)
        order = pair_order(pairs, seed=0, shuffle=False, weights=config.data.train_weights)
        return run_identity(config, config.lora, base, pairs, order)

    return of


def test_batches_that_an_earlier_version_made_alike_have_the_identity_that_it_gave_them(identity):
    of_steps = identity()
    assert of_steps["trainer"] == {"seed": 0, "train_batch_size": 4}
    assert of_steps["data"].keys() == {
        *("components", "order_of_components", "shuffle", "train_weights", "training_pairs")
    }
    assert identity(trainer__last_batch="fill", **BY_EPOCHS) == of_steps


def test_short_batches_are_part_of_the_identity_where_there_are_some(identity):
    assert identity(**BY_EPOCHS)["trainer"]["last_batch"] == "short"
    even = {"trainer__train_batch_size": 3}
    assert identity(**BY_EPOCHS, **even) == identity(**even)


def test_how_components_are_mixed_is_part_of_the_identity(identity):
    assert identity(data__train_weights={"prefs": 1.0})["data"]["version_of_mixing"] == MIXING


def test_another_type_of_optimizer_is_another_run_and_adamw_has_the_identity_of_earlier_versions(identity):
    assert "optimizer" not in identity(optimizer={"type": "adamw", "learning_rate": 1e-3})
    assert identity(optimizer="lion")["optimizer"] == {"type": "lion"}
