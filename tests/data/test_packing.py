"""Rows hold what they should, and pairs packed into them have the log-probs of plain sequences."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_pairs import (
    moved,
    new_adapters,
    packed,
    plain_sequences,
    random_pairs,
    response_log_probs,
    table_of,
)

from lora_dpo_jax.data import packing
from lora_dpo_jax.data.examples import TokenizedExample
from lora_dpo_jax.data.memory import MemoryExamples
from lora_dpo_jax.data.packing import PreferenceBatch, pack
from lora_dpo_jax.data.shapes import PartShape
from lora_dpo_jax.log_probs import score_responses
from lora_dpo_jax.lora import trainable_filter


def drawing() -> dict[str, list[str]]:
    """The lines of the picture at the top of the module."""
    lines = [line.split() for line in (packing.__doc__ or "").splitlines()]
    names = ("tokens", "segment_ids", "branch_ids", "position_ids")
    return {line[0]: line[1 : 1 + 15] for line in lines if line and line[0] in names}


def test_rows_are_laid_out_as_the_drawing_shows():
    letters = {letter: i for i, letter in enumerate(".pcrqde")}

    def pair(prompt: str, chosen: str, rejected: str) -> TokenizedExample:
        return TokenizedExample.pair(
            *(np.array([letters[x] for x in tokens], np.int32) for tokens in (prompt, chosen, rejected))
        )

    pairs = MemoryExamples([pair("ppp", "cc", "rrr"), pair("qq", "d", "ee")])
    batch = pack(
        pairs, [np.array([0, 1])], PartShape.of_pairs(micro_batches=1, rows=1, row_length=15, targets=9, pairs=3)
    )
    drawn = drawing()
    assert len(drawn) == 4
    for name, line in drawn.items():
        expected = [letters[x] for x in line] if name == "tokens" else [int(x) for x in line]
        assert getattr(batch, name).array[0, 0].tolist() == expected, name

    assert batch.examples.ids.array[0, 0].tolist() == [0, 1, -1]
    assert batch.response_tokens.array[0, 0].tolist() == [2, 3, 1, 2, 0, 0]
    assert batch.examples.example_of_response.array[0, 0].tolist() == [0, 0, 1, 1, -1, -1]
    assert batch.examples.chosen.array[0, 0].tolist() == [0, 2, 0]
    assert batch.examples.rejected.array[0, 0].tolist() == [1, 3, 0]
    assert batch.examples.example_of_comparison.array[0, 0].tolist() == [0, 1, -1]
    assert batch.examples.weight.array[0, 0].tolist() == [1, 1, 0]
    # c c r r r d e e: each from the token before it, the first ones from the prompt's last.
    assert batch.source.array[0, 0].tolist() == [2, 3, 2, 5, 6, 9, 9, 11, 0]
    assert batch.target_ids.array[0, 0].tolist() == [letters[x] for x in "ccrrrdee."]
    assert batch.target_response.array[0, 0].tolist() == [0, 0, 1, 1, 1, 2, 3, 3, -1]


def test_without_a_shared_prefix_each_branch_begins_with_the_prompt():
    pairs = MemoryExamples([TokenizedExample.pair(*(np.array(x, np.int32) for x in ([7, 8], [1], [2, 3])))])
    layout = PartShape.of_pairs(micro_batches=1, rows=1, row_length=8, targets=4, pairs=1)
    batch = pack(pairs, [np.array([0])], layout, share_prefix=False)
    assert batch.tokens.array[0, 0].tolist() == [7, 8, 1, 7, 8, 2, 3, 0]
    assert batch.branch_ids.array[0, 0].tolist() == [1, 1, 1, 2, 2, 2, 2, 0]
    assert batch.position_ids.array[0, 0].tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    assert batch.source.array[0, 0].tolist() == [1, 4, 5, 0]


def test_responses_on_either_side_of_a_models_switch_do_not_share_their_prompt():
    lengths = [(2, 1, 2), (2, 1, 3), (2, 3, 1), (4, 1, 2), (3, 1, 1)]
    pairs = [TokenizedExample.pair(*(np.ones(n, np.int32) for n in of_pair)) for of_pair in lengths]
    table = table_of(MemoryExamples(pairs)).switching_at(4)
    assert table.sizes.tokens.tolist() == [5, 8, 8, 7, 5]
    assert [pair.shares_prompt for pair in table] == [True, False, False, True, True]
    subset = table.subset(np.array([1, 3]))
    assert subset.sizes.tokens.tolist() == [8, 7] and table_of(MemoryExamples(pairs)).sizes.tokens[1] == 6
    layout = PartShape.of_pairs(micro_batches=1, rows=1, row_length=16, targets=8, pairs=2)
    batch = pack(subset, [np.array([0, 1])], layout)
    assert batch.branch_ids.array[0, 0].tolist() == [1, 1, 1, 2, 2, 2, 2, 2, 0, 0, 0, 0, 1, 2, 2, 0]


def test_more_rows_than_the_layout_has_are_an_error():
    pairs = random_pairs(3)
    with pytest.raises(ValueError, match="3 rows do not fit the 2 of PartShape"):
        pack(pairs, [np.array([i]) for i in range(3)], PartShape.of_pairs(2, 1, row_length=64, targets=64, pairs=1))


# Three blocks of attention a row; more rows and slots than any test below fills.
LAYOUT = PartShape.of_pairs(micro_batches=1, rows=13, row_length=192, targets=192, pairs=14)
PAIRS = random_pairs(12, seed=4)
PACKINGS = {
    "as tightly as can be": None,
    "one pair a row": [[i] for i in range(12)],
    "in another order": [[11, 3], [], [0, 7, 9, 1], [5], [10, 2, 4, 8, 6]],
}


WEIGHTS = jnp.asarray(np.random.default_rng(0).normal(size=(12, 2)), jnp.float32)  # {pair, chosen / rejected}


@jax.jit
def packed_scores(adapters, weights, batch: PreferenceBatch):
    """(gradients of the weighted sum of all log-probs, log-probs [row, pair, chosen / rejected])."""
    micro = batch.micro_batch(0)

    def total(adapters):
        log_probs = score_responses(eqx.combine(adapters, weights), micro)
        both = log_probs.log_probs.array.reshape(*micro.examples.ids.array.shape, 2)
        return jnp.sum(
            jnp.where(micro.examples.is_example.array[..., None], both * WEIGHTS[micro.examples.ids.array], 0.0)
        ), both

    return jax.grad(total, has_aux=True)(adapters)


@jax.jit
def plain_scores(adapters, weights):
    """The same, log-probs [pair, chosen / rejected], each response being a sequence of its own."""

    def total(adapters):
        both = response_log_probs(eqx.combine(adapters, weights), *plain_sequences(PAIRS)).reshape(12, 2)
        return jnp.sum(both * WEIGHTS), both

    return jax.grad(total, has_aux=True)(adapters)


def parts(name: str, attention: str):
    model = moved(new_adapters(name, attention=attention))
    return eqx.partition(model, trainable_filter(model))


@pytest.mark.parametrize(
    "name, attention",
    [("llama", "dense"), ("llama", "blocked"), ("llama_window", "dense"), ("qwen", "blocked")],
)
def test_packing_changes_no_log_prob_and_no_gradient(name, attention):
    """Each pair, packed in any way, is the same as its two responses as plain sequences after their own prompts."""
    expected_gradients, expected = plain_scores(*parts(name, "dense"))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected_gradients))
    batches = {packing: packed(table_of(PAIRS), LAYOUT, rows) for packing, rows in PACKINGS.items()}
    batches["each prompt twice"] = packed(table_of(PAIRS), LAYOUT, PACKINGS["one pair a row"], share_prefix=False)
    for packing_name, batch in batches.items():
        gradients, log_probs = packed_scores(*parts(name, attention), batch)
        ids = np.asarray(batch.examples.ids.array[0])
        assert not np.any(log_probs[ids < 0]), "empty rows and slots give zero"
        # Sums of up to a dozen log-probs of several nats each, float32.
        np.testing.assert_allclose(
            log_probs[ids >= 0], expected[ids[ids >= 0]], rtol=1e-5, atol=1e-5, err_msg=packing_name
        )
        for mine, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
            # Sums over all tokens, in another order: float32 of the largest terms.
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5 * largest, err_msg=packing_name)


@pytest.mark.parametrize("attention", ["dense", "blocked"])
def test_a_batch_of_nothing_gives_zero_and_no_nan(attention):
    batch = packed(table_of(PAIRS), LAYOUT, rows=[])
    gradients, log_probs = packed_scores(*parts("llama", attention), batch)
    assert not np.any(log_probs)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))
