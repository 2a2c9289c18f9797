"""XLA's options for a platform."""

import jax
import jax.numpy as jnp
import pytest

from lora_dpo_jax import platforms
from lora_dpo_jax.platforms import COMPILER_OPTIONS, compiler_options

ZEROS = "xla_gpu_enable_dus_accumulator_zero_init_elimination"


@pytest.mark.parametrize("options", COMPILER_OPTIONS.values(), ids=COMPILER_OPTIONS)
def test_this_jax_knows_all_options(options):
    jax.jit(jnp.sin, compiler_options=options)(0.0)  # XLA for a CPU reads those of GPUs too


@pytest.mark.parametrize("name", COMPILER_OPTIONS)
def test_each_platform_has_its_own_options(monkeypatch, name):
    monkeypatch.setattr(platforms, "platform", lambda: name)
    monkeypatch.delenv("XLA_FLAGS")
    assert compiler_options() == COMPILER_OPTIONS[name]


def test_flags_of_the_user_come_first(monkeypatch, tmp_path):
    monkeypatch.setattr(platforms, "platform", lambda: "gpu")
    flags = f"--xla_force_host_platform_device_count=8 --{ZEROS}=false"
    (tmp_path / "flags").write_text(flags.replace(" ", "\n"))
    for given in (flags, str(tmp_path / "flags")):
        monkeypatch.setenv("XLA_FLAGS", given)
        assert compiler_options() == {name: x for name, x in COMPILER_OPTIONS["gpu"].items() if name != ZEROS}
