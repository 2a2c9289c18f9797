"""A linear layer is adapted or named: none that is a target is passed over in silence."""

import json
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
import pytest
from tiny_pairs import LLAMA

from lora_dpo_jax.huggingface.adapters import save_adapter
from lora_dpo_jax.lora import LoraConfig, LoraLinear, linear_layers, loraize
from lora_dpo_jax.models import DecoderConfig

Embed, Inner, Expert, Layers = hax.make_axes(embed=8, mlp=12, experts=3, layers=2)


class Numbered(eqx.Module):
    """A Linear for each expert in one array, numbered as the experts of a checkpoint are."""

    bank: Any

    def numbers(self, path: Sequence[Any]) -> tuple[range, int]:
        return range(Expert.size), 1


class Layer(eqx.Module):
    q_proj: hnn.Linear
    experts: Any


class Model(eqx.Module):
    layers: hnn.Stacked[Layer]
    config: DecoderConfig = eqx.field(static=True, default=LLAMA)


def moe_linear(key):
    return hnn.MoELinear.init(Expert, Embed, Inner, key=key, use_bias=False)


def bank(key):
    return hax.vmap(lambda key: hnn.Linear.init(Embed, Inner, key=key, use_bias=False), Expert)(
        jax.random.split(key, Expert.size)
    )


EXPERTS = {
    "moe": (moe_linear, "no adapter knows haliax.nn.linear.MoELinear"),
    "equinox": (lambda key: eqx.nn.Linear(8, 12, key=key), "no adapter knows equinox.nn._linear.Linear"),
    "convolution": (
        lambda key: hnn.Conv.init(hax.Axis("position", 4), Embed, Inner, kernel_size=2, key=key),
        "no adapter knows haliax.nn.conv.Conv",
    ),
    "unnumbered": (bank, "haliax.nn.linear.Linear has axes {layers, experts} but 2 names"),
}


def model_with(make) -> Model:
    def layer(key) -> Layer:
        return Layer(hnn.Linear.init(Embed, Inner, key=key, use_bias=False), make(key))

    keys = jax.random.split(jax.random.key(0), Layers.size)
    return Model(hnn.Stacked(hax.vmap(layer, Layers)(keys), Layers, hnn.ScanCheckpointPolicy()))


class Named(eqx.Module):
    q_proj: hnn.MoELinear


def adapted_names(model) -> set[str]:
    return {name for layer, names in linear_layers(model) for name in names if isinstance(layer, LoraLinear)}


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("targets", [None, ["q_proj", "experts"], ["layers.1.experts"], r".*"], ids=str)
def test_a_target_that_no_adapter_knows_is_an_error_that_names_it(experts, targets):
    make, reason = EXPERTS[experts]
    with pytest.raises(ValueError) as error:
        loraize(model_with(make), LoraConfig(target_modules=targets), key=jax.random.key(0))
    message = str(error.value)
    assert message.startswith(f"lora.target_modules={targets!r} includes ['layers.*.experts']: ")
    assert reason in message and "Name it in lora.exclude_modules" in message


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize(
    "settings",
    [dict(target_modules=["q_proj"]), dict(exclude_modules=["experts"]), dict(exclude_modules=r".*\.experts")],
    ids=str,
)
def test_a_layer_that_is_no_target_may_be_of_any_kind(experts, settings):
    adapted = loraize(model_with(EXPERTS[experts][0]), LoraConfig(**settings), key=jax.random.key(0))
    assert adapted_names(adapted) == {"layers.0.q_proj", "layers.1.q_proj"}


def test_an_exported_adapter_does_not_name_a_layer_that_it_leaves_out(tmp_path):
    """PEFT would adapt all that is called q_proj."""
    config = LoraConfig(target_modules=["layers.0.q_proj", "1.q_proj"])
    adapted = loraize(model_with(lambda key: Named(moe_linear(key))), config, key=jax.random.key(0))
    save_adapter(adapted, tmp_path, base_model="base", config=config)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["layers.0.q_proj", "layers.1.q_proj"]


def test_a_layer_with_a_number_for_each_slice_is_adapted():
    adapted = loraize(model_with(lambda key: Numbered(bank(key))), LoraConfig(), key=jax.random.key(0))
    assert {f"layers.{i}.experts.{e}" for i in range(2) for e in range(3)} < adapted_names(adapted)
