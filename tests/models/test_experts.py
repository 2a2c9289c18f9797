"""Experts are the sum that their definition says, on any mesh, with adapters, in few bits, and whatever pads a row."""

import dataclasses
import functools
import json
import math
from typing import Any

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from haliax import Axis, NamedArray
from haliax.axis import ensure_tuple
from safetensors.numpy import load_file
from tiny_models import FAMILIES, load, random_tokens, tiny_folder, tiny_model, torch_logits, with_random_adapters
from tiny_models import logits as logits_of
from tiny_pairs import LLAMA, moved, packed, random_pairs, table_of
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from lora_dpo_jax.data.shapes import PartShape
from lora_dpo_jax.huggingface.weights import load_model, read_config, save_merged
from lora_dpo_jax.lora import LoraConfig, LoraLinear, linear_layers, loraize, trainable_filter, unwrapped
from lora_dpo_jax.losses import Dpo
from lora_dpo_jax.models import CausalLM, ComputeConfig, PackedMask
from lora_dpo_jax.models.config import ExpertsConfig
from lora_dpo_jax.models.experts import BALANCE, Experts, Sorting, grouped_product
from lora_dpo_jax.models.gates import ClampedGate
from lora_dpo_jax.models.linear import linear
from lora_dpo_jax.models.quantization import QuantizedWeight, quantize, quantize_weight
from lora_dpo_jax.preference_objective import PreferenceObjective
from lora_dpo_jax.sharding import MeshConfig, Placement

CONFIG = dataclasses.replace(
    LLAMA, experts=ExpertsConfig(num_experts=4, per_token=2, intermediate_size=16), expert_layers=(True, False)
)
GATE = ClampedGate(alpha=1.7, limit=0.3)  # low enough that some values are clamped
LIKE_GPT_OSS = dict(gathered=True, is_interleaved=True, has_biases=True, clamped_gate=GATE, normalizes=True)
CONFIGS = {
    "apart": CONFIG,
    "gathered": dataclasses.replace(CONFIG, experts=dataclasses.replace(CONFIG.experts, **LIKE_GPT_OSS)),
}
LORA = {
    "apart": LoraConfig(r=3, alpha=6.0),
    "gathered": LoraConfig(r=3, alpha=6.0, target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
}
kinds = pytest.mark.parametrize("kind", CONFIGS)
Row, Pos = Axis("row", 4), Axis("position", 16)
TOKENS = hax.named(np.random.default_rng(1).integers(0, LLAMA.vocab_size, (4, 16), dtype=np.int32), (Row, Pos))
REAL = hax.named(np.arange(16) < np.array([[16], [9], [13], [1]]), (Row, Pos))  # the rest is padding
MASK = dataclasses.replace(PackedMask.causal(Row, Pos), segment_ids=REAL.astype(jnp.int32))


class Plain(eqx.Module):
    """What experts are: all of them compute all tokens, and each token takes those that are its likeliest."""

    experts: Experts

    def __call__(self, x, segments, *, key=None):
        del segments, key
        tokens, router = x.rearrange(("row", "position", "embed")).array, self.experts.gate
        logits = jnp.einsum("rpi,ei->rpe", tokens, router.weight.array)
        if router.config.gathered:
            of_all, logits = _clamped(self.experts.experts, tokens), logits + router.bias.array
        else:
            of_all = _silu(self.experts.experts.stacked, tokens)
        probabilities = jax.nn.softmax(logits)
        least = jnp.sort(probabilities, axis=-1)[..., -router.config.per_token, None]
        weights = jnp.where(probabilities >= least, probabilities, 0.0)
        if router.config.normalizes:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        return NamedArray(jnp.einsum("rpe,rpeo->rpo", weights, of_all), ("row", "position", "embed")), {}


def _silu(expert: Any, tokens: jax.Array) -> jax.Array:
    """What each expert makes of each token, [row, position, expert, embed]."""
    gate, up, down = (_matrices(layer) for layer in (expert.gate_proj, expert.up_proj, expert.down_proj))
    inner = jax.nn.silu(jnp.einsum("rpi,eoi->rpeo", tokens, gate)) * jnp.einsum("rpi,eoi->rpeo", tokens, up)
    return jnp.einsum("rpei,eoi->rpeo", inner, down)


def _clamped(expert: Any, tokens: jax.Array) -> jax.Array:
    """The same with biases and a clamped gate, where rows are gate, up, gate, up, ..."""
    biases = [unwrapped(layer).bias.array for layer in (expert.gate_up_proj, expert.down_proj)]
    both = jnp.einsum("rpi,eoi->rpeo", tokens, _matrices(expert.gate_up_proj)) + biases[0].reshape(4, -1)
    gate, up = jnp.minimum(both[..., 0::2], GATE.limit), jnp.clip(both[..., 1::2], -GATE.limit, GATE.limit)
    inner = gate * jax.nn.sigmoid(GATE.alpha * gate) * (up + 1)
    return jnp.einsum("rpei,eoi->rpeo", inner, _matrices(expert.down_proj)) + biases[1]


def _matrices(layer: Any) -> jax.Array:
    """[expert, out, in], with the adapter folded in."""
    plain = unwrapped(layer)
    order = ("expert", *(axis.name for side in (plain.Out, plain.In) for axis in ensure_tuple(side)))
    weight = plain.weight.astype(jnp.float32).rearrange(order).array
    weight = weight.reshape(4, -1, weight.shape[-1])
    if not isinstance(layer, LoraLinear):
        return weight
    B = layer.lora_B.rearrange((*order[:-1], "lora_rank")).array.reshape(4, -1, layer.rank)
    return weight + layer.scaling * jnp.einsum("eor,eri->eoi", B, layer.lora_A.array)


def plainly(model: CausalLM) -> CausalLM:
    segments = [
        eqx.tree_at(lambda s: s.stacked.layers, segment, tuple(_plain_layer(layer) for layer in segment.stacked.layers))
        for segment in model.model.layers.segments
    ]
    return eqx.tree_at(lambda model: model.model.layers.segments, model, tuple(segments))


def _plain_layer(layer: Any) -> Any:
    return eqx.tree_at(lambda layer: layer.mlp, layer, Plain(layer.mlp)) if isinstance(layer.mlp, Experts) else layer


@functools.cache
def adapted(kind: str = "apart") -> CausalLM:
    @eqx.filter_jit
    def make() -> CausalLM:
        model = CausalLM.init(CONFIGS[kind], ComputeConfig(attention="dense"), key=jax.random.key(0))
        return loraize(_with_random_biases(model), LORA[kind], key=jax.random.key(1))

    return moved(make())


@eqx.filter_jit
def logits_and_gradients(model: CausalLM, view) -> tuple[jax.Array, Any]:
    """Logits of real tokens, and gradients of the adapters, of the model as `view` sees it."""
    adapters, weights = eqx.partition(model, trainable_filter(model))

    def loss(adapters):
        found = view(eqx.combine(adapters, weights))(TOKENS, MASK.position_ids, MASK)
        found = hax.where(REAL, found, 0.0).rearrange(("row", "position", "vocab")).array
        return jnp.sum(jax.nn.log_softmax(found) ** 2 * REAL.array[..., None]) / 1e3, found

    gradients, found = jax.grad(loss, has_aux=True)(adapters)
    return found, gradients


def _with_random_biases(model: CausalLM) -> CausalLM:
    def randomize(path: tuple, array: jax.Array) -> jax.Array:
        is_bias = any(getattr(entry, "name", None) == "bias" for entry in path)
        return jax.random.normal(jax.random.key(2), array.shape) if is_bias else array

    return jax.tree_util.tree_map_with_path(randomize, model)


@functools.cache
def expected(kind: str = "apart") -> Any:
    return logits_and_gradients(adapted(kind), plainly)


def assert_close(found: Any, expected: Any, **tolerance) -> None:
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, **tolerance)


@kinds
def test_logits_and_gradients_are_those_of_all_experts_computed_for_all_tokens(kind):
    assert_close(logits_and_gradients(adapted(kind), lambda model: model), expected(kind), rtol=1e-4, atol=1e-5)
    of_experts = {"apart": 3, "gathered": 2}[kind]
    assert len(jax.tree.leaves(expected(kind)[1])) == 2 * (2 * 4 + of_experts + 3)  # every linear layer, but no router
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(expected(kind)[1])) > 1e-4


@pytest.mark.parametrize(
    "kind, axes",
    [("apart", {"data": 4}), ("apart", {"data": 2, "model": 2}), ("gathered", {"data": 4, "model": 2})],
    ids=str,
)
def test_a_mesh_changes_nothing(kind, axes):
    placement = Placement(MeshConfig(axes=axes), jax.devices()[: math.prod(axes.values())])
    with placement.scope():
        found = logits_and_gradients(placement.put_parameters(adapted(kind)), lambda model: model)
    assert_close(found, expected(kind), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kind, Out",
    [("nf4", (Axis("mlp", 8),)), ("int8", (Axis("mlp", 8),)), ("nf4", (Axis("mlp", 8), Axis("gate_up", 2)))],
    ids=str,
)
def test_quantized_experts_compute_with_the_values_that_they_hold(kind, Out):
    """Forward, and backward to the inputs. Gates come before up-projections in what is computed."""
    Expert, In = Axis("expert", 4), Axis("embed", 16)

    @jax.jit
    def run(x):
        weight = hax.random.normal(jax.random.key(0), (Expert, *Out, In))
        layer = dataclasses.replace(linear(In, Out, key=jax.random.key(0), use_bias=False), weight=weight)
        layer = dataclasses.replace(layer, weight=quantize_weight(weight, In, Out, kind))
        sorting = Sorting.by_expert(jnp.arange(24).reshape(3, 4, 2) % 4, Axis("row", 3), 4)
        out, pullback = jax.vjp(lambda x: grouped_product(layer, x, sorting), x)
        values = layer.weight.astype(jnp.float32)
        dense = values.rearrange((Expert, *reversed(Out), In)).array.reshape(4, -1, 16)
        expected, dense_pullback = jax.vjp(lambda x: jnp.einsum("gpi,goi->gpo", x.reshape(4, 6, 16), dense), x)
        error = jnp.abs(values.array - weight.array).max()
        return error, (out, pullback(out)), (expected.reshape(out.shape), dense_pullback(expected))

    error, found, expected = run(np.random.default_rng(0).normal(size=(24, 16)).astype(np.float32))
    assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert error > 1e-3


def test_the_matrices_of_experts_are_quantized_and_no_router():
    model = eqx.filter_eval_shape(lambda model: quantize(model, "nf4"), adapted())
    held = [unwrapped(layer).weight for layer, names in linear_layers(model) if "experts" in names[0]]
    assert len(held) == 3 and all(isinstance(weight, QuantizedWeight) for weight in held)
    assert model.model.layers.segments[0].stacked.layers[0].mlp.gate.weight.dtype == jnp.float32


def test_padding_reaches_no_expert():
    experts = adapted().model.layers.segments[0].stacked.layers[0].mlp
    router = dataclasses.replace(experts.gate, weight=experts.gate.weight["layers", 0])
    x = hax.random.normal(jax.random.key(0), (Row, Pos, CONFIG.Embed))
    chosen, weights, _ = router(x, MASK.segment_ids)
    sorting = Sorting.by_expert(chosen, Row, 4)
    assert sorting.sizes.sum() == 2 * REAL.array.sum() and (chosen[~REAL.array] == 4).all()
    assert (weights[~REAL.array] == 0).all() and (weights[REAL.array] > 0).all()
    assert (sorting.expert[sorting.sizes.sum() :] == 4).all()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_tensors_of_all_experts_in_one_are_the_same_model_and_stay_so_in_an_export(family, tmp_path):
    """As transformers 5 holds them, and writes them if it is asked not to write those of transformers 4."""
    tiny_model(family).save_pretrained(tmp_path / "fused", save_original_format=False)
    names = load_file(tmp_path / "fused" / "model.safetensors").keys()
    assert "model.layers.1.mlp.experts.gate_up_proj" in names
    apart, fused = load(tiny_folder(family)), load(tmp_path / "fused")
    for mine, theirs in zip(jax.tree.leaves(fused), jax.tree.leaves(apart), strict=True):
        np.testing.assert_array_equal(mine, theirs)

    model = with_random_adapters(fused, LoraConfig(r=4, alpha=4.0))
    save_merged(model, tmp_path / "fused", tmp_path / "merged")
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == names
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32").eval()
    tokens = random_tokens(1, 12)
    np.testing.assert_allclose(logits_of(model, tokens), torch_logits(merged, tokens), rtol=0, atol=1e-4)


def test_the_auxiliary_loss_is_that_of_transformers_for_each_example_and_layer():
    """Of one example; transformers multiplies the sums over all layers, so it is given one layer at a time."""
    family, tokens = "mixtral", random_tokens(1, 12)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder(family), dtype="float32").eval()
    with torch.no_grad():
        output = theirs(torch.tensor(tokens, dtype=torch.long), output_router_logits=True, use_cache=False)
    expected = np.mean([load_balancing_loss_func((of_layer,), 4, 2).item() for of_layer in output.router_logits])

    config = read_config(tiny_folder(family))
    config = dataclasses.replace(config, experts=dataclasses.replace(config.experts, reports_balance=True))
    model = load_model(tiny_folder(family), config, dtype=jnp.float32, compute=ComputeConfig(attention="dense"))
    # Two rows, of the example alone and beside another one: it says the same in both.
    rows = np.stack([np.pad(tokens[0], (0, 12)), np.concatenate([random_tokens(12, seed=1), tokens[0]])])
    axes = Axis("row", 2), Axis("position", 24)
    segments = hax.named(np.array([[1] * 12 + [0] * 12, [1] * 12 + [2] * 12]), axes)
    positions = hax.named(np.tile(np.arange(12), (2, 2)), axes)
    mask = PackedMask(segments, hax.zeros(axes, jnp.int32), positions)
    output = eqx.filter_jit(lambda model: model.model(hax.named(rows, axes), positions, mask))(model)
    found = output.auxiliary[BALANCE].array
    np.testing.assert_allclose([found[0, 0], found[1, 1]], expected, rtol=1e-5)
    assert (found[0, 1:] == 0).all() and abs(found[1, 0] - expected) > 1e-3


def test_the_auxiliary_loss_is_added_by_its_weight():
    config = dataclasses.replace(CONFIG, experts=dataclasses.replace(CONFIG.experts, reports_balance=True))
    model = CausalLM.init(config, ComputeConfig(attention="dense"), key=jax.random.key(0))
    pairs = table_of(random_pairs(4))
    batch = packed(pairs, PartShape.of_pairs(1, 1, row_length=160, targets=128, pairs=4)).micro_batch(0)
    lone, both = (
        eqx.filter_jit(PreferenceObjective(Dpo(reference_free=True), router_aux_loss_coef=coefficient))(
            model, None, batch
        )
        for coefficient in (0.0, 0.5)
    )
    added = (both.loss - lone.loss).array
    assert (added >= 0.5 * config.experts.per_token * 0.5).all()  # even routing is per_token
    np.testing.assert_allclose(added.sum(), 0.5 * both.metrics["router_aux_loss"].total, rtol=1e-5)
    assert "router_aux_loss" not in lone.metrics


def test_a_mixture_of_dense_layers_and_experts_is_read():
    config = json.loads(FAMILIES["qwen3_moe_dense"].to_json_string(use_diff=False))
    assert config["mlp_only_layers"] == [0]
    model = load(tiny_folder("qwen3_moe_dense"))
    assert model.config.expert_layers == (False, True, True)


@pytest.mark.parametrize(
    "settings, named",
    [({"use_dora": True}, "lora.use_dora=true"), *(({"a_init": a}, f"lora.a_init={a}") for a in ("pissa", "eva"))],
)
def test_experts_with_an_adapter_that_they_cannot_compute_are_refused_before_anything_is_traced(settings, named):
    model = CausalLM.init(CONFIG, ComputeConfig(attention="dense"), key=jax.random.key(0))
    with pytest.raises(ValueError, match=f"{named} is not there for experts, such as model.layers"):
        loraize(model, LoraConfig(r=2, **settings), key=jax.random.key(1))
