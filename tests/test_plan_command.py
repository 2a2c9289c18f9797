"""What a run takes is foretold without its devices and without its weights."""

import json
from pathlib import Path

import draccus
import jax
import pytest
from tiny_pairs import LLAMA, tiny_decoder
from tiny_runs import instruct_folder

from lora_dpo_jax.cost.compiled import ProgramMemory
from lora_dpo_jax.data.packing import PreferenceBatch
from lora_dpo_jax.lora import LoraConfig, loraize
from lora_dpo_jax.losses import Dpo
from lora_dpo_jax.main.plan import PlanConfig, expected_batch, main, plan, report
from lora_dpo_jax.runs.abstract import bytes_of_a_device, describe_state
from lora_dpo_jax.sharding import MeshConfig, Placement
from lora_dpo_jax.training.optimizer import OptimizerConfig
from lora_dpo_jax.training.step import TrainState, TrainStep

# Fifty billion parameters in two layers: as quick to compile as two small ones.
HUGE = {"hidden_size": 16384, "intermediate_size": 524288, "num_hidden_layers": 2, "vocab_size": 512}


def config(folder: Path, **settings) -> PlanConfig:
    tree = {
        "initialize_from_hf": str(folder),
        "data": {"components": {"prefs": {"source": {"type": "url", "train_urls": ["gone.jsonl"]}}}},
        "train_seq_len": 256,
        "pair_tokens": [60, 100, 90],
        "topology": "v5e:2x2",
        "trainer": {"train_batch_size": 16},
        "lora": {"r": 4},
    }
    return draccus.decode(PlanConfig, tree | settings)


@pytest.fixture
def config_alone(tmp_path) -> Path:
    (tmp_path / "config.json").write_text((instruct_folder() / "config.json").read_text())
    return tmp_path


@pytest.fixture
def huge(config_alone) -> Path:
    path = config_alone / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | HUGE))
    return config_alone


def test_a_small_model_fits(config_alone, capsys):
    found = main(config(config_alone))
    printed = capsys.readouterr().out
    assert found.fits and found.num_devices == 4
    assert f"{found.parameters:,}" in printed and "DOES NOT FIT" not in printed
    arrays = found.weights + found.adapters + found.optimizer
    assert 0 < arrays < found.peak < 2**30
    assert found.parallelism > 1000
    # Weights are split over `data`, so each layer's are gathered from the others.
    assert found.collectives["all-gather"] > 0
    assert all(seconds > 0 for seconds in found.seconds.values())


def test_what_does_not_fit_is_told_with_a_way_out(huge):
    settings = config(huge)
    found = plan(settings)
    assert not found.fits and found.peak > found.weights > 15.75 * 2**30
    assert found.parallelism is None
    text = report(settings, found)
    assert "DOES NOT FIT" in text and "model.quantization=nf4" in text


def test_rows_hold_the_step_and_no_more(config_alone):
    settings = config(config_alone)
    batch = expected_batch(settings, 4, -1)
    assert [axis.size for axis in batch.tokens.axes] == [1, 4, 1152]  # 16 pairs of 250 tokens, over four
    assert int(batch.is_pair.array.sum()) == 16
    one = expected_batch(settings, 4, 1)
    assert [axis.size for axis in one.tokens.axes] == [2, 4, 512]  # the longest pair that train_seq_len allows


@pytest.mark.parametrize("axes", [{"data": 1}, {"data": 4, "model": 2}], ids=str)
def test_described_arrays_take_what_real_ones_do(axes, config_alone):
    """And so does the step that is compiled for them."""
    devices = jax.devices()[:1] if axes == {"data": 1} else None
    placement = Placement(MeshConfig(axes), devices)
    optimizer = OptimizerConfig().build(10)
    batch: PreferenceBatch = expected_batch(config(config_alone), placement.row_shards, -1)
    step = TrainStep(Dpo(), optimizer, scope=placement.scope)
    lora = LoraConfig(r=3, alpha=6.0)
    described = describe_state(LLAMA, lora, optimizer, placement, dtype="float32")
    model = loraize(tiny_decoder(), lora, key=jax.random.key(0))
    real = placement.put_parameters(TrainState.init(model, optimizer, key=jax.random.key(1)))
    assert bytes_of_a_device(described) == bytes_of_a_device(real)
    found = step.lower(described, placement.describe_batch(batch)).compile()
    expected = step.lower(real, placement.put_batch(batch)).compile()
    assert ProgramMemory.of(found) == ProgramMemory.of(expected)


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"topology": "v9:2x2"}, "topology='v9:2x2'"),
        ({"topology": "v5e"}, "topology='v5e'"),
        ({"topology": "h100:3"}, "topology='h100:3'"),
        ({"pair_tokens": [200, 100, 90]}, "--pair_tokens .* exceeds train_seq_len=256"),
    ],
)
def test_mistakes_are_named(settings, named, config_alone):
    with pytest.raises(Exception, match=named.replace("[", r"\[")):
        plan(config(config_alone, **settings))
