"""Two training steps of a tiny model, on one device or on a mesh."""

from typing import Any

import jax
import numpy as np
import optax
from tiny_pairs import adapters_of, moved, weights_of

from lora_dpo_jax.data.packing import PreferenceBatch
from lora_dpo_jax.losses import Dpo
from lora_dpo_jax.models import CausalLM
from lora_dpo_jax.preference_objective import PreferenceObjective
from lora_dpo_jax.sharding import Placement
from lora_dpo_jax.training.step import TrainState, TrainStep

# The steps of plain gradient descent are the gradients themselves.
DESCENT = optax.sgd(0.1)


def two_steps(
    model: CausalLM, batch: PreferenceBatch, placement: Placement | None = None, *, reference: Any = None
) -> tuple[list[float], dict[str, np.ndarray]]:
    """(losses, adapters) of two steps over the same batch. Fails if a frozen weight moves."""
    state = TrainState.init(moved(model), DESCENT, key=jax.random.key(0), reference=reference)
    step = TrainStep(PreferenceObjective(Dpo()), DESCENT)
    if placement is not None:
        state, batch = placement.put_parameters(state), placement.put_batch(batch)
        step = TrainStep(PreferenceObjective(Dpo()), DESCENT, scope=placement.scope)
    weights = {path: np.array(leaf) for path, leaf in weights_of(state.model).items()}
    losses = []
    for _ in range(2):
        state, metrics = step(state, batch)
        losses.append(float(metrics.values["loss"]))
    for path, leaf in weights_of(state.model).items():
        np.testing.assert_array_equal(leaf, weights[path], err_msg=path)
    return losses, adapters_of(state.model)
