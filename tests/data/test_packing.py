"""Rows hold what they should, and pairs packed into them have the log-probs of plain sequences."""

import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_pairs import (
    MemoryPairs,
    moved,
    new_adapters,
    packed,
    plain_sequences,
    random_pairs,
    response_log_probs,
    table_of,
)

from lora_dpo_jax.data import packing
from lora_dpo_jax.data.chat import TokenizedPair
from lora_dpo_jax.data.packing import Layout, PreferenceBatch, pack, plan_layout, plan_rows, row_length_for
from lora_dpo_jax.log_probs import pair_log_probs
from lora_dpo_jax.lora import trainable_filter

SIZES = st.integers(1, 300).flatmap(
    lambda length: st.tuples(st.lists(st.integers(1, length), max_size=80), st.just(length))
)


@settings(deadline=None)
@given(SIZES)
def test_planned_rows_hold_every_item_once_within_their_length(sizes_and_length):
    sizes, length = sizes_and_length
    rows = plan_rows(sizes, length)
    assert sorted(item for row in rows for item in row) == list(range(len(sizes)))
    assert all(row for row in rows)
    assert all(sum(sizes[item] for item in row) <= length for row in rows)
    # Two rows never fit into one, so all but one are more than half full.
    assert len(rows) <= 2 * sum(sizes) / length + 1
    assert rows == plan_rows(sizes, length)


def test_an_item_longer_than_a_row_is_an_error():
    with pytest.raises(ValueError, match="an item of 11 tokens does not fit a row of 10"):
        plan_rows([3, 11], 10)


def test_a_hundred_thousand_pairs_are_planned_in_seconds():
    rng = np.random.default_rng(0)
    sizes = np.minimum(rng.lognormal(6.5, 0.7, 100_000).astype(int) + 2, 8192).tolist()
    start = time.perf_counter()
    rows = plan_rows(sizes, 8192)
    assert time.perf_counter() - start < 10
    assert sum(sizes) / (len(rows) * 8192) > 0.99


def drawing() -> dict[str, list[str]]:
    """The lines of the picture at the top of the module."""
    lines = [line.split() for line in (packing.__doc__ or "").splitlines()]
    names = ("tokens", "segment_ids", "branch_ids", "position_ids")
    return {line[0]: line[1 : 1 + 15] for line in lines if line and line[0] in names}


def test_rows_are_laid_out_as_the_drawing_shows():
    letters = {letter: i for i, letter in enumerate(".pcrqde")}

    def pair(prompt: str, chosen: str, rejected: str) -> TokenizedPair:
        return TokenizedPair(
            *(np.array([letters[x] for x in tokens], np.int32) for tokens in (prompt, chosen, rejected))
        )

    pairs = MemoryPairs([pair("ppp", "cc", "rrr"), pair("qq", "d", "ee")])
    batch = pack(pairs, [np.array([0, 1])], Layout(micro_batches=1, rows=1, row_length=15, targets=9, pairs=3))
    drawn = drawing()
    assert len(drawn) == 4
    for name, line in drawn.items():
        expected = [letters[x] for x in line] if name == "tokens" else [int(x) for x in line]
        assert getattr(batch, name).array[0, 0].tolist() == expected, name

    assert batch.pair_ids.array[0, 0].tolist() == [0, 1, -1]
    assert batch.chosen_tokens.array[0, 0].tolist() == [2, 1, 0]
    assert batch.rejected_tokens.array[0, 0].tolist() == [3, 2, 0]
    # c c r r r d e e: each from the token before it, the first ones from the prompt's last.
    assert batch.source.array[0, 0].tolist() == [2, 3, 2, 5, 6, 9, 9, 11, 0]
    assert batch.target_ids.array[0, 0].tolist() == [letters[x] for x in "ccrrrdee."]
    assert batch.target_slot.array[0, 0].tolist() == [0, 0, 1, 1, 1, 2, 3, 3, -1]


def test_more_rows_than_the_layout_has_are_an_error():
    pairs = random_pairs(3)
    with pytest.raises(ValueError, match="3 rows do not fit the 2 of Layout"):
        pack(pairs, [np.array([i]) for i in range(3)], Layout(2, 1, row_length=64, targets=64, pairs=1))


@settings(deadline=None, max_examples=30)
@given(
    count=st.integers(1, 40),
    batch_size=st.integers(1, 12),
    row_multiple=st.sampled_from([1, 2, 8]),
    rows_per_micro_batch=st.sampled_from([None, 1, 2, 5, 100]),
    seed=st.integers(0, 5),
)
def test_one_layout_holds_every_batch_of_a_run(count, batch_size, row_multiple, rows_per_micro_batch, seed):
    pairs = table_of(random_pairs(count, seed=seed, prompt=40, response=30))
    order = np.random.default_rng(seed).permutation(count)
    batches = [order[i : i + batch_size] for i in range(0, count, batch_size)]
    layout = plan_layout(batches, pairs.lengths, row_multiple=row_multiple, rows_per_micro_batch=rows_per_micro_batch)
    assert layout.rows % row_multiple == 0
    assert layout.row_length == row_length_for(pairs.lengths) >= pairs.lengths.sum(axis=1).max()
    if rows_per_micro_batch is None:
        assert layout.micro_batches == 1
    else:
        assert layout.rows < rows_per_micro_batch + row_multiple
    for ids in batches:
        rows = plan_rows(pairs.lengths[ids].sum(axis=1).tolist(), layout.row_length)
        batch = pack(pairs, [ids[row] for row in rows], layout)
        found = np.asarray(batch.pair_ids.array)
        assert sorted(found[found >= 0]) == sorted(ids)
        assert read_pairs(batch) == {int(i): tuple(map(list, pairs[int(i)])) for i in ids}


def read_pairs(batch: PreferenceBatch) -> dict[int, tuple[list[int], list[int], list[int]]]:
    """By id, the tokens of the pairs of a batch, read off its segments and branches."""
    found = {}
    flat = {
        name: np.asarray(getattr(batch, name).array) for name in ("tokens", "segment_ids", "branch_ids", "pair_ids")
    }
    flat = {name: array.reshape(-1, array.shape[-1]) for name, array in flat.items()}
    for tokens, segments, branches, ids in zip(*flat.values(), strict=True):
        for slot, pair_id in enumerate(ids):
            if pair_id >= 0:
                found[int(pair_id)] = tuple(
                    tokens[(segments == slot + 1) & (branches == branch)].tolist() for branch in range(3)
                )
    return found


# Three blocks of attention a row; more rows and slots than any test below fills.
LAYOUT = Layout(micro_batches=1, rows=13, row_length=192, targets=192, pairs=14)
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
        log_probs = pair_log_probs(eqx.combine(adapters, weights), micro)
        both = jnp.stack([log_probs.chosen.array, log_probs.rejected.array], axis=-1)
        return jnp.sum(jnp.where(micro.is_pair.array[..., None], both * WEIGHTS[micro.pair_ids.array], 0.0)), both

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
    for packing_name, rows in PACKINGS.items():
        batch = packed(table_of(PAIRS), LAYOUT, rows)
        gradients, log_probs = packed_scores(*parts(name, attention), batch)
        ids = np.asarray(batch.pair_ids.array[0])
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
