"""What adapters change in a model's tree, and what they leave alone."""

import dataclasses

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_pairs import ADAPTERS, CONFIGS, VOCAB, adapters_of, moved, new_adapters, tiny_decoder, weights_of

from lora_dpo_jax.lora import (
    LoraConfig,
    LoraLinear,
    TokenKey,
    equals_reference,
    for_inference,
    frozen_copy,
    linear_layers,
    loraize,
    matching_names,
    merge_lora,
    trainable_filter,
    unwrap_lora,
    with_dropout,
)
from lora_dpo_jax.models import PackedMask

LORA = ADAPTERS["everywhere"]
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 16), dtype=np.int32)


@eqx.filter_jit
def logits(model, key=None):
    Row, Pos = hax.Axis("row", TOKENS.shape[0]), hax.Axis("position", TOKENS.shape[1])
    mask = PackedMask.causal(Row, Pos)
    key = None if key is None else TokenKey(key, (mask.position_ids,))
    return model(hax.named(TOKENS, (Row, Pos)), mask.position_ids, mask, key=key).array


def adapted_names(model) -> set[str]:
    """The layers that have an adapter, one name for each layer of a stack."""
    found = set()
    for linear, names in linear_layers(model):
        if isinstance(linear, LoraLinear):
            found |= {name for index, name in enumerate(names) if linear.settings_of(index)[0]}
    return found


@pytest.mark.parametrize("a_init", ["random", "zero"])
def test_new_adapters_change_nothing(a_init):
    adapted = loraize(tiny_decoder(), dataclasses.replace(LORA, a_init=a_init), key=jax.random.key(0))
    factors = adapters_of(adapted)
    random = "lora_A" if a_init == "random" else "lora_B"
    assert all(np.any(value) == path.endswith(random) for path, value in factors.items())
    np.testing.assert_array_equal(logits(adapted), logits(tiny_decoder()))


def test_weights_are_shared_and_not_copied():
    base, adapted = tiny_decoder(), new_adapters()
    shared = {id(leaf) for leaf in jax.tree.leaves(base)}
    assert {id(leaf) for leaf in weights_of(adapted).values()} == shared
    assert {id(leaf) for leaf in jax.tree.leaves(unwrap_lora(adapted))} == shared


def test_the_reference_is_the_base():
    base, reference = tiny_decoder(), unwrap_lora(moved(new_adapters()))
    assert jax.tree.structure(reference) == jax.tree.structure(base)
    assert not [linear for linear, _ in linear_layers(reference) if isinstance(linear, LoraLinear)]


@pytest.mark.parametrize("a_init", ["random", "zero"])
def test_adapters_that_add_nothing_make_the_model_its_reference(a_init):
    new = loraize(tiny_decoder(), dataclasses.replace(LORA, a_init=a_init), key=jax.random.key(2))
    assert equals_reference(new, None)
    assert equals_reference(with_dropout(new, 0.5), None, training=True)
    assert equals_reference(eqx.filter(new, trainable_filter(new)), None)
    assert not equals_reference(moved(new), None)


def test_adapters_that_are_those_of_the_reference_make_the_model_its_reference():
    model = moved(new_adapters())
    assert equals_reference(model, frozen_copy(model), training=True)
    assert not equals_reference(moved(model, seed=4), frozen_copy(model))
    other_rank = loraize(tiny_decoder(), dataclasses.replace(LORA, r=LORA.r + 1), key=jax.random.key(2))
    assert not equals_reference(other_rank, frozen_copy(model))
    dropping = with_dropout(model, 0.5)
    assert equals_reference(dropping, frozen_copy(dropping))
    assert not equals_reference(dropping, frozen_copy(dropping), training=True)


def test_no_gradient_flows_through_the_reference():
    def total(model):
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(model))

    model = moved(new_adapters())
    gradients = jax.jit(jax.grad(lambda model: total(unwrap_lora(model))))(model)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("lora", ADAPTERS)
def test_merged_equals_adapted(lora):
    adapted = moved(new_adapters("llama", lora))
    merged = merge_lora(adapted)
    assert jax.tree.structure(merged) == jax.tree.structure(tiny_decoder())
    ours, base = np.asarray(logits(adapted)), np.asarray(logits(tiny_decoder()))
    assert np.abs(ours - base).max() > 0.1
    # (W + BA) x and Wx + B(Ax) are rounded differently: some 1e-7 of logits of about 1 per sum, over two layers.
    np.testing.assert_allclose(logits(merged), ours, atol=2e-5)


def test_exactly_the_targets_get_adapters():
    model = new_adapters("llama", "some layers and lm_head")
    names = [name for _, names in linear_layers(model) for name in names]
    assert adapted_names(model) == set(matching_names(names, ADAPTERS["some layers and lm_head"])) == {
        "model.layers.0.self_attn.k_proj",
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.0.mlp.down_proj",
        "lm_head",
    }  # fmt: skip


def test_layers_that_are_no_targets_stay_as_they_are():
    """q_proj is adapted in layer 1 alone: whatever its factors, layer 0 computes what it did."""
    model = moved(new_adapters("llama", "some layers and lm_head"), size=1.0)
    (base,), (merged,) = (m.model.layers.segments[0].stacked.layers for m in (tiny_decoder(), merge_lora(model)))
    for mine, theirs in [(merged.self_attn.q_proj, base.self_attn.q_proj), (merged.mlp.up_proj, base.mlp.up_proj)]:
        np.testing.assert_array_equal(mine.weight["layers", 0].array, theirs.weight["layers", 0].array)
    assert not np.array_equal(
        merged.self_attn.q_proj.weight["layers", 1].array, base.self_attn.q_proj.weight["layers", 1].array
    )


def test_an_adapted_model_is_refused():
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.q_proj has an adapter already; merge_lora it"):
        loraize(new_adapters(), LORA, key=jax.random.key(0))


@pytest.mark.parametrize("lora", ADAPTERS)
def test_exactly_the_factors_are_trainable(lora):
    model = new_adapters("llama", lora)
    marks = jax.tree_util.tree_leaves_with_path(trainable_filter(model))
    assert len(marks) == len(jax.tree.leaves(model))
    for path, is_trainable in marks:
        is_factor = any(getattr(entry, "name", None) in ("lora_A", "lora_B") for entry in path)
        assert is_trainable == is_factor, path


def test_each_layer_of_the_model_drops_by_its_own_mask():
    model = with_dropout(moved(new_adapters()), 0.5)
    assert {linear.dropout for linear, _ in linear_layers(model) if isinstance(linear, LoraLinear)} == {0.5}
    one, again, other = (np.asarray(logits(model, jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other, atol=1e-3)
    np.testing.assert_array_equal(logits(model), logits(with_dropout(model, 0.0)))


def test_every_tiny_decoder_can_be_adapted():
    for name in CONFIGS:
        shapes = eqx.filter_eval_shape(loraize, tiny_decoder(name), LORA, key=jax.random.key(0))
        assert len(adapted_names(shapes)) == 7 * CONFIGS[name].num_layers


PATTERNS = dict(rank_pattern={"1.*q_proj": 2}, layers_to_transform=[1], target_modules=["q_proj", "o_proj"])


@pytest.mark.parametrize("settings", [dict(use_rslora=True, **PATTERNS), dict(a_init="pissa")], ids=str)
def test_for_inference_computes_the_same_with_the_scaling_in_the_factors(settings):
    config = LoraConfig(r=4, alpha=3.0, **settings)
    model = moved(loraize(tiny_decoder(), config, key=jax.random.key(2)))
    ready = for_inference(model)
    np.testing.assert_allclose(logits(ready), logits(model), rtol=0, atol=1e-5)
    layers = [layer for layer, _ in linear_layers(ready) if isinstance(layer, LoraLinear)]
    assert layers and {(layer.scaling, layer.by_layer) for layer in layers} == {(1.0, None)}
