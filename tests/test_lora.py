"""What adapters are, where they go and what they leave alone; PEFT, live, says where they should go."""

import dataclasses
import warnings

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from tiny_pairs import (
    ADAPTERS,
    CONFIGS,
    LLAMA,
    VOCAB,
    adapters_of,
    moved,
    named,
    new_adapters,
    tiny_decoder,
    weights_of,
)

from lora_dpo_jax.lora import (
    LoraConfig,
    LoraLinear,
    TokenKey,
    equals_reference,
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

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

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
            active = np.ones(len(names)) if linear.active is None else np.asarray(linear.active.array)
            found |= {name for name, is_active in zip(names, active, strict=True) if is_active}
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


def peft_targets(targets, excluded) -> set[str]:
    """The layers of a Llama of the same shape that PEFT adapts."""
    shape = dict(hidden_size=LLAMA.hidden_size, intermediate_size=LLAMA.intermediate_size, vocab_size=VOCAB)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**shape, num_hidden_layers=LLAMA.num_layers, num_attention_heads=LLAMA.num_heads)
        )
        config = peft.LoraConfig(target_modules=targets, exclude_modules=excluded, task_type="CAUSAL_LM")
        tuned = peft.get_peft_model(model, config)
    layers = (name for name, module in tuned.base_model.model.named_modules()
              if isinstance(module, peft.tuners.lora.LoraLayer))  # fmt: skip
    return set(layers)


@pytest.mark.parametrize(
    "targets, excluded",
    [
        (["q_proj", "v_proj"], None),
        (["self_attn.q_proj", "mlp.up_proj"], None),
        (["layers.1.mlp.down_proj"], None),
        (["1.mlp.down_proj", "0.self_attn.o_proj"], None),
        (["model.layers.0.self_attn.k_proj", "lm_head"], None),
        (r".*\.(q|k)_proj", None),
        (r"model\.layers\.1\..*_proj", None),
        (r".*proj|lm_head", None),
        (["q_proj", "k_proj", "down_proj"], ["k_proj", "layers.0.mlp.down_proj"]),
        (["q_proj", "k_proj", "lm_head"], r".*layers\.0.*"),
        (r".*", ["embed_tokens", "mlp", "self_attn", "lm_head"]),
        (None, None),
        (None, ["lm_head", "o_proj"]),
    ],
)
def test_targets_match_as_in_peft(targets, excluded):
    names = [name for _, names in linear_layers(tiny_decoder()) for name in names]
    ours = set(matching_names(names, LoraConfig(target_modules=targets, exclude_modules=excluded)))
    if targets == r".*":  # PEFT would adapt modules that are no linear layers too, and stops there
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    # Our null is every linear layer but the head, which is what PEFT calls all-linear.
    assert ours == peft_targets("all-linear" if targets is None else targets, excluded)


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


@pytest.mark.parametrize("targets", [["query"], ["proj"], "q_proj", r".*\.experts\..*", []])
def test_if_nothing_matches_the_error_lists_what_exists(targets):
    with pytest.raises(ValueError) as error:
        loraize(tiny_decoder(), LoraConfig(target_modules=targets), key=jax.random.key(0))
    message = str(error.value)
    assert f"lora.target_modules={targets!r}" in message
    assert "matches none of the 15 linear layers" in message
    assert all(name in message for name in ("model.layers.*.self_attn.q_proj", "model.layers.*.mlp.up_proj", "lm_head"))


def test_a_name_that_matches_nothing_beside_others_is_an_error_too():
    with pytest.raises(ValueError, match=r"lora.target_modules: \['w1'\] match no linear layer; .*q_proj"):
        loraize(tiny_decoder(), LoraConfig(target_modules=["q_proj", "w1"]), key=jax.random.key(0))


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], r".*_proj|lm_head"])
def test_the_head_of_a_tied_model_is_refused_with_the_reason(targets):
    with pytest.raises(ValueError, match="ties its head to the input embedding"):
        loraize(tiny_decoder("qwen"), LoraConfig(target_modules=targets), key=jax.random.key(0))


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


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_scaling_is_that_of_peft(use_rslora):
    config = peft.LoraConfig(r=6, lora_alpha=10, use_rslora=use_rslora, target_modules=["0"])
    theirs = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 3)), config)
    (layer,) = (module for module in theirs.modules() if isinstance(module, peft.tuners.lora.LoraLayer))
    assert LoraConfig(r=6, alpha=10.0, use_rslora=use_rslora).scaling == layer.scaling["default"]


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


def test_a_token_drops_the_same_wherever_it_is_and_no_two_drop_alike():
    Row, Pos, Embed, Head = hax.make_axes(row=2, position=3, embed=32, head=2)
    numbers = np.array([[7, 1, 2], [3, 7, 4]], np.int32)
    key = TokenKey(jax.random.key(0), (named(numbers, "row", "position"), named(numbers * 0, "row", "position")))
    kept = key.bernoulli((Row, Head, Pos, Embed), 0.5)
    assert kept.axes == (Row, Head, Pos, Embed) and 0.4 < kept.array.mean() < 0.6
    by_token = np.asarray(kept.rearrange((Row, Pos, Head, Embed)).array).reshape(6, -1)
    np.testing.assert_array_equal(by_token[0], by_token[4])
    assert len(np.unique(by_token, axis=0)) == 5
    other, another = (k.bernoulli((Row, Head, Pos, Embed), 0.5).array for k in key.split(2))
    assert not np.array_equal(other, kept.array) and not np.array_equal(other, another)


def test_each_layer_of_the_model_drops_by_its_own_mask():
    model = with_dropout(moved(new_adapters()), 0.5)
    assert {linear.dropout for linear, _ in linear_layers(model) if isinstance(linear, LoraLinear)} == {0.5}
    one, again, other = (np.asarray(logits(model, jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other, atol=1e-3)
    np.testing.assert_array_equal(logits(model), logits(with_dropout(model, 0.0)))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(r=0), r"lora\.r=0 must be at least 1"),
        (dict(dropout=1.0), r"lora\.dropout=1\.0 must be in \[0, 1\)"),
        (dict(dropout=-0.1), r"lora\.dropout=-0\.1 must be in \[0, 1\)"),
        (dict(a_init="ones"), r"lora\.a_init='ones' must be 'random' or 'zero'"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**settings)


def test_every_tiny_decoder_can_be_adapted():
    for name in CONFIGS:
        shapes = eqx.filter_eval_shape(loraize, tiny_decoder(name), LORA, key=jax.random.key(0))
        assert len(adapted_names(shapes)) == 7 * CONFIGS[name].num_layers
