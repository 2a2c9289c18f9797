"""Every recipe in config/ fits its model: each is planned abstractly, without weights and without compiling."""

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import pytest
from published_shapes import PUBLISHED, published_folder

from lora_dpo_jax.lora import trainable_filter
from lora_dpo_jax.models.quantization import parameter_count
from lora_dpo_jax.runs.base import read_decoder
from lora_dpo_jax.runs.config import TrainConfig
from lora_dpo_jax.runs.learner import abstract_learner
from lora_dpo_jax.settings.arguments import parse
from lora_dpo_jax.sharding import MeshConfig, Placement

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for path in (ROOT / "config").glob("*.yaml") if path.name != "objectives.yaml")


@functools.cache
def recipe(path: Path) -> TrainConfig:
    return parse(TrainConfig, [], config_path=path)


def shapes_of(config: TrainConfig) -> dict[str, Any]:
    """The config.json of the recipe's model."""
    if (found := PUBLISHED.get(config.initialize_from_hf)) is not None:
        return found
    return json.loads((ROOT / config.initialize_from_hf / "config.json").read_text())


def adapter_parameters(config: TrainConfig) -> int:
    """r (inputs + outputs) of each target of each layer, counted from config.json alone."""
    model, targets = shapes_of(config), config.lora.target_modules
    hidden, mlp, heads = model["hidden_size"], model["intermediate_size"], model["num_attention_heads"]
    head = model.get("head_dim") or hidden // heads
    queries, keys = heads * head, model["num_key_value_heads"] * head
    sides = {
        "q_proj": hidden + queries,
        "k_proj": hidden + keys,
        "v_proj": hidden + keys,
        "o_proj": queries + hidden,
        "gate_proj": hidden + mlp,
        "up_proj": hidden + mlp,
        "down_proj": mlp + hidden,
    }
    assert targets is None or set(targets) <= set(sides)
    return config.lora.r * model["num_hidden_layers"] * sum(sides[name] for name in targets or sides)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_its_model(path, tmp_path):
    config = recipe(path)
    folder = ROOT / config.initialize_from_hf
    if config.initialize_from_hf in PUBLISHED:
        folder = published_folder(tmp_path, config.initialize_from_hf)
    learner = abstract_learner(
        config.objective,
        config.optimizer.build(config.trainer.num_train_steps or 1000),
        read_decoder(folder, config.model, config.lora),
        Placement(MeshConfig({"data": 1}), jax.devices()[:1]),
        lora=config.lora,
        model=config.model,
        precision=config.trainer.precision_on("tpu"),
        has_reference_adapters=config.reference_has_adapters,
    )
    adapters, weights = eqx.partition(learner.state.model, trainable_filter(learner.state.model))
    assert parameter_count(adapters) == adapter_parameters(config)
    model = shapes_of(config)
    embeddings = model["vocab_size"] * model["hidden_size"] * (1 if model.get("tie_word_embeddings") else 2)
    layers = 4 * model["num_hidden_layers"] * model["hidden_size"] * model["intermediate_size"]
    assert embeddings + 0.7 * layers < parameter_count(weights) < embeddings + 2 * layers
    assert math.prod(learner.placement.mesh.shape.values()) == 1


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_needs_and_whether_that_was_measured(path):
    head = path.read_text().partition("\ninitialize_from_hf")[0]
    if recipe(path).initialize_from_hf in PUBLISHED and "smollm2" not in path.name:
        assert re.search(r"Planned, not measured: (one|\d+) chips? \(v\w+:[\dx]+\)", head), head
        assert re.search(r"needs [\d.]+ of [\d.]+ GiB; a step takes at best [\d.]+ s\.", head), head
    else:
        assert "two cpu cores" in head.lower()
