"""LoRA's adapter of one layer: how its factors are drawn, what it computes and what it merges to."""

import dataclasses
import functools

import haliax as hax
import haliax.nn as hnn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_pairs import ADAPTERS, LLAMA, adapters_of, new_adapters, tiny_decoder

from lora_dpo_jax.lora import LoraLinear, apply_all, lora_linear, loraize

LORA = ADAPTERS["everywhere"]


def test_factors_are_drawn_as_peft_draws_them():
    torch.manual_seed(0)
    A = adapters_of(new_adapters())
    for path, value in A.items():
        if path.endswith("lora_B"):
            continue
        fan_in = LLAMA.intermediate_size if "down_proj" in path else LLAMA.hidden_size
        bound = fan_in**-0.5
        theirs = torch.empty(value.reshape(-1, fan_in).shape)
        torch.nn.init.kaiming_uniform_(theirs, a=5**0.5)
        assert value.dtype == np.float32
        assert 0.95 * bound < np.abs(value).max() <= bound and theirs.abs().max() <= bound
        np.testing.assert_allclose(value.std(), theirs.std(), rtol=0.15)
        assert not np.array_equal(value[0], value[1]), "each layer of a stack has its own factors"


def test_factors_of_different_layers_and_keys_differ():
    one = adapters_of(new_adapters())
    attention = [value for path, value in one.items() if path.endswith(("k_proj.lora_A", "v_proj.lora_A"))]
    assert not np.array_equal(*attention)
    again = adapters_of(loraize(tiny_decoder(), LORA, key=jax.random.key(2)))
    other = adapters_of(loraize(tiny_decoder(), LORA, key=jax.random.key(5)))
    for path, value in one.items():
        np.testing.assert_array_equal(again[path], value)
        assert path.endswith("lora_B") or not np.array_equal(other[path], value)


def one_layer(dropout: float) -> tuple[LoraLinear, hax.NamedArray]:
    In, Out, Rank, Token = hax.make_axes(In=8, Out=5, lora_rank=2, token=3)
    keys = jax.random.split(jax.random.key(0), 5)
    weight, bias, A, B, x = (
        hax.random.normal(key, axes)
        for key, axes in zip(keys, ((Out, In), (Out,), (Rank, In), (Out, Rank), (Token, In)), strict=True)
    )
    return LoraLinear(hnn.Linear(weight, bias, In, Out), A, B, scaling=0.5, dropout=dropout), x


def test_without_a_key_there_is_no_dropout():
    layer, x = one_layer(dropout=0.5)
    np.testing.assert_array_equal(layer(x).array, dataclasses.replace(layer, dropout=0.0)(x).array)
    exact = x.array @ (layer.wrapped.weight.array + 0.5 * layer.lora_B.array @ layer.lora_A.array).T
    np.testing.assert_allclose(layer(x).array, exact + layer.wrapped.bias.array, rtol=1e-4, atol=1e-5)


def test_dropout_is_on_the_adapters_input_alone_and_unbiased():
    layer, x = one_layer(dropout=0.4)
    keys = jax.random.split(jax.random.key(1), 4096)
    samples = np.asarray(jax.jit(jax.vmap(lambda key: layer(x, key=key).array))(keys))
    error = samples.std(axis=0) / np.sqrt(len(keys))
    assert np.all(error > 0)
    assert np.all(np.abs(samples.mean(axis=0) - layer(x).array) < 5 * error)

    silent = dataclasses.replace(layer, lora_B=hax.zeros_like(layer.lora_B))
    np.testing.assert_array_equal(silent(x, key=keys[0]).array, layer.wrapped(x).array)


def test_merging_rounds_once_to_the_dtype_of_the_weight():
    In, Out, Rank = hax.make_axes(In=16, Out=24, lora_rank=4)
    rng = np.random.default_rng(0)
    weight = hax.named(jnp.asarray(rng.normal(size=(24, 16)), jnp.bfloat16), (Out, In))
    A, B = (hax.named(jnp.asarray(rng.normal(0, 0.1, (a.size, b.size)), jnp.float32), (a, b))
            for a, b in ((Rank, In), (Out, Rank)))  # fmt: skip
    merged = LoraLinear(hnn.Linear(weight, None, In, Out), A, B, scaling=0.5).merged()
    exact = weight.astype(jnp.float32).array + 0.5 * jnp.dot(B.array, A.array, precision="highest")
    assert merged.weight.dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged.weight.array, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("in_inputs", [True, False])
def test_a_stack_outside_a_scan_computes_what_its_slices_do(in_inputs):
    """With gradients. The inputs have the axis of the stack, or are the same for each of its layers."""
    Expert, In, Out, Rank, Token = hax.make_axes(expert=3, In=8, Out=5, lora_rank=2, token=4)
    keys = jax.random.split(jax.random.key(0), 5)
    weight, A, B, x, d_out = (
        hax.random.normal(key, axes)
        for key, axes in zip(
            keys,
            (
                (Expert, Out, In),
                (Expert, Rank, In),
                (Expert, Out, Rank),
                (Token, Expert, In) if in_inputs else (Token, In),
                (Token, Expert, Out),
            ),
            strict=True,
        )
    )

    def whole(x, A, B):
        y = LoraLinear(hnn.Linear(weight, None, In, Out), A, B, scaling=0.5)(x)
        return hax.sum(y * d_out).scalar(), y

    def one_by_one(x, A, B):
        ys = []
        for i in range(Expert.size):
            layer = LoraLinear(hnn.Linear(weight["expert", i], None, In, Out), A["expert", i], B["expert", i], 0.5)
            ys.append(layer(x["expert", i] if in_inputs else x))
        y = hax.stack(Expert, ys)
        return hax.sum(y * d_out).scalar(), y

    gradients, y = jax.grad(whole, argnums=(0, 1, 2), has_aux=True)(x, A, B)
    expected_gradients, expected = jax.grad(one_by_one, argnums=(0, 1, 2), has_aux=True)(x, A, B)
    # Float32 sums of a few dozen terms of about one, in another order.
    np.testing.assert_allclose(y.array, expected.rearrange(y.axes).array, rtol=1e-5, atol=1e-5)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert gradient.axes == expected.axes
        np.testing.assert_allclose(gradient.array, expected.array, rtol=1e-4, atol=1e-4)


def layers_with_one_input() -> tuple[list[LoraLinear], hax.NamedArray]:
    In, Token = hax.make_axes(In=8, token=3)
    random = functools.partial(hax.random.normal, jax.random.key(3))
    layers = []
    for size, rank in ((5, 2), (4, 2), (5, 3)):
        Out, Rank = hax.make_axes(Out=size, lora_rank=rank)
        wrapped = hnn.Linear(random((Out, In)), random((Out,)), In, Out)
        layers.append(LoraLinear(wrapped, random((Rank, In)), random((Out, Rank)), scaling=0.5 * rank, dropout=0.5))
    return layers, random((Token, In))


@pytest.mark.parametrize("keys", [(None, None, None), (None, jax.random.key(7), None)], ids=["plain", "dropout"])
def test_adapters_of_one_input_compute_the_same_together(monkeypatch, keys):
    layers, x = layers_with_one_input()

    def loss(layers, x):
        outs = list(apply_all(layers, x, keys))
        return sum(hax.sum(hax.sin(out)).scalar() for out in outs), outs

    def lowered():
        # A new function each time, which JAX traces again.
        return jax.jit(jax.value_and_grad(lambda *args: loss(*args), argnums=(0, 1), has_aux=True)).lower(layers, x)

    alone = lowered()
    monkeypatch.setattr(lora_linear, "platform", lambda: "gpu")
    together = lowered()
    saved = sum(key is None for key in keys) - 1
    assert alone.as_text().count("dot_general") - together.as_text().count("dot_general") == 3 * saved
    for mine, theirs in zip(*(jax.tree.leaves(each.compile()(layers, x)) for each in (together, alone)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
