"""What docs/optimizers.md says of the memory of each optimizer is what its state takes."""

import re
from pathlib import Path

import equinox as eqx
import jax
import jmp
import pytest
from published_shapes import published_folder

from lora_dpo_jax.lora import LoraConfig, trainable_filter
from lora_dpo_jax.losses import Dpo
from lora_dpo_jax.models.quantization import parameter_count
from lora_dpo_jax.preference_objective import PreferenceObjective
from lora_dpo_jax.runs.base import read_decoder
from lora_dpo_jax.runs.capacity import bytes_of_a_device
from lora_dpo_jax.runs.config import ModelConfig
from lora_dpo_jax.runs.learner import abstract_learner
from lora_dpo_jax.sharding import MeshConfig, Placement
from lora_dpo_jax.training.optimizer import OPTIMIZERS

PAGE = Path(__file__).parents[2] / "docs" / "optimizers.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return published_folder(tmp_path_factory.mktemp("8b"), "meta-llama/Llama-3.1-8B")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_table_of_the_page_has_the_bytes_of_the_state(name, folder):
    """As a plan counts them."""
    lora = LoraConfig(r=64, alpha=64.0)
    state = abstract_learner(
        PreferenceObjective(Dpo()),
        OPTIMIZERS[name]().build(10),
        read_decoder(folder, ModelConfig(), lora),
        Placement(MeshConfig({"data": 1}), jax.devices()[:1]),
        lora=lora,
        model=ModelConfig(),
        precision=jmp.get_policy("p=f32,c=bfloat16"),
    ).state
    count = parameter_count(eqx.filter(state.model, trainable_filter(state.model)))
    page = PAGE.read_text()
    assert f"{count:,} numbers" in page
    found = re.search(rf"^\| `{name}` \| ([\d.]+) \|", page, flags=re.MULTILINE)
    assert found is not None
    assert float(found[1]) == round(bytes_of_a_device(state.opt_state) / 1e6, 1)
