"""DoRA, as PEFT computes and trains it."""

import copy
import functools
import warnings

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from lora_dpo_jax.lora import DoraLinear, LoraConfig, loraize, merge_lora, trainable_filter
from lora_dpo_jax.lora import dora_linear as dora_module

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

In, Out, Token = hax.make_axes(In=8, Out=6, token=5)
CONFIG = LoraConfig(r=3, alpha=6.0, use_dora=True, target_modules=None)
RNG = np.random.default_rng(0)
WEIGHT, BIAS, X = (RNG.normal(size=shape).astype(np.float32) for shape in ((6, 8), (6,), (5, 8)))
MASK = ((RNG.random((5, 8)) < 0.6) / 0.6).astype(np.float32)


class One(eqx.Module):
    """A model of one layer."""

    proj: eqx.Module

    def __call__(self, x, key=None):
        return self.proj(x, key=key) if isinstance(self.proj, DoraLinear) else self.proj(x)


def new_model(dtype=jnp.float32, **settings) -> One:
    weight, bias = hax.named(jnp.asarray(WEIGHT, dtype), (Out, In)), hax.named(jnp.asarray(BIAS, dtype), (Out,))
    config = LoraConfig(r=3, alpha=6.0, use_dora=True, **settings)
    return loraize(One(hnn.Linear(weight, bias, In, Out)), config, key=jax.random.key(0))


def torch_model(ours: One, dropout: float = 0.0) -> peft.PeftModel:
    """PEFT's layer with the same weights and factors."""
    base = torch.nn.Sequential(torch.nn.Linear(8, 6))
    base[0].weight.data, base[0].bias.data = torch.tensor(WEIGHT), torch.tensor(BIAS)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=["0"], lora_dropout=dropout)
    )
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight.data = torch.tensor(np.array(ours.proj.lora_A.array))
    layer.lora_B["default"].weight.data = torch.tensor(np.array(ours.proj.lora_B.array))
    layer.lora_magnitude_vector["default"].weight.data = torch.tensor(np.array(ours.proj.lora_magnitude_vector.array))
    return model


def moved_model(**settings) -> One:
    model, rng = new_model(**settings), np.random.default_rng(1)
    move = lambda leaf: leaf + jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32)  # noqa: E731
    adapters, weights = eqx.partition(model, trainable_filter(model))
    return eqx.combine(jax.tree.map(move, adapters), weights)


def x_named(values=X):
    return hax.named(jnp.asarray(values), (Token, In))


def test_a_new_adapter_changes_nothing_to_the_bit():
    for dtype in (jnp.float32, jnp.bfloat16):
        model = new_model(dtype)
        rounded = jax.tree.map(
            lambda leaf, trained: leaf.astype(jnp.bfloat16) if trained else leaf, model, trainable_filter(model)
        )
        x = x_named().astype(dtype)
        for adapted in (model, rounded):  # adapters in float32, and in bfloat16, which no norm fits into
            found, plain = eqx.filter_jit(lambda m, x: (m(x), m.proj.wrapped(x)))(adapted, x)
            np.testing.assert_array_equal(found.array, plain.array)
            assert adapted.proj.adds_nothing()
    assert not moved_model().proj.adds_nothing()


def test_the_magnitude_starts_as_the_norm_of_each_row():
    model = new_model()
    np.testing.assert_allclose(model.proj.lora_magnitude_vector.array, np.linalg.norm(WEIGHT, axis=1), rtol=1e-6)
    fresh = torch_model(model)
    peft_start = peft.get_peft_model(
        copy.deepcopy(fresh.unload()), peft.LoraConfig(r=3, use_dora=True, target_modules=["0"])
    )
    theirs = peft_start.base_model.model[0].lora_magnitude_vector["default"].weight
    np.testing.assert_allclose(model.proj.lora_magnitude_vector.array, theirs.detach().numpy(), rtol=1e-6)


@pytest.mark.parametrize("with_dropout", [False, True])
def test_outputs_and_gradients_are_those_of_peft(with_dropout, monkeypatch):
    """With dropout, both see the same mask."""
    monkeypatch.setattr(dora_module, "dropout", lambda x, rate, key: x * hax.named(jnp.asarray(MASK), x.axes))
    rate = 0.4 if with_dropout else 0.0
    ours = moved_model(dropout=rate)
    theirs = torch_model(ours, rate).train()
    layer = theirs.base_model.model[0]
    if with_dropout:
        layer.lora_dropout["default"].forward = lambda x: x * torch.tensor(MASK)
    x = torch.tensor(X, requires_grad=True)
    expected = theirs(x)
    expected.pow(2).sum().backward()

    @jax.jit
    def grads(adapters, x):
        def loss(adapters, x):
            y = eqx.combine(adapters, weights)(x, key=jax.random.key(0))
            return hax.sum(y * y).scalar(), y

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(adapters, x)

    adapters, weights = eqx.partition(ours, trainable_filter(ours))
    (gradients, d_x), y = grads(adapters, x_named())
    np.testing.assert_allclose(y.array, expected.detach().numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(d_x.array, x.grad.numpy(), rtol=0, atol=1e-4)
    for mine, parameter in (
        (gradients.proj.lora_A, layer.lora_A["default"].weight),
        (gradients.proj.lora_B, layer.lora_B["default"].weight),
        (gradients.proj.lora_magnitude_vector, layer.lora_magnitude_vector["default"].weight),
    ):
        np.testing.assert_allclose(mine.array, parameter.grad.numpy(), rtol=1e-4, atol=1e-4)


def test_two_steps_are_those_of_peft():
    ours = new_model()
    theirs = torch_model(ours)
    parameters = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (theirs(torch.tensor(X)) - 1.0).pow(2).sum().backward()
        optimizer.step()

    adapters, weights = eqx.partition(ours, trainable_filter(ours))
    adamw = optax.adamw(0.05, weight_decay=0.1)

    @jax.jit
    def step(adapters, state):
        loss = lambda adapters: hax.sum((eqx.combine(adapters, weights)(x_named()) - 1.0) ** 2).scalar()  # noqa: E731
        updates, state = adamw.update(jax.grad(loss)(adapters), state, adapters)
        return optax.apply_updates(adapters, updates), state

    state = adamw.init(adapters)
    for _ in range(2):
        adapters, state = step(adapters, state)
    layer = theirs.base_model.model[0]
    for mine, parameter in (
        (adapters.proj.lora_A, layer.lora_A["default"].weight),
        (adapters.proj.lora_B, layer.lora_B["default"].weight),
        (adapters.proj.lora_magnitude_vector, layer.lora_magnitude_vector["default"].weight),
    ):
        np.testing.assert_allclose(mine.array, parameter.detach().numpy(), rtol=0, atol=2e-6)


def test_merged_is_what_peft_merges():
    ours = moved_model()
    theirs = torch_model(ours).merge_and_unload()
    merged = functools.reduce(getattr, ("proj", "weight", "array"), merge_lora(ours))
    np.testing.assert_allclose(merged, theirs[0].weight.detach().numpy(), rtol=0, atol=1e-6)


def test_a_row_of_zeros_stays_finite():
    model = new_model()
    weight = model.proj.wrapped.weight.array.at[2].set(0.0)
    plain = One(hnn.Linear(hax.named(weight, (Out, In)), None, In, Out))
    adapted = loraize(plain, CONFIG, key=jax.random.key(0))
    np.testing.assert_array_equal(adapted(x_named()).array, plain(x_named()).array)
    assert np.isfinite(merge_lora(adapted).proj.weight.array).all()
