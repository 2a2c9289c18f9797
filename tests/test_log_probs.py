"""Log-probs of targets equal those of whole softmaxes, in value and gradient, and no whole softmax is ever built."""

import dataclasses
import functools
import re

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_pairs import (
    LLAMA,
    VOCAB,
    intermediates,
    moved,
    named,
    new_adapters,
    packed,
    random_pairs,
    table_of,
    tiny_decoder,
)

from lora_dpo_jax import log_probs as log_probs_module
from lora_dpo_jax.data.shapes import PartShape
from lora_dpo_jax.log_probs import score_responses, score_with_reference, target_log_probs
from lora_dpo_jax.lora import LoraConfig, LoraLinear, TokenKey, frozen_copy, loraize, reference_model, trainable_filter
from lora_dpo_jax.models import CausalLM, ComputeConfig, Head
from lora_dpo_jax.sharding import MeshConfig, Placement

ROWS, POSITIONS, TARGETS = 3, 150, 192
LEAST_BLOCK = 64  # targets of a row
KEY = jax.random.key(0)
HEADS = ("frozen", "tied", "adapted", "capped", "adapted and capped")


def limit_blocks(monkeypatch, size: int) -> None:
    monkeypatch.setattr(
        log_probs_module, "BLOCK_LOGITS_BYTES", dict.fromkeys(log_probs_module.BLOCK_LOGITS_BYTES, size)
    )


@pytest.fixture
def small_blocks(monkeypatch):
    """Three blocks of 64 targets a row instead of one of 192."""
    limit_blocks(monkeypatch, 1)


def head_of(kind: str):
    if "capped" in kind:
        return dataclasses.replace(head_of("adapted" if "adapted" in kind else "frozen"), scale=3.0, softcap=1.5)
    if kind == "adapted":
        head = moved(new_adapters("llama", "some layers and lm_head")).head
        assert isinstance(head.linear, LoraLinear)
        return head
    return tiny_decoder("qwen" if kind == "tied" else "llama").head


@functools.cache
def inputs():
    """(hidden, targets, cotangent): rows with 190, 100 and no targets, whose sources repeat."""
    rng = np.random.default_rng(0)
    hidden = named(
        rng.normal(size=(ROWS, POSITIONS, LLAMA.hidden_size)).astype(np.float32), *("row", "position", "embed")
    )
    source = named(rng.integers(0, POSITIONS, (ROWS, TARGETS)), "row", "target")
    target_ids = named(rng.integers(0, VOCAB, (ROWS, TARGETS)), "row", "target")
    is_target = named(np.arange(TARGETS) < np.array([[190], [100], [0]]), "row", "target")
    cotangent = named(rng.normal(size=(ROWS, TARGETS)).astype(np.float32), "row", "target")
    return hidden, (source, target_ids, is_target), cotangent


def whole_log_probs(head, hidden, source, target_ids, is_target):
    """The plain way: logits of every position, a softmax, and what is asked for picked out."""
    log_probs = jax.nn.log_softmax(head(hidden).rearrange(("row", "position", "vocab")).array)
    picked = log_probs[jnp.arange(ROWS)[:, None], source.array, target_ids.array]
    return hax.named(jnp.where(is_target.array, picked, 0.0), is_target.axes)


def ours_of(*arguments, **options):
    log_probs, _ = target_log_probs(*arguments, **options)
    return log_probs


def weighted_sum(function, head, hidden):
    """d/d(adapters, hidden) of the log-probs' sum with random weights; the log-probs come along."""
    adapters, weights = eqx.partition(head, trainable_filter(head))
    _, targets, cotangent = inputs()

    def total(adapters, hidden):
        log_probs = function(eqx.combine(adapters, weights), hidden, *targets)
        return (log_probs * cotangent).sum().scalar(), log_probs

    return jax.grad(total, argnums=(0, 1), has_aux=True)(adapters, hidden)


@pytest.mark.parametrize("kind", HEADS)
def test_values_and_gradients_are_those_of_a_whole_softmax(kind, small_blocks):
    head, (hidden, _, _) = head_of(kind), inputs()
    (d_adapters, d_hidden), ours = jax.jit(functools.partial(weighted_sum, ours_of))(head, hidden)
    (e_adapters, e_hidden), expected = jax.jit(functools.partial(weighted_sum, whole_log_probs))(head, hidden)
    np.testing.assert_allclose(ours.array, expected.array, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(d_hidden.rearrange(hidden.axes).array, e_hidden.array, rtol=1e-4, atol=1e-5)
    pairs = list(zip(jax.tree.leaves(d_adapters), jax.tree.leaves(e_adapters), strict=True))
    assert len(pairs) == (2 if "adapted" in kind else 0)
    for mine, theirs in pairs:
        assert np.abs(theirs).max() > 1.0
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", HEADS)
def test_the_number_of_blocks_changes_nothing(kind, monkeypatch):
    head, (hidden, targets, _) = head_of(kind), inputs()
    values = []
    for size in (2**26, 1):
        limit_blocks(monkeypatch, size)
        values.append(jax.jit(lambda head, hidden: ours_of(head, hidden, *targets))(head, hidden).array)
    np.testing.assert_allclose(*values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["frozen", "tied"])
def test_logits_of_a_bfloat16_head_are_sums_in_float32(kind):
    """Einsum rounds them to bfloat16 otherwise, by up to a 256th of each logit."""
    head = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), head_of(kind))
    hidden = inputs()[0].astype(jnp.bfloat16)
    weight = head.linear.weight.rearrange((head.Vocab, head.Embed)).array
    expected = np.einsum("rpe,ve->rpv", np.asarray(hidden.array, np.float64), np.asarray(weight, np.float64))
    found = head(hidden).rearrange((*hidden.axes[:2], head.Vocab)).array
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_no_targets_at_all_cost_nothing_and_give_zero(small_blocks):
    hidden, (source, target_ids, is_target), _ = inputs()
    nothing = hax.zeros_like(is_target)

    def total(hidden):
        return ours_of(head_of("frozen"), hidden, source, target_ids, nothing).sum().scalar()

    value, gradient = jax.jit(jax.value_and_grad(total))(hidden)
    assert value == 0 and not np.any(gradient.array)


def test_dropout_of_an_adapted_head_is_the_same_forward_and_backward(small_blocks):
    """With the mask that the forward pass drew, log-probs are smooth in B: the gradient is their slope."""
    linear, (hidden, targets, cotangent) = dataclasses.replace(head_of("adapted").linear, dropout=0.5), inputs()
    token = named(np.arange(ROWS * POSITIONS, dtype=np.int32).reshape(ROWS, POSITIONS), "row", "position")
    key = TokenKey(jax.random.key(1), (token,))

    @jax.jit
    def total(B):
        dropping = Head(dataclasses.replace(linear, lora_B=B))
        return (ours_of(dropping, hidden, *targets, key=key) * cotangent).sum().scalar()

    direction = hax.named(
        jnp.asarray(np.random.default_rng(1).normal(size=(VOCAB, 4)), jnp.float32), linear.lora_B.axes
    )
    step = 1e-2
    ahead, behind = (total(linear.lora_B + sign * step * direction) for sign in (1, -1))
    slope = (ahead - behind) / (2 * step)
    gradient = jax.jit(jax.grad(total))(linear.lora_B)
    # A central difference of float32 values of about 1000 over 0.02, whose third derivative is left out.
    assert float(hax.sum(gradient * direction).scalar()) == pytest.approx(float(slope), rel=5e-3)


def too_large(jaxpr, *, tokens: int) -> list[tuple[str, tuple[int, ...]]]:
    """What is computed with a vocabulary axis and more than `tokens` others; the weight itself has hidden_size."""
    return [(op, shape) for op, shape in intermediates(jaxpr) if VOCAB in shape and np.prod(shape) > tokens * VOCAB]


def gradients_jaxpr(function, kind: str):
    hidden, _, _ = inputs()
    adapters, weights = eqx.partition(head_of(kind), trainable_filter(head_of(kind)))

    def compute(adapters, weights, hidden):
        return weighted_sum(function, eqx.combine(adapters, weights), hidden)

    return jax.make_jaxpr(compute)(adapters, weights, hidden)


@pytest.mark.parametrize("kind", HEADS)
def test_no_logits_beyond_a_block_exist(kind, small_blocks):
    assert not too_large(gradients_jaxpr(ours_of, kind).jaxpr, tokens=ROWS * LEAST_BLOCK)
    # The same look at the plain way finds its [row, position, vocab].
    assert too_large(gradients_jaxpr(whole_log_probs, kind).jaxpr, tokens=ROWS * LEAST_BLOCK)


@pytest.mark.parametrize("kind", HEADS)
def test_a_frozen_head_has_no_gradient(kind, small_blocks):
    """The compiled program computes nothing as large as the weight, not even a zero: it only reads it."""
    adapters, weights = eqx.partition(head_of(kind), trainable_filter(head_of(kind)))

    def compute(function, adapters, weights):
        return weighted_sum(function, eqx.combine(adapters, weights), inputs()[0])

    def weight_gradient(adapters, weights):
        return jax.grad(lambda weights: compute(whole_log_probs, adapters, weights)[1].sum().scalar())(weights)

    assert not results_like_the_weight(functools.partial(compute, ours_of), adapters, weights)
    assert results_like_the_weight(weight_gradient, adapters, weights), "the same look finds a gradient that is there"


def results_like_the_weight(function, *arguments) -> list[str]:
    """Instructions of the compiled program that compute a {vocab, embed} array."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    sizes = rf"({VOCAB},{LLAMA.hidden_size}|{LLAMA.hidden_size},{VOCAB})"
    operations = re.findall(rf"= f32\[{sizes}\]\S* ([\w-]+)\(", text)
    return [
        operation for _, operation in operations if operation not in ("parameter", "get-tuple-element", "transpose")
    ]


def test_no_logits_beyond_a_block_exist_in_the_whole_model(small_blocks):
    pairs = table_of(random_pairs(24, seed=1, response=20))
    layout = PartShape.of_pairs(micro_batches=1, rows=4, row_length=320, targets=384, pairs=24)
    micro = packed(pairs, layout).micro_batch(0)
    model = moved(new_adapters())
    adapters, weights = eqx.partition(model, trainable_filter(model))

    def total(adapters, weights, micro):
        log_probs = score_responses(eqx.combine(adapters, weights), micro)
        return log_probs.log_probs.sum().scalar()

    jaxpr = jax.make_jaxpr(jax.value_and_grad(total))(adapters, weights, micro).jaxpr
    assert not too_large(jaxpr, tokens=layout.rows * LEAST_BLOCK)


def margin(log_probs) -> jax.Array:
    return log_probs.log_probs.sum().scalar()


def side_by_side(adapters, weights, frozen, micro):
    """A scalar of policy and reference computed together, whose reference must get no gradient."""
    policy, reference = score_with_reference(eqx.combine(adapters, weights), frozen, micro)
    return margin(policy) * margin(reference), (policy, reference)


def policy_alone(adapters, weights, frozen, micro):
    policy = score_responses(eqx.combine(adapters, weights), micro)
    return margin(policy), policy


def gradients(function):
    return jax.jit(jax.value_and_grad(function, has_aux=True))


@pytest.mark.parametrize("lora", ["everywhere", "some layers and lm_head"])
@pytest.mark.parametrize("has_frozen_adapters", [False, True])
def test_policy_and_reference_side_by_side_are_what_they_are_alone(lora, has_frozen_adapters):
    micro = packed(table_of(random_pairs(6, seed=1)), PartShape.of_pairs(1, 4, 64, targets=64, pairs=6)).micro_batch(0)
    model = moved(new_adapters("llama", lora))
    frozen = frozen_copy(moved(model, seed=8)) if has_frozen_adapters else None
    adapters, weights = eqx.partition(model, trainable_filter(model))
    (_, (policy, reference)), together = gradients(side_by_side)(adapters, weights, frozen, micro)
    (_, expected), alone = gradients(policy_alone)(adapters, weights, None, micro)
    expected_reference = score_responses(reference_model(model, frozen), micro)
    for found, wanted in ((policy, expected), (reference, expected_reference)):
        for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            # Sums of a few dozen log-probs, float32.
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
    scale = float(margin(expected_reference))
    assert abs(scale) > 0.1
    for mine, theirs in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(mine, scale * theirs, rtol=1e-4, atol=1e-5 * np.abs(scale * theirs).max())


@pytest.mark.parametrize("checkpointing", ["none", "products", "full"])
def test_the_reference_beside_the_policy_leaves_nothing_for_the_backward_pass(checkpointing):
    """What it takes is a fraction of what the policy keeps of its layers, of which there are many."""
    config, compute = dataclasses.replace(LLAMA, num_layers=24), ComputeConfig(checkpointing)
    model = eqx.filter_eval_shape(lambda: loraize(CausalLM.init(config, compute, key=KEY), LoraConfig(r=4), key=KEY))
    adapters, weights = eqx.partition(model, trainable_filter(model))
    micro = packed(
        table_of(random_pairs(40, seed=1)), PartShape.of_pairs(1, 8, 256, targets=256, pairs=40)
    ).micro_batch(0)

    def temporary_bytes(function):
        compiled = gradients(function).lower(adapters, weights, None, micro).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    states = 8 * 256 * config.hidden_size * 4  # of one layer, float32
    assert temporary_bytes(side_by_side) < temporary_bytes(policy_alone) + 12 * states


def test_weights_split_over_devices_are_gathered_once_for_both():
    placement = Placement(MeshConfig({"data": 8}))
    model = placement.put_parameters(moved(new_adapters()))
    adapters, weights = eqx.partition(model, trainable_filter(model))
    batch = packed(table_of(random_pairs(16, seed=1)), PartShape.of_pairs(1, 8, 128, targets=128, pairs=16))
    micro = placement.put_batch(batch).micro_batch(0)
    embed = LLAMA.hidden_size

    def gathers_of_weights(function) -> int:
        with placement.scope():
            text = gradients(function).lower(adapters, weights, None, micro).compile().as_text()
        found = re.findall(r"= f32\[([\d,]+)\]\S* all-gather(?:-start)?\(", text)
        return sum(str(embed) in shape.split(",") for shape in found)

    assert 0 < gathers_of_weights(side_by_side) <= gathers_of_weights(policy_alone) + 1  # the head's, in another loop
