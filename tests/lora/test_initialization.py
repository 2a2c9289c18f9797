"""What new adapters start from; PEFT, live, says what that is."""

import copy
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

from lora_dpo_jax.lora import (
    LoraConfig,
    LoraLinear,
    constant_filter,
    loraize,
    merge_lora,
    trainable_filter,
    unwrap_lora,
)
from lora_dpo_jax.models.quantization import quantize_weight
from lora_dpo_jax.training.step import TrainState

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

In, Out, Token = hax.make_axes(In=12, Out=8, token=5)
RNG = np.random.default_rng(0)
WEIGHT, X = (RNG.normal(size=shape).astype(np.float32) for shape in ((8, 12), (5, 12)))
X_NAMED = hax.named(jnp.asarray(X), (Token, In))
STARTS = ("orthogonal", "pissa", "olora")


class One(eqx.Module):
    """A model of one layer."""

    proj: eqx.Module

    def __call__(self, x, key=None):
        return self.proj(x, key=key)


def new_model(dtype=jnp.float32, **settings) -> One:
    weight = hax.named(jnp.asarray(WEIGHT, dtype), (Out, In))
    config = LoraConfig(**dict(r=4, alpha=6.0) | settings)
    return loraize(One(hnn.Linear(weight, None, In, Out)), config, key=jax.random.key(0))


def torch_model(a_init: str, **settings) -> peft.PeftModel:
    base = torch.nn.Sequential(torch.nn.Linear(12, 8, bias=False))
    base[0].weight.data = torch.tensor(WEIGHT)
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=a_init, target_modules=["0"], **settings)
    return peft.get_peft_model(base, config)


def product(A, B) -> np.ndarray:
    return np.asarray(B, np.float64) @ np.asarray(A, np.float64)


@pytest.mark.parametrize("a_init", ["gaussian", *STARTS])
def test_a_new_adapter_changes_nothing_to_the_bit(a_init):
    """Adapters in float32 and in bfloat16, to which no factor of a weight can be rounded without loss."""

    @eqx.filter_jit
    def outputs(model, x):
        adapters, weights = eqx.partition(model, trainable_filter(model))
        model = eqx.combine(jax.tree.map(lambda leaf: leaf.astype(x.dtype), adapters), weights)
        return model(x, key=jax.random.key(1)), unwrap_lora(model)(x), model.proj.adds_nothing()

    for dtype, rate in ((jnp.float32, 0.0), (jnp.bfloat16, 0.5)):
        adapted, plain, adds_nothing = outputs(new_model(dtype, a_init=a_init, dropout=rate), X_NAMED.astype(dtype))
        np.testing.assert_array_equal(adapted.array, plain.array)
        assert adds_nothing


def test_gaussian_has_the_spread_of_peft():
    big = hnn.Linear.init(hax.Axis("In", 500), hax.Axis("Out", 3), key=jax.random.key(0), use_bias=False)
    ours = loraize(One(big), LoraConfig(r=16, a_init="gaussian"), key=jax.random.key(0)).proj.lora_A.array
    theirs = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(500, 3)),
        peft.LoraConfig(r=16, init_lora_weights="gaussian", target_modules=["0"]),
    )
    expected = theirs.base_model.model[0].lora_A["default"].weight.std().item()
    np.testing.assert_allclose([np.std(ours), expected], [1 / 16] * 2, rtol=0.03)


def test_orthogonal_factors_have_a_product_of_zero_and_the_spread_of_peft():
    model = new_model(a_init="orthogonal")
    A, B = model.proj.lora_A.array, model.proj.lora_B.array
    theirs = torch_model("orthogonal").base_model.model[0]
    for mine, expected in ((A, theirs.lora_A["default"].weight), (B, theirs.lora_B["default"].weight)):
        assert np.linalg.matrix_rank(mine) == np.linalg.matrix_rank(expected.detach().numpy()) == 2
        assert 0.3 < np.std(mine) / expected.std().item() < 3
    assert np.abs(product(A, B)).max() < 1e-7


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("a_init", ["pissa", "olora"])
def test_factors_of_the_weight_are_those_of_peft(a_init, use_rslora):
    model = new_model(a_init=a_init, use_rslora=use_rslora)
    theirs = torch_model(a_init, use_rslora=use_rslora).base_model.model[0]
    A, B = (getattr(theirs, name)["default"].weight.detach().numpy() for name in ("lora_A", "lora_B"))
    np.testing.assert_allclose(product(model.proj.lora_A.array, model.proj.lora_B.array), product(A, B), atol=1e-5)
    np.testing.assert_allclose(np.abs(model.proj.lora_A.array), np.abs(A), atol=1e-5)


@pytest.mark.parametrize("a_init", STARTS)
def test_two_steps_train_the_layer_that_peft_trains(a_init):
    ours, theirs = new_model(a_init=a_init), torch_model(a_init)
    layer = theirs.base_model.model[0]
    if a_init == "orthogonal":  # random: PEFT starts from our numbers
        layer.lora_A["default"].weight.data = torch.tensor(np.array(ours.proj.lora_A.array))
        layer.lora_B["default"].weight.data = torch.tensor(np.array(ours.proj.lora_B.array))
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (theirs(torch.tensor(X)) - 1.0).pow(2).sum().backward()
        optimizer.step()

    adapters, weights = eqx.partition(ours, trainable_filter(ours))
    adamw = optax.adamw(0.05, weight_decay=0.1)

    @jax.jit
    def step(adapters, state):
        def loss(adapters):
            return hax.sum((eqx.combine(adapters, weights)(X_NAMED) - 1.0) ** 2).scalar()

        updates, state = adamw.update(jax.grad(loss)(adapters), state, adapters)
        return optax.apply_updates(adapters, updates), state

    state = adamw.init(adapters)
    for _ in range(2):
        adapters, state = step(adapters, state)
    trained = eqx.combine(adapters, weights)
    expected = copy.deepcopy(theirs).merge_and_unload()[0].weight.detach().numpy()
    assert np.abs(expected - WEIGHT).max() > 0.1
    # SVD and QR of two libraries differ in the last digits, which Adam's first step divides by the gradient's size.
    np.testing.assert_allclose(merge_lora(trained).proj.weight.array, expected, rtol=0, atol=2e-5)
    np.testing.assert_allclose(trained(X_NAMED).array, theirs(torch.tensor(X)).detach().numpy(), rtol=0, atol=2e-4)


@pytest.mark.parametrize("a_init, rank", [("orthogonal", 4), ("pissa", 8), ("olora", 8)])
def test_it_is_written_as_plain_lora(a_init, rank):
    model = new_model(a_init=a_init)
    moved = eqx.tree_at(lambda m: m.proj.lora_B.array, model, replace_fn=lambda b: b + 0.1)
    plain = moved.proj.plain()
    config = LoraConfig(r=4, alpha=6.0, a_init=a_init).as_written()
    assert type(plain) is LoraLinear
    assert (plain.rank, plain.scaling) == (config.r, config.scaling) == (rank, 1.5)
    np.testing.assert_allclose(plain(X_NAMED).array, moved(X_NAMED).array, rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        LoraConfig(r=4, alpha=6.0, a_init=a_init, use_rslora=True).as_written().scaling, 3.0, rtol=1e-15
    )


def test_a_quantized_weight_is_decomposed_as_it_is():
    weight = quantize_weight(hax.named(jnp.asarray(WEIGHT), (Out, In)), In, Out, "int8")
    model = loraize(
        One(hnn.Linear(weight, None, In, Out)), LoraConfig(r=4, alpha=6.0, a_init="olora"), key=jax.random.key(0)
    )
    Q, R = np.linalg.qr(np.asarray(weight.astype(jnp.float32).array))
    np.testing.assert_allclose(
        product(model.proj.lora_A.array, model.proj.lora_B.array), Q[:, :4] @ R[:4], rtol=0, atol=1e-5
    )


def test_a_checkpoint_keeps_where_factors_started():
    model, other = new_model(a_init="pissa"), new_model(a_init="pissa", alpha=6.0, use_rslora=False)
    other = eqx.tree_at(lambda m: m.proj.initial_A.array, other, replace_fn=lambda a: -a)
    sgd = optax.sgd(0.1)
    state = TrainState.init(model, sgd, key=jax.random.key(0))
    restored = TrainState.init(other, sgd, key=jax.random.key(0)).with_trained(state.trained)
    for name in ("initial_A", "lora_B"):
        np.testing.assert_array_equal(getattr(restored.model.proj, name).array, getattr(model.proj, name).array)
    marks = constant_filter(model).proj
    assert marks.initial_A.array and marks.initial_B.array and not marks.lora_A.array and not marks.wrapped.weight.array
    assert "constants" not in TrainState.init(new_model(), sgd, key=jax.random.key(0)).trained


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(a_init="orthogonal", r=5), r"needs even ranks; .* have \[5\]"),
        (dict(a_init="orthogonal", rank_pattern={"proj": 3}), r"needs even ranks; .* have \[3\]"),
        (dict(a_init="pissa", use_dora=True), "lora.a_init=pissa starts at factors .* set a_init to random"),
        (dict(a_init="pissa", r=9), r"lora.a_init=pissa .* has 8: lora.r=9 must be at most that"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        new_model(**settings)
