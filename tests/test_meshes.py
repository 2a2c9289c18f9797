"""Runs on any mesh end as on one device."""

import dataclasses
import functools

import equinox as eqx
import jax
import optax
import pytest

from bench import initialization
from bench.initialization import DEFAULT
from bench.meshes import COMPUTE, DECODER, EVERYWHERE, MESHES, ONE_DEVICE, Outcome, adapters_of, train, wire
from lora_dpo_jax.cost.traffic import collective_bytes
from lora_dpo_jax.lora import LoraConfig
from lora_dpo_jax.models import ComputeConfig

# With all that a mesh could change: weights quantized in blocks, a head with adapters, dropout, rows laid out for it.
SETTINGS = {"quantization": "nf4", "lora": dataclasses.replace(EVERYWHERE, dropout=0.1)}

STEPS = 10
SIMPLE = ComputeConfig(attention="dense", gradient_checkpointing="none")  # compiled soonest


@functools.cache
def on_one_device() -> Outcome:
    return train(ONE_DEVICE, steps=STEPS, devices=jax.devices()[:1], compute=SIMPLE, **SETTINGS)


@pytest.mark.parametrize("name", MESHES)
def test_a_run_on_a_mesh_ends_as_on_one_device(name):
    """`python -m bench.meshes` shows the same without quantization and without dropout."""
    # Blocked attention, which has a loop over rows and heads, and recomputation are compiled for one of them.
    compute = COMPUTE if name == "data 2, model 4" else SIMPLE
    loss, adapter = train(MESHES[name], steps=STEPS, compute=compute, **SETTINGS).apart(on_one_device())
    assert on_one_device().losses[-1] < on_one_device().losses[0] - 0.01
    assert loss < 1e-5
    assert adapter < 1e-4


def test_the_order_of_a_sum_moves_the_last_digits_alone():
    """In float32; `python -m bench.initialization` shows what else it decides in bfloat16."""
    names = ["data 8", "data 8, rows permuted"]
    first, other = (initialization.Arrangement(name, "float32", 3).run("random", DEFAULT) for name in names)
    found = initialization.compare(other, first)
    assert 0 < found["first gradient"] < 1e-6
    assert found["of other sign"] == 0
    assert found["first update"] < 1e-4 and found["adapters in the end"] < 1e-4 and found["losses"] < 1e-6
    assert first.losses[2] < first.losses[0]


def test_devices_exchange_weights_and_gradients_but_no_activations():
    """Of rows, which devices share among them, none needs to know what the others compute."""
    learner, batches = wire(MESHES["data 8"], optax.sgd(0.1), steps=1, lora=LoraConfig(r=4))
    (batch,) = batches
    state = learner.state
    found = collective_bytes(learner.compile(batch).as_text())
    adapters = adapters_of(state)
    num_bytes = {
        "adapters": sum(leaf.nbytes for leaf in jax.tree.leaves(adapters)),
        "everything": sum(leaf.nbytes for leaf in jax.tree.leaves(eqx.filter(state.model, eqx.is_array))),
    }
    hidden = sum(part.tokens.array[0].size for part in batch) * DECODER.hidden_size * 4
    # A sum is handed to all after it was made. The rest are sums of metrics.
    assert found.pop("all-reduce") < 2 * num_bytes["adapters"] + 0.1 * hidden
    # There and back; what the backward pass computes again it gathers but once more.
    assert found.pop("all-gather") < 2.1 * num_bytes["everything"]
    # The embeddings of each device's own tokens, of which others hold some features.
    assert sum(found.values()) < 1.1 * hidden / 8
