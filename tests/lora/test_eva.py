"""A at the principal components of inputs, as PEFT's EVA."""

import warnings

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
import jax.numpy as jnp
import numpy as np
import torch

from lora_dpo_jax.lora import LoraConfig, loraize, trainable_filter
from lora_dpo_jax.lora.dropout import TokenKey
from lora_dpo_jax.lora.eva import with_principal_inputs

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

In, Middle, Out, Token = hax.make_axes(In=12, middle=9, Out=8, token=400)
RNG = np.random.default_rng(0)
FIRST, SECOND = (RNG.normal(size=shape).astype(np.float32) for shape in ((9, 12), (8, 9)))
# Inputs whose components are apart, with a mean that is not zero.
X = (RNG.normal(size=(400, 12)) * 0.6 ** np.arange(12) @ np.linalg.qr(RNG.normal(size=(12, 12)))[0] + 1).astype(
    np.float32
)


class Two(eqx.Module):
    first: eqx.Module
    second: eqx.Module

    def __call__(self, x, key):
        return self.second(hax.tanh(self.first(x, key=key)), key=key)


def test_factors_are_those_of_peft_on_the_tokens_that_are_shown():
    first = hnn.Linear(hax.named(jnp.asarray(FIRST), (Middle, In)), None, In, Middle)
    model = Two(first, hnn.Linear(hax.named(jnp.asarray(SECOND), (Out, Middle)), None, Middle, Out))
    shown = np.arange(400) % 4 != 0
    key = TokenKey(jax.random.key(0), (hax.named(jnp.asarray(shown, jnp.float32), Token),))

    @eqx.filter_jit
    def sums(probed):
        probes, weights = eqx.partition(probed, trainable_filter(probed))

        def loss(probes):
            return hax.sum(eqx.combine(probes, weights)(hax.named(jnp.asarray(X), (Token, In)), key)).scalar()

        return eqx.combine(jax.grad(loss)(probes), weights)

    config = LoraConfig(r=3, a_init="eva", rank_pattern={"second": 2})
    adapted = loraize(model, config, key=jax.random.key(1))
    ours = with_principal_inputs(model, adapted, ["first", "second"], 3, sums, key=jax.random.key(2))

    torch_model = torch.nn.Sequential(
        torch.nn.Linear(12, 9, bias=False), torch.nn.Tanh(), torch.nn.Linear(9, 8, bias=False)
    )
    torch_model[0].weight.data, torch_model[2].weight.data = torch.tensor(FIRST), torch.tensor(SECOND)
    settings = peft.LoraConfig(
        r=3,
        init_lora_weights="eva",
        target_modules=["0", "2"],
        eva_config=peft.EvaConfig(rho=1.0, use_label_mask=False),
    )
    data = [torch.tensor(X[shown])] * 3
    theirs = peft.tuners.lora.get_eva_state_dict(
        torch_model, data, settings, forward_fn=lambda model, x: model(x), prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda inputs, *_: (inputs[0] if isinstance(inputs, tuple) else inputs),
        show_progress_bar=False,
    )  # fmt: skip
    for layer, name, rank in ((ours.first, "0", 3), (ours.second, "2", 2)):
        expected = next(value for key, value in theirs.items() if key.split(".")[-3 if "lora" in key else -1] == name
                        or key == name or key.startswith(f"{name}."))  # fmt: skip
        expected = np.asarray(expected)[:rank]
        A = np.asarray(layer.lora_A.array)
        np.testing.assert_allclose(A @ A.T, np.eye(rank), atol=1e-5)
        # Each component but for its sign.
        np.testing.assert_allclose(np.abs(np.sum(A * expected, axis=1)), np.ones(rank), atol=2e-3)
        assert not np.any(layer.lora_B.array)
