"""What a run takes is foretold without its devices and without its weights."""

import itertools
import json
import re
from pathlib import Path

import draccus
import jax
import jax.numpy as jnp
import pytest
from tiny_runs import instruct_folder

from lora_dpo_jax.cost import devices
from lora_dpo_jax.main.plan import COMPILING, PlanConfig, main, texts
from lora_dpo_jax.runs import capacity
from lora_dpo_jax.runs.capacity import Plan

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
    found = main(config(config_alone, trainer={"train_batch_size": 4}, model={"attention": "dense"}))
    sizes, printed = found.sizes, capsys.readouterr().out
    assert found.fits and sizes.num_devices == 4
    assert f"{sizes.parameters:,}" in printed and "DOES NOT FIT" not in printed
    arrays = sizes.weights + sizes.adapters + sizes.optimizer
    assert 0 < arrays < found.peak < 2**30
    assert found.parallelism == 1  # all pairs of the step are in one row of each device already
    # Weights are split over `data`, so each layer's are gathered from the others.
    assert found.collectives["all-gather"] > 0
    assert all(seconds > 0 for seconds in found.seconds.values())


def test_what_does_not_fit_is_told_with_a_way_out(huge, capsys):
    found = main(config(huge, trainer={"train_batch_size": 4}))
    assert not found.fits and found.peak > found.sizes.weights > 15.75 * 2**30
    assert found.parallelism is None
    printed = capsys.readouterr().out
    assert "DOES NOT FIT" in printed and "model.quantization=nf4" in printed


def test_sizes_are_known_before_anything_is_compiled(config_alone, monkeypatch):
    def compiles(*_):
        raise AssertionError("compiles")

    monkeypatch.setattr(Plan, "_compile", compiles)
    settings = config(config_alone)
    plan = Plan(settings, settings.topology, settings.pair_tokens)
    known = list(itertools.takewhile(lambda text: text != COMPILING, texts(settings, plan)))
    assert any(f"{plan.sizes.parameters:,}" in text for text in known)
    assert any("1 x 4 x 1152 tokens" in text for text in known)
    keeps = {"train_batch_size": 16, "steps_per_eval": 5, "best": {"metric": "eval/loss"}}
    best = Plan(config(config_alone, trainer=keeps), settings.topology, settings.pair_tokens)
    assert best.sizes.adapters == 2 * plan.sizes.adapters, "those of the best evaluation are kept on the devices"


@pytest.mark.parametrize("given", [-1, 1, 2])
def test_the_largest_parallelism_fills_the_memory(given, config_alone, monkeypatch):
    settings = config(config_alone, trainer={"train_batch_size": 512, "per_device_parallelism": given})
    plan = Plan(settings, settings.topology, settings.pair_tokens)
    a_row = 2 * settings.train_seq_len

    def compiled(_, batch, options):
        return round(0.4 * plan.sizes.kind.memory + batch.tokens.axes[-1].size / a_row * 1e8), ""

    monkeypatch.setattr(Plan, "_compile", compiled)
    assert plan.parallelism == int(0.6 * plan.sizes.kind.memory / 1e8)


@pytest.mark.parametrize("quick, full, efforts", [(0.98, 1.01, 2), (0.9, 1.01, 1), (1.1, 0.9, 1)])
def test_a_step_that_nearly_fills_the_memory_is_compiled_as_a_run_would(
    quick, full, efforts, config_alone, monkeypatch
):
    settings, calls = config(config_alone, trainer={"train_batch_size": 4}), []
    plan = Plan(settings, settings.topology, settings.pair_tokens)

    def compiled(_, batch, options):
        calls.append(options)
        return round((quick if options else full) * plan.sizes.kind.memory), ""

    monkeypatch.setattr(Plan, "_compile", compiled)
    monkeypatch.setattr(capacity, "QUICK", {"effort": -1.0})  # which not every version of JAX has
    assert plan.fits == ((full if efforts == 2 else quick) <= 1)
    assert len(calls) == efforts


def test_a_gpu_run_is_told_which_share_of_memory_it_needs(config_alone, monkeypatch):
    settings = config(config_alone, topology="h100:1", trainer={"train_batch_size": 1})
    plan = Plan(settings, settings.topology, settings.pair_tokens)
    monkeypatch.setattr(Plan, "_compile", lambda *_: (round(0.815 * 84_942_979_072), ""))
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION=0.82" in "\n".join(texts(settings, plan))


def test_tpu_chips_that_stand_for_gpus_are_told(config_alone, monkeypatch):
    monkeypatch.setattr(devices, "installed_plugin", lambda: None)
    settings = config(config_alone, topology="h100:2")
    plan = Plan(settings, settings.topology, settings.pair_tokens)
    known = "\n".join(itertools.takewhile(lambda text: text != COMPILING, texts(settings, plan)))
    assert "TPU chips stand for h100" in known and "pip install 'lora_dpo_jax[gpu-plan]'" in known


@pytest.mark.parametrize(
    "topology, chips",
    [("v4:2x2x1", 4), ("v4:1x1x1", 1), ("v5e:2x2", 4), ("v5e:1x1", 1), ("v5p:2x2x1", 4), ("v6e:2x2", 4)],
)
def test_a_device_of_a_topology_is_a_chip_with_its_memory(topology, chips):
    kind, found = devices.devices_of_topology(topology)
    assert len(found) == chips
    a = jax.ShapeDtypeStruct((2**19, 2**17), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(found[0]))
    with pytest.raises(jax.errors.JaxRuntimeError) as refusal:
        jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x).T).lower(a).compile()
    sizes = [float(size) for size in re.findall(r"\b([\d.]+)G\b", str(refusal.value))]
    # Versions of libtpu keep a little for themselves, and not all the same.
    assert any(size == pytest.approx(kind.memory / devices.GIB, abs=0.02) for size in sizes), refusal.value


def test_devices_that_are_no_chips_are_an_error(monkeypatch):
    monkeypatch.setattr(devices, "CHIP_OPTIONS", {})
    with pytest.raises(ValueError, match="topology='v4:2x2x1' has 4 chips, and libtpu describes 8 devices"):
        devices.devices_of_topology("v4:2x2x1")


@pytest.mark.parametrize(
    "topology, needed",
    [
        ("v5e:2x2", r"needs libtpu \(pip install 'lora_dpo_jax\[tpu\]'\)"),
        ("h100:8", r"needs JAX's CUDA plugin \(pip install 'lora_dpo_jax\[gpu-plan\]'\) or, for an estimate, libtpu"),
    ],
)
def test_a_missing_compiler_is_named_for_what_was_asked(topology, needed, monkeypatch):
    monkeypatch.setattr(devices, "find_spec", lambda _: None)
    monkeypatch.setattr(devices, "installed_plugin", lambda: None)
    with pytest.raises(ValueError, match=f"topology='{topology}' {needed}"):
        devices.devices_of_topology(topology)


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
