"""Whatever adapter the table names is trained, saved, loaded and merged: nothing else knows its class."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from haliax import NamedArray
from safetensors.numpy import load_file
from tiny_models import HIDDEN, LENGTH, load, logits, random_tokens, tiny_folder
from tiny_pairs import moved, packed, random_pairs, table_of

from lora_dpo_jax.cost.flops import useful_flops
from lora_dpo_jax.data.shapes import choose_shapes
from lora_dpo_jax.huggingface.adapters import load_adapter, save_adapter
from lora_dpo_jax.huggingface.weights import save_merged
from lora_dpo_jax.lora import (
    Adapter,
    Factor,
    LoraConfig,
    LoraLinear,
    equals_reference,
    frozen_copy,
    linear_layers,
    loraize,
    merge_lora,
    trainable_filter,
    unwrap_lora,
    with_dropout,
)
from lora_dpo_jax.lora.adapter import ByLayer, names_of, stack_axes
from lora_dpo_jax.lora.variants import ADAPTERS
from lora_dpo_jax.tensor_names import axes_of

CONFIG = LoraConfig(r=4, alpha=8.0, target_modules=["q_proj", "layers.1.mlp.down_proj"])
TOKENS = random_tokens(2, LENGTH)


class Gain(Adapter):
    """y = (1 + scaling * gain) * wrapped(x): not low-rank, and one factor, of one dimension."""

    wrapped: hnn.Linear
    gain: NamedArray  # {*stack, *Out}
    scaling: float = eqx.field(static=True)
    dropout: float = eqx.field(static=True)
    by_layer: ByLayer | None

    @classmethod
    def init(cls, layer: hnn.Linear, config: LoraConfig, by_layer: ByLayer | None, *, key) -> "Gain":
        gain = hax.zeros((*stack_axes(layer), *axes_of(layer.Out)))
        return Gain(layer, gain=gain, scaling=config.scaling, dropout=config.dropout, by_layer=by_layer)

    @property
    def factors(self) -> dict[str, Factor]:
        return {"lora_gain": Factor(self.gain, (names_of(self.wrapped.Out),))}

    @property
    def rank(self) -> int:
        return CONFIG.r

    @property
    def flops_per_token(self) -> int:
        return self.parameter_count

    def __call__(self, x: NamedArray, *, key=None) -> NamedArray:
        return self.wrapped(x) * (1 + self.gain * self.scale)

    def merge(self, weight: Any, tensors: Mapping[str, Any], scaling: Any) -> Any:
        return weight * (1 + scaling * tensors["lora_gain"][..., None])

    def adds_nothing(self) -> jax.Array:
        return ~jnp.any(self.gain.array != 0)


@pytest.fixture(autouse=True)
def gains(monkeypatch):
    monkeypatch.setitem(ADAPTERS, hnn.Linear, lambda config: Gain)


@pytest.fixture
def plain():
    return load(tiny_folder("llama2"))


@pytest.fixture
def adapted(plain):
    return moved(loraize(plain, CONFIG, key=jax.random.key(0)))


def test_its_factors_are_what_is_trained(plain, adapted):
    trained = jax.tree.leaves(eqx.filter(adapted, trainable_filter(adapted)))
    assert sorted(leaf.shape for leaf in trained) == [(3, 4, 1, 8), (3, HIDDEN)]  # of q_proj {heads}, down_proj {embed}
    assert jax.tree.structure(unwrap_lora(adapted)) == jax.tree.structure(plain)
    dropping = with_dropout(adapted, 0.5)
    assert [layer.dropout for layer, _ in linear_layers(dropping) if isinstance(layer, Gain)] == [0.5, 0.5]


def test_it_says_when_the_policy_is_the_reference(plain, adapted):
    assert equals_reference(loraize(plain, CONFIG, key=jax.random.key(0)), None)
    assert not equals_reference(adapted, None)
    assert equals_reference(adapted, frozen_copy(adapted))
    assert not equals_reference(adapted, frozen_copy(moved(adapted, seed=5)))


def test_merged_equals_adapted(plain, adapted, tmp_path):
    ours = logits(adapted, TOKENS)
    assert np.abs(ours - logits(plain, TOKENS)).max() > 0.1
    np.testing.assert_allclose(logits(merge_lora(adapted), TOKENS), ours, rtol=0, atol=1e-4)
    save_merged(adapted, tiny_folder("llama2"), tmp_path / "merged")
    np.testing.assert_allclose(logits(load(tmp_path / "merged"), TOKENS), ours, rtol=0, atol=1e-4)


def test_saving_then_loading_is_the_identity(plain, adapted, tmp_path):
    save_adapter(adapted, tmp_path, base_model="base", config=CONFIG)
    shapes = {name: tensor.shape for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}
    layers = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)] + ["model.layers.1.mlp.down_proj"]
    assert shapes == {f"base_model.model.{layer}.lora_gain": (HIDDEN,) for layer in layers}
    np.testing.assert_array_equal(logits(load_adapter(plain, tmp_path), TOKENS), logits(adapted, TOKENS))


def test_a_file_of_another_adapter_is_refused(plain, adapted, tmp_path, monkeypatch):
    save_adapter(adapted, tmp_path / "gains", base_model="base", config=CONFIG)
    monkeypatch.setitem(ADAPTERS, hnn.Linear, lambda config: LoraLinear)
    with pytest.raises(ValueError, match=r"missing: .*layers\.1\.mlp\.down_proj\.lora_A\.weight"):
        load_adapter(plain, tmp_path / "gains")
    with pytest.raises(
        ValueError, match="q_proj has a Gain with r=4 and scaling=2.0, but .* make a LoraLinear with r=4"
    ):
        save_adapter(adapted, tmp_path / "lora", base_model="base", config=CONFIG)


def test_its_operations_count(plain, adapted):
    pairs = table_of(random_pairs(3))
    batch = packed(pairs, choose_shapes([np.arange(3)], pairs.sizes).parts[0])
    with_gains, without = (float(useful_flops(model, batch, with_reference=True)) for model in (adapted, plain))
    gains = 3 * (4 * 1 * 8 + HIDDEN)
    assert with_gains - without == pytest.approx(
        3 * gains * pairs.sizes.tokens.sum(), rel=1e-3
    )  # of float32 sums near 1e7
