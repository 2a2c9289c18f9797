"""Ranks, scalings and targets by layer; PEFT, live, says what they should be."""

import dataclasses
import warnings

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from tiny_models import with_random_adapters
from tiny_pairs import LLAMA, VOCAB, adapters_of, tiny_decoder

from lora_dpo_jax.lora import Adapter, LoraConfig, linear_layers, loraize, trainable_filter

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

QKV = ["q_proj", "k_proj", "v_proj"]
MIXED = LoraConfig(r=4, alpha=8.0, target_modules=QKV, rank_pattern={"layers.1.self_attn.q_proj": 2, "v_proj": 6})


def peft_layers(r: int, alpha: float, **settings) -> dict[str, tuple[int, float]]:
    """(rank, scaling) of each layer of a Llama of the same shape that PEFT adapts."""
    shape = dict(hidden_size=LLAMA.hidden_size, intermediate_size=LLAMA.intermediate_size, vocab_size=VOCAB)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match")
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**shape, num_hidden_layers=LLAMA.num_layers, num_attention_heads=LLAMA.num_heads)
        )
        tuned = peft.get_peft_model(model, peft.LoraConfig(r=r, lora_alpha=alpha, task_type="CAUSAL_LM", **settings))
    return {
        name: (module.r["default"], module.scaling["default"])
        for name, module in tuned.base_model.model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def our_layers(model) -> dict[str, tuple[int, float]]:
    return {
        name: layer.settings_of(index)
        for layer, names in linear_layers(model)
        if isinstance(layer, Adapter)
        for index, name in enumerate(names)
        if layer.settings_of(index)[0]
    }


@pytest.mark.parametrize(
    "settings",
    [
        dict(rank_pattern={"q_proj": 2}),
        dict(rank_pattern={"proj": 2, "self_attn.q_proj": 6, "q_proj": 5, "layers.1.self_attn.[qk]_proj": 3}),
        dict(rank_pattern={"1.self_attn.q_proj": 2, "^model.layers.0.self_attn.v_proj": 9}, use_rslora=True),
        dict(rank_pattern={"v_proj": 2}, alpha_pattern={"model.layers.0.self_attn.v_proj": 2.5, "[vk]_proj": 64}),
        dict(layers_to_transform=[1]),
        dict(layers_to_transform=1, layers_pattern="layers"),
        dict(layers_to_transform=[], layers_pattern=[]),
        dict(layers_to_transform=[1], target_modules=["q_proj", "model.layers.0.self_attn.k_proj", "lm_head"]),
        dict(layers_to_transform=[0, 1], layers_pattern=["blocks", "layers"], rank_pattern={"0.*v_proj": 3}),
    ],
    ids=str,
)
def test_layers_have_the_rank_and_scaling_that_peft_gives_them(settings):
    settings = dict(target_modules=QKV) | settings
    model = eqx.filter_eval_shape(
        loraize, tiny_decoder(), LoraConfig(r=4, alpha=10.0, **settings), key=jax.random.key(0)
    )
    assert our_layers(model) == peft_layers(4, 10.0, **settings)


def test_null_targets_are_restricted_to_layers_too():
    config = LoraConfig(r=4, layers_to_transform=[1])
    model = eqx.filter_eval_shape(loraize, tiny_decoder(), config, key=jax.random.key(0))
    assert len(our_layers(model)) == 7 and all(".layers.1." in name for name in our_layers(model))


def test_ranks_by_layer_start_with_a_zero_product_and_as_without_the_others():
    mixed, plain = (
        adapters_of(loraize(tiny_decoder(), config, key=jax.random.key(2)))
        for config in (MIXED, dataclasses.replace(MIXED, rank_pattern={}))
    )
    (q_mixed,), (q_plain,) = ([f[p] for p in f if p.endswith("q_proj.lora_A")] for f in (mixed, plain))
    np.testing.assert_array_equal(q_mixed[0], q_plain[0])
    assert not np.any(q_mixed[1, 2:]) and np.all(q_mixed[1, :2] != 0)
    assert not np.isin(q_mixed[1, :2], q_plain).any()
    bound = LLAMA.hidden_size**-0.5
    assert 0.9 * bound < np.abs(q_mixed[1]).max() <= bound
    assert not any(np.any(value) for path, value in mixed.items() if path.endswith("lora_B"))


def test_nothing_is_trained_beyond_the_rank_of_a_layer():
    model = with_random_adapters(tiny_decoder(), MIXED)
    adapters, weights = eqx.partition(model, trainable_filter(model))
    (layer,) = weights.model.layers.segments[0].stacked.layers
    x = layer.self_attn.q_proj.wrapped.In

    @jax.jit
    def gradient(adapters):
        def loss(adapters):
            (layer,) = eqx.combine(adapters, weights).model.layers.segments[0].stacked.layers
            out = layer.self_attn.q_proj(hax.random.normal(jax.random.key(0), (hax.Axis("token", 5), x)))
            return jnp.sum(out.array**2)

        return jax.grad(loss)(adapters)

    (found,) = (
        g for path, g in adapters_of(eqx.combine(gradient(adapters), weights)).items() if "q_proj.lora_A" in path
    )
    assert not np.any(found[1, 2:]) and np.all(np.any(found[0] != 0, axis=1)) and np.any(found[1, :2])


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(rank_pattern={"q_proj": 0}), "lora.rank_pattern: q_proj: 0 must be at least 1"),
        (dict(alpha_pattern={"q_proj": 0.0}), r"lora.alpha_pattern: q_proj: 0.0 must be a positive number"),
        (dict(rank_pattern={"(": 3}), r"lora.rank_pattern: the key '\(' is no regular expression"),
        (dict(layers_to_transform=[1], target_modules=".*q_proj"), "needs a list in lora.target_modules"),
        (dict(layers_pattern="layers"), "needs lora.layers_to_transform"),
        (dict(layers_to_transform=-1), "lora.layers_to_transform=-1 must be numbers of layers, from 0"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**settings)


def test_patterns_that_match_nothing_are_named(caplog):
    patterns = dict(rank_pattern={"w1": 3, "proj": 3}, alpha_pattern={"up_proj": 3.0, "q_proj": 4.0})
    eqx.filter_eval_shape(loraize, tiny_decoder(), LoraConfig(target_modules=QKV, **patterns), key=jax.random.key(0))
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
        "lora.rank_pattern: 'w1' matches no target",
        "lora.rank_pattern: 'proj' matches no target",
        "lora.alpha_pattern: 'up_proj' matches no target",
    ]


def test_layers_that_do_not_exist_are_an_error():
    with pytest.raises(ValueError, match=r"lora.layers_to_transform: there are no layers \[7\]"):
        loraize(tiny_decoder(), LoraConfig(target_modules=QKV, layers_to_transform=[0, 7]), key=jax.random.key(0))
