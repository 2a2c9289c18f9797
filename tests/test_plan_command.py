"""What a run takes is foretold without its devices and without its weights."""

import json
from pathlib import Path

import draccus
import pytest
from tiny_runs import instruct_folder

from lora_dpo_jax.main.plan import PlanConfig, main, report

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
    found = main(settings)
    assert not found.fits and found.peak > found.weights > 15.75 * 2**30
    assert found.parallelism is None
    text = report(settings, found)
    assert "DOES NOT FIT" in text and "model.quantization=nf4" in text


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
        main(config(config_alone, **settings))
