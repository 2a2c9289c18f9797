"""The descriptions of GPUs for XLA say what their makers' data sheets say."""

import pytest

from lora_dpo_jax.cost.devices import DEVICE_KINDS
from lora_dpo_jax.cost.gpus import GPUS, PLUGINS, SHARE_OF_MEMORY, installed_plugin, target_config

KINDS = {kind.name: kind for kind in DEVICE_KINDS if not kind.is_tpu}
# Products of a multiprocessor in a clock: of bfloat16 in tensor cores, in the architectures' white papers.
PRODUCTS = {8: 1024, 9: 2048, 10: 4096}


@pytest.mark.parametrize("name", GPUS)
def test_descriptions_and_data_sheets_agree(name):
    gpu, kind = GPUS[name], KINDS[name]
    assert gpu.bandwidth == pytest.approx(kind.memory_bandwidth, rel=0.05)
    # At the highest clock, which tensor cores do not hold on H100 and B200.
    fastest = 2 * gpu.count * PRODUCTS[gpu.multiprocessor.major] * gpu.clock * 1e9
    assert kind.flops <= fastest * 1.001 and fastest < 1.1 * kind.flops
    assert kind.memory < gpu.memory and kind.jax_name in gpu.name


def test_every_gpu_has_a_description():
    assert GPUS.keys() == KINDS.keys()


def test_a_program_may_use_what_a_run_can_allocate():
    text = target_config(GPUS["h100"], "jax_cuda12_plugin")
    stated = int(text.partition("device_memory_size: ")[2].split()[0])
    assert stated * SHARE_OF_MEMORY == pytest.approx(0.95 * 84_942_979_072)
    assert 'runtime_version: "12.' in text


def test_the_plugin_that_jax_would_load_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert installed_plugin() is None
    for name in reversed(PLUGINS):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        assert installed_plugin() == name
