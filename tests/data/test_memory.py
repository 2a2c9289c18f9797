"""Pairs in memory are what the same pairs are on disk."""

import numpy as np
import pytest

from lora_dpo_jax.data.memory import MemoryExamples
from lora_dpo_jax.data.table import split_by_prompt, whole_table

IDS = [([1, 2], [3], [4, 5]), (np.array([1, 2], np.int64), (6,), [7]), ([8], [3], [4, 5])]


def test_ids_of_any_kind_become_pairs():
    pairs = MemoryExamples(IDS, "mine")
    assert [[part.tolist() for part in pair.parts] for pair in pairs] == [[list(part) for part in pair] for pair in IDS]
    assert {part.dtype for pair in pairs for part in pair.parts} == {np.dtype(np.int32)}
    assert pairs.arrays.prompt_tokens.tolist() == [2, 2, 1]
    assert pairs.arrays.response_tokens.tolist() == [1, 2, 1, 1, 1, 2]
    assert pairs.origin(2) == "mine, row 2"


def test_pairs_of_one_prompt_stay_together():
    prompts = [[n // 5] for n in range(100)]
    pairs = MemoryExamples(([*prompt], [n], [n + 1]) for n, prompt in enumerate(prompts))
    train, held_out = split_by_prompt({"mine": pairs}, 0.2, seed=0)
    assert len(held_out) == 20 and len({pair.prompt.item() for pair in held_out}) == 4
    assert not {pair.prompt.item() for pair in held_out} & {pair.prompt.item() for pair in train}


def test_other_pairs_have_another_fingerprint():
    """Where parts meet counts too."""
    moved = [([1, 2], [3, 4], [5]), *IDS[1:]]
    fingerprints = {MemoryExamples(ids).fingerprint for ids in (IDS, moved, IDS[:2], IDS[::-1])}
    assert len(fingerprints) == 4
    assert MemoryExamples(IDS, "other name").fingerprint == MemoryExamples(IDS).fingerprint


def test_no_pairs_are_a_table_too():
    assert len(whole_table({"none": MemoryExamples([])})) == 0


@pytest.mark.parametrize(
    "pair, message",
    [
        (([1], [2]), "mine, row 1: a pair is .prompt, chosen, rejected., but has 2 parts"),
        (([], [2], [3]), "mine, row 1: prompt must be one or more token ids, but is of shape .0,."),
        (([1], [2.5], [3]), "row 1: chosen .* float64"),
        (([1], [2], [[3]]), "row 1: rejected .* shape .1, 1."),
        (([1], [2], [-100]), "row 1: rejected .*-100"),
    ],
)
def test_what_is_no_pair_is_named(pair, message):
    with pytest.raises(ValueError, match=message):
        MemoryExamples([IDS[0], pair], "mine")
