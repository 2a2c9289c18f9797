"""A learner of arrays takes steps; one of shapes alone takes the memory that it would."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_pairs import LLAMA, random_pairs, tiny_decoder

from lora_dpo_jax.cost.memory import ProgramMemory
from lora_dpo_jax.data import PackingConfig, whole_table
from lora_dpo_jax.lora import LoraConfig, loraize
from lora_dpo_jax.losses import Dpo
from lora_dpo_jax.models import ComputeConfig
from lora_dpo_jax.preference_objective import PreferenceObjective
from lora_dpo_jax.runs.capacity import bytes_of_a_device
from lora_dpo_jax.runs.config import ModelConfig
from lora_dpo_jax.runs.learner import abstract_learner, real_learner
from lora_dpo_jax.runs.steps import lay_out_steps
from lora_dpo_jax.sharding import MeshConfig, Placement
from lora_dpo_jax.training.loop import TrainerConfig
from lora_dpo_jax.training.optimizer import OptimizerConfig
from lora_dpo_jax.training.step import TrainState

PAIRS = whole_table({"prefs": random_pairs(16)})
ROWS = {"embed_tokens": [3, 5], "lm_head": [5]}


@pytest.mark.parametrize("axes", [{"data": 1}, {"data": 4, "model": 2}], ids=str)
def test_abstract_arrays_take_what_real_ones_do(axes):
    """And so does the step that is compiled for them."""
    devices = jax.devices()[:1] if axes == {"data": 1} else None
    placement = Placement(MeshConfig(axes), devices)
    optimizer, lora = OptimizerConfig().build(10), LoraConfig(r=3, alpha=6.0, trainable_token_indices=ROWS)
    settings, precision = ModelConfig(**dataclasses.asdict(ComputeConfig())), TrainerConfig().precision_on("cpu")
    abstract = abstract_learner(
        PreferenceObjective(Dpo()), optimizer, LLAMA, placement, lora=lora, model=settings, precision=precision
    )
    policy = loraize(tiny_decoder(attention="auto"), lora, key=jax.random.key(0))
    real = real_learner(PreferenceObjective(Dpo()), optimizer, policy, placement, key=jax.random.key(1))
    assert bytes_of_a_device(abstract.state) == bytes_of_a_device(real.state)

    ids, row_shards = [np.arange(16)], placement.row_shards
    steps = lay_out_steps(PAIRS, ids, PackingConfig(), parallelism=-1, row_shards=row_shards)
    (batch,) = steps.batches(placement)
    found, expected = abstract.compile(placement.abstract_batch(batch)), real.compile(batch)
    assert ProgramMemory.of(found) == ProgramMemory.of(expected)


def test_a_learner_takes_step_after_step():
    placement, optimizer = Placement(MeshConfig({"data": 1}), jax.devices()[:1]), OptimizerConfig().build(2)
    policy = loraize(tiny_decoder(), LoraConfig(r=3, trainable_token_indices=ROWS), key=jax.random.key(0))
    learner = real_learner(PreferenceObjective(Dpo()), optimizer, policy, placement, key=jax.random.key(1))
    steps = lay_out_steps(PAIRS, [np.arange(4)] * 2, PackingConfig(), parallelism=-1, row_shards=1)
    losses = [float(learner(batch).values["loss"]) for batch in steps.batches(placement)]
    assert int(learner.state.step) == 2
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_reference_adapters_and_dtypes_are_those_of_the_settings(quantization):
    placement, optimizer = Placement(MeshConfig({"data": 1}), jax.devices()[:1]), OptimizerConfig().build(10)

    def state(*, mp: str, dtype: str | None = None, has_reference_adapters: bool = False) -> TrainState:
        return abstract_learner(
            PreferenceObjective(Dpo()),
            optimizer,
            LLAMA,
            placement,
            lora=LoraConfig(r=4),
            model=ModelConfig(dtype=dtype, quantization=quantization),
            precision=TrainerConfig(mp=mp).precision,
            has_reference_adapters=has_reference_adapters,
        ).state

    def norm_dtype(state: TrainState):
        return state.model.model.norm.weight.array.dtype

    assert norm_dtype(state(mp="p=f32,c=bfloat16")) == "bfloat16" == norm_dtype(state(mp="f32", dtype="bf16"))
    adapters = state(mp="p=f32,c=bfloat16", has_reference_adapters=True).reference
    assert {leaf.dtype.name for leaf in jax.tree.leaves(adapters)} == {"float32"}
    assert state(mp="f32").reference is None
