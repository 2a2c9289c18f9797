"""The settings of adapters; PEFT, live, says how they scale."""

import warnings

import pytest
import torch

from lora_dpo_jax.lora import LoraConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_scaling_is_that_of_peft(use_rslora):
    config = peft.LoraConfig(r=6, lora_alpha=10, use_rslora=use_rslora, target_modules=["0"])
    theirs = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 3)), config)
    (layer,) = (module for module in theirs.modules() if isinstance(module, peft.tuners.lora.LoraLayer))
    assert LoraConfig(r=6, alpha=10.0, use_rslora=use_rslora).scaling == layer.scaling["default"]


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(r=0), r"lora\.r=0 must be at least 1"),
        (dict(dropout=1.0), r"lora\.dropout=1\.0 must be in \[0, 1\)"),
        (dict(dropout=-0.1), r"lora\.dropout=-0\.1 must be in \[0, 1\)"),
        (dict(a_init="ones"), r"lora\.a_init='ones' must be one of random, zero"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**settings)
