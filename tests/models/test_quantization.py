"""What quantized weights hold, compared with bitsandbytes, and that nothing but storage changes."""

import dataclasses
import functools
import math

import bitsandbytes.functional
import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from haliax import NamedArray
from tiny_pairs import (
    ADAPTERS,
    moved,
    named,
    packed,
    plain_sequences,
    random_pairs,
    response_log_probs,
    table_of,
    tiny_decoder,
)

from lora_dpo_jax.cost.flops import useful_flops
from lora_dpo_jax.data.shapes import choose_shapes
from lora_dpo_jax.generation import GenerationConfig, generate
from lora_dpo_jax.log_probs import score_responses
from lora_dpo_jax.lora import linear_layers, loraize, merge_lora, trainable_filter, unwrap_lora
from lora_dpo_jax.models import CausalLM, DecoderConfig
from lora_dpo_jax.models.quantization import (
    DYNAMIC_MAP,
    NF4,
    Int8Weight,
    Nf4Weight,
    QuantizedWeight,
    parameter_count,
    quantize,
    quantize_weight,
)

KINDS = ["nf4", "int8"]
PAIRS = table_of(random_pairs(8))
LAYOUT = choose_shapes([np.arange(8)], PAIRS.sizes, row_multiple=8).parts[0]
BATCH = packed(PAIRS, LAYOUT, rows=[[i] for i in range(8)])


def is_quantized(node) -> bool:
    return isinstance(node, QuantizedWeight)


@eqx.filter_jit
def dequantized(model):
    """The dense model of the same values."""
    return jax.tree.map(
        lambda node: node.astype(node.dtype) if is_quantized(node) else node, model, is_leaf=is_quantized
    )


@functools.cache
def quantized(kind: str, name: str = "llama") -> CausalLM:
    return eqx.filter_jit(quantize)(tiny_decoder(name), kind)


def adapted(kind: str, name: str = "llama") -> CausalLM:
    return loraize(quantized(kind, name), ADAPTERS["everywhere"], key=jax.random.key(2))


def random_weight(*sizes: int) -> NamedArray:
    values = np.random.default_rng(0).standard_t(5, sizes) * 0.02  # with outliers, as trained weights have
    return named(values.astype(np.float32), *["out", "in_outer", "in"][: len(sizes) - 1], "in_inner")


def unpacked(codes: NamedArray) -> np.ndarray:
    """uint8 [out, in], as two outputs share a byte."""
    pairs = np.stack([np.asarray(codes.array) >> 4, np.asarray(codes.array) & 15], axis=1)
    return pairs.reshape(-1, *pairs.shape[2:])


def by_bitsandbytes(weight: NamedArray):
    """(codes [out, in], state) of bitsandbytes' double quantization in blocks of 64."""
    flat = torch.tensor(np.asarray(weight.array).reshape(weight.axes[0].size, -1))
    two_inputs, state = bitsandbytes.functional.quantize_4bit(flat, quant_type="nf4", compress_statistics=True)
    two_inputs = two_inputs.numpy().ravel()
    return np.stack([two_inputs >> 4, two_inputs & 15], axis=1).reshape(flat.shape), state


# 4096 and 12288 weights have a whole number of groups of absmaxes, or less than one; 62720 has 980 absmaxes.
@pytest.mark.parametrize("shape", [(64, 64), (96, 128), (490, 128)])
def test_codes_are_those_of_bitsandbytes(shape):
    weight = random_weight(*shape)
    Out, In = weight.axes
    ours = quantize_weight(weight, In, Out, "nf4")
    codes, state = by_bitsandbytes(weight)
    np.testing.assert_array_equal(unpacked(ours.codes), codes)
    np.testing.assert_allclose(ours.mean.array, state.offset, rtol=1e-6)
    # Differences from the mean: they keep the mean's rounding error.
    np.testing.assert_allclose(ours.group_max.array, state.state2.absmax, atol=1e-7 * float(state.offset))

    their_map = state.state2.code.numpy()
    absmax = np.abs(np.asarray(weight.array).reshape(-1, 64)).max(axis=1) - float(state.offset)
    normalized = absmax / np.repeat(state.state2.absmax.numpy(), 256)[: len(absmax)]
    mine, theirs = np.asarray(ours.absmax.array).ravel(), state.absmax.numpy()
    nearest = np.abs(their_map[:, None] - normalized).min(axis=0)
    np.testing.assert_allclose(np.abs(their_map[mine] - normalized), nearest, atol=1e-6)
    # On a CPU bitsandbytes takes the second nearest value where two are about as near.
    assert np.mean(mine == theirs) > 0.95 and np.all(np.abs(mine.astype(int) - theirs) <= 1)


@pytest.mark.parametrize("shape", [(64, 64), (490, 128)])
def test_what_bitsandbytes_quantized_has_the_same_values_here(shape):
    weight = random_weight(*shape)
    Out, In = weight.axes
    codes, state = by_bitsandbytes(weight)
    shapes = quantize_weight(weight, In, Out, "nf4")
    ours = dataclasses.replace(
        shapes,
        codes=hax.named(jnp.asarray(codes[::2] << 4 | codes[1::2]), shapes.codes.axes),
        absmax=hax.named(jnp.asarray(state.absmax.numpy()).reshape(shapes.absmax.array.shape), shapes.absmax.axes),
        group_max=hax.named(jnp.asarray(state.state2.absmax.numpy()), shapes.group_max.axes),
        mean=hax.named(jnp.asarray(state.offset.numpy()), ()),
    )
    two_inputs = torch.tensor((codes[:, ::2] << 4 | codes[:, 1::2]).reshape(-1, 1))
    theirs = bitsandbytes.functional.dequantize_4bit(two_inputs, state).numpy()
    # The scale of a block is a float32 sum of its mean and a product.
    np.testing.assert_allclose(ours.astype(jnp.float32).array, theirs, rtol=1e-6)


def test_the_tables_are_those_of_bitsandbytes():
    np.testing.assert_array_equal(NF4, bitsandbytes.functional.get_4bit_type("nf4", device="cpu"))
    np.testing.assert_allclose(DYNAMIC_MAP, bitsandbytes.functional.create_dynamic_map(), rtol=2e-7)


def test_a_weight_differs_from_its_nf4_by_half_a_step_of_its_block():
    weight = random_weight(96, 128)
    Out, In = weight.axes
    quantized = quantize_weight(weight, In, Out, "nf4")
    values = np.asarray(weight.array).reshape(-1, 64)
    restored = np.asarray(quantized.astype(jnp.float32).array).reshape(-1, 64)
    absmax = np.abs(values).max(axis=1, keepdims=True)
    # A step of the table is at most 0.3; the absmax itself is off by up to half a step of the dynamic map.
    step = np.diff(NF4).max() / 2 * absmax
    off = np.abs(absmax - np.abs(absmax).mean()).max() * 0.9 / 2**6 / 2
    assert np.all(np.abs(restored - values) <= step + off + 1e-7)
    assert np.abs(restored - values).max() > 0.8 * step.min()


def test_a_weight_differs_from_its_int8_by_half_a_step_of_its_output():
    weight = random_weight(96, 128)
    Out, In = weight.axes
    quantized = quantize_weight(weight, In, Out, "int8")
    values, restored = np.asarray(weight.array), np.asarray(quantized.astype(jnp.float32).array)
    step = np.abs(values).max(axis=1, keepdims=True) / 127
    assert np.all(np.abs(restored - values) <= step / 2 * (1 + 1e-5))
    np.testing.assert_allclose(np.abs(restored).max(axis=1), np.abs(values).max(axis=1), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_that_of_the_whole_matrix(kind):
    weight = random_weight(96, 128)
    quantized = quantize_weight(weight, weight.axes[1], weight.axes[0], kind)
    difference = quantized.astype(jnp.float32).array - weight.array
    expected = np.linalg.norm(difference) / np.linalg.norm(weight.array)
    assert float(quantized.error.array) == pytest.approx(expected, rel=1e-5)
    assert {"nf4": 0.08, "int8": 0.005}[kind] < expected < {"nf4": 0.12, "int8": 0.02}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind):
    weight = random_weight(8, 128) * jnp.float32(0)
    restored = quantize_weight(weight, weight.axes[1], weight.axes[0], kind)
    assert not np.any(restored.astype(jnp.float32).array) and float(restored.error.array) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_of_a_stack_is_quantized_by_itself(kind):
    model = tiny_decoder("qwen")
    dense = {names[0]: linear for linear, names in linear_layers(model)}
    for linear, names in linear_layers(quantized(kind, "qwen")):
        if not is_quantized(linear.weight):
            continue
        whole = dense[names[0]].weight
        for layer in range(len(names)):
            one = eqx.filter_jit(quantize_weight)(whole["layers", layer], linear.In, linear.Out, kind)
            sliced = jax.tree.map(lambda leaf, layer=layer: leaf[layer], linear.weight)
            for mine, alone in zip(jax.tree.leaves(sliced), jax.tree.leaves(one), strict=True):
                np.testing.assert_allclose(mine, alone, rtol=1e-5)  # sums in another order


@pytest.mark.parametrize("kind, weight", [("nf4", Nf4Weight), ("int8", Int8Weight)])
def test_exactly_the_matrices_of_the_layers_are_quantized(kind, weight):
    model = quantized(kind)
    kinds = {names[0]: type(linear.weight) for linear, names in linear_layers(model)}
    assert kinds.pop("lm_head") is NamedArray
    assert len(kinds) == 7 and set(kinds.values()) == {weight}
    assert type(model.model.embed_tokens.weight) is NamedArray
    assert eqx.tree_equal(quantize(tiny_decoder(), "none"), tiny_decoder())
    assert parameter_count(model) == parameter_count(tiny_decoder())


@pytest.mark.parametrize(
    "shape, block, outer",
    [((6, 2, 3, 64), 64, "ab"), ((6, 2, 4, 16), 64, "a"), ((6, 3, 32), 32, "a"), ((6, 2, 24), 16, "")],
)
def test_blocks_follow_the_inputs_and_cross_outer_axes_only_where_they_must(shape, block, outer):
    weight = named(random_weight(math.prod(shape)).array.reshape(shape), "out", *"abc"[: len(shape) - 2], "inner")
    Out, *In = weight.axes
    quantized = quantize_weight(weight, tuple(In), Out, "nf4")
    absmax = np.abs(np.asarray(weight.array)).reshape(shape[0], -1, block).max(axis=2)
    restored = np.abs(np.asarray(quantized.astype(jnp.float32).array)).reshape(shape[0], -1, block).max(axis=2)
    np.testing.assert_allclose(restored, absmax, rtol=0.02)
    assert quantized.axes == weight.axes
    assert [axis.name for axis in quantized.absmax.axes] == ["out", *outer, "block"]


@pytest.mark.parametrize("shape", [(7, 64), (8, 63)])
def test_shapes_that_cannot_be_packed_are_errors(shape):
    weight = random_weight(*shape)
    with pytest.raises(ValueError, match=r"model\.quantization: nf4 packs two outputs in a byte.*use int8"):
        quantize_weight(weight, weight.axes[1], weight.axes[0], "nf4")


@pytest.mark.parametrize("kind, name", [("nf4", "llama_remat"), ("nf4", "qwen"), ("int8", "llama")])
def test_forward_and_gradients_are_those_of_the_dequantized_model(kind, name):
    model = moved(adapted(kind, name))
    micro = BATCH.micro_batch(0)

    @eqx.filter_jit
    def loss_and_gradients(model):
        adapters, weights = eqx.partition(model, trainable_filter(model))

        def loss(adapters):
            return hax.sum(score_responses(eqx.combine(adapters, weights), micro).log_probs).scalar()

        return jax.value_and_grad(loss)(adapters)

    loss, gradients = loss_and_gradients(model)
    expected, dense_gradients = loss_and_gradients(dequantized(model))
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    found, wanted = jax.tree.leaves(gradients), jax.tree.leaves(dense_gradients)
    assert len(found) == len(wanted) == 14 * len(model.model.layers.segments)
    for mine, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6 * np.abs(theirs).max())
        assert np.any(mine)


def test_an_nf4_weight_takes_0_516_bytes():
    weight = random_weight(512, 4096)
    quantized = quantize_weight(weight, weight.axes[1], weight.axes[0], "nf4")
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(quantized))
    # 4 bits, a byte for 64 weights, a float32 for 64 * 256; the mean and the error of the matrix are two numbers.
    assert num_bytes == weight.size / 2 + weight.size / 64 + 4 * weight.size / (64 * 256) + 8
    assert round(num_bytes / weight.size, 3) == 0.516


def test_llama_3_1_8b_takes_less_than_5_8_gb():
    config = DecoderConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
    )

    def held(key):
        model = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), CausalLM.init(config, key=key))
        return quantize(model, "nf4")

    model = eqx.filter_eval_shape(held, jax.random.key(0))
    assert parameter_count(model) == 8_030_261_248  # that of the checkpoint on the hub
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model)) < 5.8e9


def test_the_reference_is_the_quantized_base_and_new_adapters_change_nothing():
    base, model = quantized("nf4", "llama"), adapted("nf4")
    assert {id(leaf) for leaf in jax.tree.leaves(unwrap_lora(model))} == {id(leaf) for leaf in jax.tree.leaves(base)}
    tokens, is_response = plain_sequences(random_pairs(8).examples)
    policy, reference = (response_log_probs(m, tokens, is_response) for m in (model, unwrap_lora(model)))
    np.testing.assert_array_equal(policy, reference)
    assert np.abs(policy - response_log_probs(tiny_decoder(), tokens, is_response)).max() > 0.1


def named_axes(model):
    """Of each array, in whatever order it holds them."""
    return [set(leaf.axes) for leaf in jax.tree.leaves(model, is_leaf=lambda leaf: isinstance(leaf, NamedArray))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_is_dense_and_computes_what_the_adapted_one_does(kind):
    model = moved(adapted(kind))
    merged = merge_lora(model)
    assert named_axes(merged) == named_axes(tiny_decoder())
    tokens, is_response = plain_sequences(random_pairs(8).examples)
    np.testing.assert_allclose(
        response_log_probs(merged, tokens, is_response), response_log_probs(model, tokens, is_response), rtol=1e-5
    )


def test_completions_are_those_of_the_dequantized_model():
    model = moved(adapted("nf4"), size=0.3)
    prompts = [[1, 2, 3], [4, 5, 6, 7]]
    config = GenerationConfig(max_new_tokens=6)
    completions = generate(model, prompts, config, stop_ids=())
    assert completions == generate(dequantized(model), prompts, config, stop_ids=())
    assert [len(tokens) for tokens in completions] == [6, 6]


def test_flops_count_weights_and_not_their_storage():
    found = useful_flops(adapted("nf4"), BATCH, with_reference=True)
    dense = useful_flops(dequantized(adapted("nf4")), BATCH, with_reference=True)
    assert float(found) == float(dense)
