"""Rows of embedding and head that are trained beside LoRA: nothing else of the matrices moves, or gets a gradient."""

import dataclasses
import functools

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_pairs import (
    VOCAB,
    intermediates,
    moved,
    packed,
    random_pairs,
    table_of,
    tiny_decoder,
)
from tiny_steps import two_steps

from lora_dpo_jax.data.packing import pack
from lora_dpo_jax.data.shapes import choose_shapes
from lora_dpo_jax.generation import GenerationConfig, generate
from lora_dpo_jax.log_probs import score_responses, score_with_reference
from lora_dpo_jax.lora import (
    LoraConfig,
    check_token_rows,
    equals_reference,
    frozen_copy,
    loraize,
    merge_lora,
    output_filter,
    reference_model,
    trainable_filter,
)
from lora_dpo_jax.models import PackedMask
from lora_dpo_jax.models.quantization import quantize
from lora_dpo_jax.sharding import MeshConfig, Placement

TOKENS = [96, 5, 40]
BOTH = {"embed_tokens": TOKENS, "lm_head": TOKENS}
# A tied and an untied head.
CONFIGS = {
    "qwen": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=TOKENS),
    "llama": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=BOTH),
}
PAIRS = table_of(random_pairs(8))
LAYOUT = choose_shapes([np.arange(8)], PAIRS.sizes, row_multiple=8).parts[0]


@functools.cache
def new_rows(name: str):
    return loraize(tiny_decoder(name), CONFIGS[name], key=jax.random.key(2))


def micro_batch():
    return packed(PAIRS, LAYOUT).micro_batch(0)


# What the weights are held in, and what the rows are trained in: a row of the first may not fit into the second.
@pytest.mark.parametrize(
    "name, of_weights, of_rows",
    [("qwen", jnp.bfloat16, jnp.float32), ("qwen", jnp.float32, jnp.bfloat16), ("llama", jnp.float32, jnp.float32)],
)
def test_new_rows_change_nothing_to_the_bit(name, of_weights, of_rows):
    base = jax.tree.map(lambda leaf: leaf.astype(of_weights), tiny_decoder(name))
    adapted = loraize(base, CONFIGS[name], key=jax.random.key(2))
    adapters, weights = eqx.partition(adapted, trainable_filter(adapted))
    model = eqx.combine(jax.tree.map(lambda leaf: leaf.astype(of_rows), adapters), weights)
    policy, reference = eqx.filter_jit(score_with_reference)(model, None, micro_batch())
    np.testing.assert_array_equal(policy.log_probs.array, reference.log_probs.array)
    assert equals_reference(model, None) and not equals_reference(moved(model), None)
    rows = adapted.model.embed_tokens  # a step is given the array of the rows for its own
    assert rows.rows.array.unsafe_buffer_pointer() != rows.base_rows.array.unsafe_buffer_pointer()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_gradient_of_rows_is_that_of_the_whole_matrices_there(name):
    """Of a tied matrix: the sum of what it gets as embedding and as head, which is computed by blocks."""
    model, micro = moved(new_rows(name)), micro_batch()

    def total(model):
        return hax.sum(score_responses(model, micro).log_probs).scalar()

    rows, weights = eqx.partition(model, trainable_filter(model))
    found = jax.jit(jax.grad(lambda rows: total(eqx.combine(rows, weights))))(rows)
    merged = merge_lora(model)

    def of_matrices(matrices):
        lm_head = merged.lm_head
        if lm_head is not None:
            lm_head = eqx.tree_at(lambda layer: layer.weight.array, lm_head, matrices[1])
        embedding = eqx.tree_at(lambda layer: layer.weight.array, merged.model.embed_tokens, matrices[0])
        whole = eqx.tree_at(lambda m: m.model.embed_tokens, merged, embedding)
        whole = dataclasses.replace(whole, lm_head=lm_head)
        mask = PackedMask(micro.segment_ids, micro.branch_ids, micro.position_ids)
        logits = whole(micro.tokens, micro.position_ids, mask).rearrange(("row", "position", "vocab")).array
        log_probs = jax.nn.log_softmax(logits, axis=-1)
        at = jnp.take_along_axis(log_probs, micro.source.array[..., None], axis=1)
        chosen = jnp.take_along_axis(at, micro.target_ids.array[..., None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(micro.target_response.array >= 0, chosen, 0.0))

    matrices = [merged.model.embed_tokens.weight.array]
    matrices += [] if merged.lm_head is None else [merged.lm_head.weight.array]
    expected = jax.jit(jax.grad(of_matrices))(matrices)
    ours = [found.model.embed_tokens] + ([] if merged.lm_head is None else [found.lm_head])
    for mine, theirs in zip(ours, expected, strict=True):
        wanted = np.asarray(theirs)[TOKENS]
        assert np.abs(wanted).max() > 0.1
        np.testing.assert_allclose(mine.rows.array, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_other_array_of_the_size_of_the_matrix_is_made(name):
    """Neither a gradient nor a copy with the new rows, in policy and reference."""
    micro = micro_batch()

    def made(model):
        rows, weights = eqx.partition(model, trainable_filter(model))

        def total(rows, weights):
            scores = score_with_reference(eqx.combine(rows, weights), None, micro)
            return sum(hax.sum(score.log_probs).scalar() for score in scores)

        jaxpr = jax.make_jaxpr(jax.grad(total))(rows, weights).jaxpr
        return {(op, shape) for op, shape in intermediates(jaxpr) if VOCAB in shape and 32 in shape}

    without = loraize(tiny_decoder(name), LoraConfig(r=2, target_modules=["q_proj"]), key=jax.random.key(2))
    assert made(new_rows(name)) <= made(without)


@functools.cache
def trained(name: str, mesh: tuple | None):
    """(losses, adapters) of two steps over an NF4 base, of a reference with adapters of its own."""
    model = loraize(eqx.filter_jit(quantize)(tiny_decoder(name), "nf4"), CONFIGS[name], key=jax.random.key(2))
    reference = frozen_copy(moved(model, seed=5))
    batch = pack(PAIRS, [np.array([i]) for i in range(8)], LAYOUT)
    placement = None if mesh is None else Placement(MeshConfig(axes=dict(mesh)))
    return two_steps(model, batch, placement, reference=reference)


def test_meshes_change_nothing_and_weights_never_move():
    losses, adapters = trained("qwen", (("data", 4), ("model", 2)))
    expected_losses, expected = trained("qwen", None)
    np.testing.assert_allclose(losses, expected_losses, rtol=0, atol=1e-5)
    assert any("rows" in path for path in adapters)
    for path, leaf in adapters.items():
        np.testing.assert_allclose(leaf, expected[path], rtol=0, atol=1e-4, err_msg=path)


def test_the_reference_of_adapters_has_rows_of_its_own():
    model = moved(new_rows("qwen"))
    frozen = frozen_copy(moved(model, seed=5))
    _, reference = eqx.filter_jit(score_with_reference)(model, frozen, micro_batch())
    alone = eqx.filter_jit(score_responses)(reference_model(model, frozen), micro_batch())
    np.testing.assert_allclose(reference.log_probs.array, alone.log_probs.array, rtol=0, atol=1e-4)


def test_completions_are_the_likeliest_tokens():
    model = moved(new_rows("qwen"), size=0.5)
    ((first, second),) = generate(model, [[5, 40, 96]], GenerationConfig(max_new_tokens=2), stop_ids=())
    Row, Pos = hax.make_axes(row=1, position=4)
    mask = PackedMask.causal(Row, Pos)
    found = eqx.filter_jit(model)(hax.named(np.array([[5, 40, 96, first]]), (Row, Pos)), mask.position_ids, mask)
    assert found.rearrange((Row, Pos, "vocab")).array[0, 2:].argmax(-1).tolist() == [first, second]


def test_rows_learn_at_the_rate_of_lora_a():
    """As in PEFT's create_loraplus_optimizer, where only B and what has one dimension is faster."""
    model = new_rows("llama")
    marks = output_filter(eqx.filter(model, trainable_filter(model)))
    assert not marks.lm_head.rows.array and not marks.model.embed_tokens.rows.array


@pytest.mark.parametrize(
    "settings, told",
    [
        (dict(trainable_token_indices=[3, 5, 3]), r"trainable_token_indices: embed_tokens names \[3\] twice"),
        (dict(trainable_token_indices=[-1]), r"embed_tokens: \[-1\] must be token ids"),
        (dict(trainable_token_indices=[]), "must be token ids, at least one; null trains none"),
        (dict(trainable_token_indices={}), "must name a matrix"),
        (
            dict(trainable_token_indices={"wte": [1]}),
            r"\['wte'\] are no matrices of tokens; there are embed_tokens and",
        ),
    ],
)
def test_settings_that_name_no_rows_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        LoraConfig(**settings)


@pytest.mark.parametrize(
    "name, tokens, told",
    [
        (
            "qwen",
            [97],
            "names 97, and model.embed_tokens has the rows 0 to 96: enlarge the vocabulary of the base first",
        ),
        ("llama", {"embed_tokens": [2], "lm_head": [97]}, "names 97, and lm_head has the rows 0 to 96"),
        ("llama", [5], r"=\[5\] is a list, and the head of this model is a matrix of its own.*write {embed_tokens: \["),
        ("qwen", {"embed_tokens": [5], "lm_head": [6]}, "both must have the same tokens: write one list"),
        ("qwen", {"lm_head": [6]}, "both must have the same tokens: write one list"),
    ],
)
def test_rows_that_a_model_does_not_have_are_refused_before_anything_is_read(name, tokens, told):
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=tokens)
    with pytest.raises(ValueError, match=told):
        loraize(tiny_decoder(name), config, key=jax.random.key(0))
    with pytest.raises(ValueError, match=told.replace("model.embed_tokens", "embed_tokens")):
        check_token_rows(config, tied=name == "qwen", vocab_size=VOCAB)


def test_a_head_has_lora_or_rows_of_its_own():
    config = LoraConfig(target_modules=["lm_head", "q_proj"], trainable_token_indices=BOTH)
    with pytest.raises(ValueError, match="trainable_token_indices and lora.target_modules both name lm_head"):
        loraize(tiny_decoder(), config, key=jax.random.key(0))
