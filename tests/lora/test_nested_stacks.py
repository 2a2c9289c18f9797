"""Experts in layers, held in three ways under the same names of a checkpoint: adapted, saved and merged alike."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from haliax import Axis
from safetensors.numpy import load_file, save_file
from tiny_pairs import LLAMA, VOCAB, moved

from lora_dpo_jax.huggingface.adapters import layer_adapters, load_adapter, save_adapter
from lora_dpo_jax.huggingface.weights import save_merged
from lora_dpo_jax.lora import LoraConfig, linear_layers, loraize, matching_names, merge_lora, trainable_filter
from lora_dpo_jax.models import CausalLM, ComputeConfig, PackedMask
from lora_dpo_jax.models.layers import DecoderLayer
from lora_dpo_jax.models.mlp import Mlp
from lora_dpo_jax.models.stack import LayerStack
from lora_dpo_jax.tensor_names import Parameter, map_parameters

Expert, Row, Pos = Axis("experts", 3), Axis("row", 2), Axis("position", 8)
TOKENS = hax.named(np.random.default_rng(0).integers(0, VOCAB, (2, 8), dtype=np.int32), (Row, Pos))
MASK = PackedMask.causal(Row, Pos)
SOME = ["q_proj", "layers.1.mlp.experts.0.up_proj", "experts.2.up_proj", "0.mlp.experts.1.down_proj"]
LORA = {
    "everywhere": LoraConfig(r=4, alpha=8.0),
    "some experts of some layers": LoraConfig(r=4, alpha=8.0, target_modules=SOME),
}


class Bank(eqx.Module):
    """All experts in one Mlp, whose weights have an axis more. No scan or vmap takes it away."""

    mlp: Mlp

    def numbers(self, path: Sequence[Any]) -> tuple[range, int]:
        return range(Expert.size), 1


class Experts(eqx.Module):
    """Their mean: what lies in a stack, in a bank or apart."""

    experts: Any

    def __call__(self, x, segments, *, key=None):
        if isinstance(self.experts, hnn.Stacked):
            outs = self.experts.vmap_via(lambda mlp, x: mlp(x, segments)[0])(x)
        elif isinstance(self.experts, Bank):
            outs, _ = self.experts.mlp(x, segments)
        else:
            outs = hax.stack(Expert, [mlp(x, segments)[0] for mlp in self.experts])
        return hax.mean(outs, Expert), {}


def make_experts(holding: str, *, key) -> Experts:
    keys = jax.random.split(key, Expert.size)
    if holding == "apart":
        return Experts(tuple(Mlp.init(LLAMA, key=key) for key in keys))
    stacked = hax.vmap(lambda key: Mlp.init(LLAMA, key=key), Expert)(keys)
    if holding == "bank":
        return Experts(Bank(stacked))
    return Experts(hnn.Stacked(stacked, Expert, hnn.ScanCheckpointPolicy()))


@functools.cache
def plain(holding: str) -> CausalLM:
    """A decoder with experts in the place of its Mlps, and weights that follow from their names."""
    compute = ComputeConfig(attention="dense")

    def make_layer(kind, *, key) -> DecoderLayer:
        layer = DecoderLayer.init(LLAMA, compute, kind, key=key)
        return eqx.tree_at(lambda layer: layer.mlp, layer, make_experts(holding, key=key))

    def make() -> CausalLM:
        model = CausalLM.init(LLAMA, compute, key=jax.random.key(0))
        layers = LayerStack.init(make_layer, LLAMA.layers, compute, key=jax.random.key(0))
        return eqx.tree_at(lambda model: model.model.layers, model, layers)

    def fill(parameter: Parameter) -> hax.NamedArray:
        tensors = [random_tensor(name, parameter.tensor_shape) for name in parameter.names]
        axes = (*parameter.stack_axes, *(axis for side in parameter.sides for axis in side))
        stacked = np.stack(tensors).reshape([axis.size for axis in axes])
        return hax.named(jnp.asarray(stacked), axes).rearrange(parameter.axes)

    return map_parameters(fill, eqx.filter_eval_shape(make))


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(list(name.encode()))
    return rng.normal(1.0 if "norm" in name else 0.0, 0.2, shape).astype(np.float32)


@functools.cache
def adapted(holding: str, lora: str) -> CausalLM:
    return moved(loraize(plain(holding), LORA[lora], key=jax.random.key(0)))


@eqx.filter_jit
def logits(model: CausalLM) -> jax.Array:
    return model(TOKENS, MASK.position_ids, MASK).array


@eqx.filter_jit
def logits_and_gradients(model: CausalLM) -> tuple[jax.Array, CausalLM]:
    """Logits, and the model with gradients of its adapters in their place."""
    adapters, weights = eqx.partition(model, trainable_filter(model))

    def loss(adapters):
        found = logits(eqx.combine(adapters, weights))
        return jnp.mean(jax.nn.log_softmax(found) ** 2), found

    gradients, found = jax.grad(loss, has_aux=True)(adapters)
    return found, eqx.combine(gradients, weights)


def tensors_of(model: CausalLM) -> dict[str, np.ndarray]:
    """Of all adapters, by name."""
    return {f"{layer.name}.{name}": tensor for layer in layer_adapters(model) for name, tensor in layer.tensors.items()}


holdings = pytest.mark.parametrize("holding", ["stacked", "bank"])
loras = pytest.mark.parametrize("lora", LORA)


@holdings
@loras
def test_exactly_the_targets_get_factors_with_the_axes_of_both_stacks(holding, lora):
    model = adapted(holding, lora)
    everywhere = [name for _, names in linear_layers(plain(holding)) for name in names]
    assert "model.layers.1.mlp.experts.2.gate_proj" in everywhere and len(everywhere) == 2 * (4 + 3 * 3) + 1
    assert {layer.name for layer in layer_adapters(model)} == set(matching_names(everywhere, LORA[lora]))
    (layer,) = model.model.layers.segments[0].stacked.layers
    mlp = layer.mlp.experts.stacked if holding == "stacked" else layer.mlp.experts.mlp
    up = mlp.up_proj
    assert [axis.name for axis in up.lora_A.axes] == ["layers", "experts", "lora_rank", "embed"]
    assert [axis.name for axis in up.lora_B.axes] == ["layers", "experts", "mlp", "lora_rank"]
    if lora == "everywhere":
        assert up.by_layer is None
    else:
        np.testing.assert_array_equal(up.by_layer.scaling.array != 0, [[0, 0, 1], [1, 0, 1]])
        np.testing.assert_array_equal(mlp.down_proj.by_layer.scaling.array != 0, [[0, 1, 0], [0, 0, 0]])
        assert not hasattr(mlp.gate_proj, "lora_A")


@holdings
def test_an_adapter_computes_the_same_however_experts_are_held(holding, tmp_path):
    """A file of one holding is loaded into all three, which have the same factors, logits and gradients."""
    lora = "some experts of some layers"
    model = adapted(holding, lora)
    save_adapter(model, tmp_path, base_model="base", config=LORA[lora])
    saved = tensors_of(model)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {f"base_model.model.{name}" for name in saved}
    expected, expected_gradients = logits_and_gradients(model)
    expected_gradients = tensors_of(expected_gradients)
    for other in ("apart", "stacked", "bank"):
        loaded = load_adapter(plain(other), tmp_path)
        assert tensors_of(loaded).keys() == saved.keys()
        for name, tensor in tensors_of(loaded).items():
            np.testing.assert_array_equal(tensor, saved[name], err_msg=name)
        found, gradients = logits_and_gradients(loaded)
        # Float32 sums, in another order where XLA makes one product of several.
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
        for name, gradient in tensors_of(gradients).items():
            scale = np.abs(expected_gradients[name]).max()
            assert scale > 0
            np.testing.assert_allclose(gradient, expected_gradients[name], rtol=0, atol=1e-4 * scale, err_msg=name)


@holdings
@loras
def test_merged_equals_adapted(holding, lora, tmp_path):
    model = adapted(holding, lora)
    merged = merge_lora(model)
    assert jax.tree.structure(merged) == jax.tree.structure(plain(holding))
    # (W + BA) x and Wx + B(Ax) are rounded differently.
    np.testing.assert_allclose(logits(merged), logits(model), rtol=0, atol=5e-5)
    assert np.abs(logits(merged) - logits(plain(holding))).max() > 0.1

    save_merged(model, as_folder(plain(holding), tmp_path / "plain"), tmp_path / "merged")
    written, expected = load_file(tmp_path / "merged" / "model.safetensors"), tensors_by_name(merged)
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        # The product of the factors by XLA and by NumPy.
        np.testing.assert_allclose(written[name], tensor, rtol=0, atol=1e-6, err_msg=name)


def tensors_by_name(model: CausalLM) -> dict[str, np.ndarray]:
    """Of a model without adapters, as a checkpoint has them."""
    found: dict[str, np.ndarray] = {}
    arrays = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, hax.NamedArray))
    for parameter, array in zip(parameters_of(model), arrays, strict=True):
        ordered = array.rearrange((*parameter.stack_axes, *(axis for side in parameter.sides for axis in side)))
        tensors = np.asarray(ordered.array).reshape(len(parameter.names), *parameter.tensor_shape)
        found |= dict(zip(parameter.names, tensors, strict=True))
    return found


def parameters_of(model: CausalLM) -> list[Parameter]:
    found: list[Parameter] = []

    def remember(parameter: Parameter) -> Any:
        found.append(parameter)
        return jax.ShapeDtypeStruct((), np.float32)

    map_parameters(remember, model)
    return found


def as_folder(model: CausalLM, folder: Path) -> Path:
    """A checkpoint of the weights, with a config that nobody reads."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file(tensors_by_name(model), folder / "model.safetensors", metadata={"format": "pt"})
    return folder
