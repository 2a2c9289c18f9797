"""Training over a quantized base: nothing moves but adapters, nothing dequantized is kept, meshes change nothing."""

import dataclasses

import equinox as eqx
import jax
import numpy as np
import pytest
from tiny_pairs import (
    ADAPTERS,
    LLAMA,
    packed,
    random_pairs,
    table_of,
    tiny_decoder,
)
from tiny_steps import DESCENT, two_steps

from lora_dpo_jax.data.packing import pack
from lora_dpo_jax.data.shapes import choose_shapes
from lora_dpo_jax.lora import LoraConfig, loraize
from lora_dpo_jax.losses import Dpo
from lora_dpo_jax.models import CausalLM, ComputeConfig
from lora_dpo_jax.models.quantization import quantize
from lora_dpo_jax.preference_objective import PreferenceObjective
from lora_dpo_jax.sharding import MeshConfig, Placement
from lora_dpo_jax.training.step import TrainState, TrainStep

PAIRS = table_of(random_pairs(8))


def trained(kind: str, placement: Placement | None = None) -> tuple[list[float], dict[str, np.ndarray]]:
    """(losses, adapters) of two steps over the same pairs, a pair a row."""
    layout = choose_shapes([np.arange(8)], PAIRS.sizes, row_multiple=8).parts[0]
    batch = pack(PAIRS, [np.array([i]) for i in range(8)], layout)
    model = loraize(eqx.filter_jit(quantize)(tiny_decoder(), kind), ADAPTERS["everywhere"], key=jax.random.key(2))
    return two_steps(model, batch, placement)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_meshes_change_nothing_and_weights_never_move(kind):
    losses, adapters = trained(kind)
    assert losses[1] < losses[0] - 1e-3
    sharded_losses, sharded = trained(kind, Placement(MeshConfig({"data": 4, "model": 2})))
    np.testing.assert_allclose(sharded_losses, losses, rtol=1e-5)
    for path, value in adapters.items():
        # Gradients add up over devices in another order.
        np.testing.assert_allclose(sharded[path], value, rtol=1e-3, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("gradient_checkpointing", ["none", "products", "full", "nested"])
def test_no_dequantized_layer_is_kept_for_the_backward_pass(gradient_checkpointing):
    """Memory of the compiled step grows by less than the activations and the codes of a layer with each layer."""
    pairs = table_of(random_pairs(1))
    batch = packed(pairs, dataclasses.replace(choose_shapes([np.arange(1)], pairs.sizes).parts[0], row_length=64))
    tokens = batch.tokens.size

    def temporary_bytes(num_layers: int) -> tuple[int, int]:
        """(of the compiled step, of one dequantized layer)."""
        config = dataclasses.replace(
            LLAMA,
            hidden_size=256,
            intermediate_size=1024,
            head_dim=64,
            num_layers=num_layers,
        )

        def init(key):
            compute = ComputeConfig(gradient_checkpointing, attention="dense")  # compiled soonest
            model = quantize(CausalLM.init(config, compute, key=key), "nf4")
            return TrainState.init(loraize(model, LoraConfig(r=1), key=key), DESCENT, key=key)

        state = eqx.filter_eval_shape(init, jax.random.key(0))
        memory = TrainStep(PreferenceObjective(Dpo()), DESCENT).lower(state, batch).compile().memory_analysis()
        dense = eqx.filter_eval_shape(CausalLM.init, config, key=jax.random.key(0)).model.layers
        return memory.temp_size_in_bytes, sum(4 * leaf.size for leaf in jax.tree.leaves(dense)) // num_layers

    few, layer = temporary_bytes(4)
    many, _ = temporary_bytes(16)
    assert tokens <= 64
    growth = (many - few) / 12
    # All activations that a layer could keep are some 12,000 floats a token; its codes are an eighth of its float32.
    assert growth < {"none": 0.9, "products": 0.5, "full": 0.1, "nested": 0.3}[gradient_checkpointing] * layer
    assert few < 4 * layer + 12_000 * 4 * tokens * 4
