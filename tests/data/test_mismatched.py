"""Each answer is the second response to another prompt, whatever the components and the part of the data."""

import dataclasses
import logging

import numpy as np
import pytest

from lora_dpo_jax.data.examples import ExampleArrays, TokenizedExample
from lora_dpo_jax.data.memory import MemoryExamples
from lora_dpo_jax.data.mismatched import with_mismatched_answers
from lora_dpo_jax.data.table import ExampleTable, split_by_prompt, whole_table


def answers(prompts: list[int], name: str, *, first: int = 0) -> MemoryExamples:
    """Answer k is k, k, ..., of k + 1 tokens."""
    made = []
    for number, prompt in enumerate(prompts, start=first):
        columns = {"label": [float(number % 2)], "rating": [number / 8], "example_weight": 1.0}
        tokens = np.array([100, prompt], np.int32), (np.full(number + 1, number, np.int32),)
        made.append(TokenizedExample(*tokens, columns=columns))
    return MemoryExamples(made, name)


def components() -> dict[str, MemoryExamples]:
    """Three answers to prompt 3, two to each of 1 and 9, and one to others."""
    return {"a": answers([3, 3, 1, 5, 6, 9], "a"), "b": answers([3, 1, 7, 9, 8], "b", first=6)}


def mismatched(table: ExampleTable) -> list[int]:
    return [int(example.responses[1][0]) for example in table]


def test_each_answer_is_lent_once_to_another_prompt():
    table = with_mismatched_answers(whole_table(components()), seed=0, longest=64)
    assert sorted(mismatched(table)) == list(range(11))
    prompts = [int(example.prompt[1]) for example in table]
    assert all(prompts[number] != prompt for number, prompt in zip(mismatched(table), prompts, strict=True))
    assert mismatched(table) == mismatched(with_mismatched_answers(whole_table(components()), seed=0, longest=64))
    assert mismatched(table) != mismatched(with_mismatched_answers(whole_table(components()), seed=1, longest=64))


def test_the_arrays_are_those_of_the_examples():
    table = with_mismatched_answers(whole_table(components()), seed=0, longest=8)
    assert table.arrays.to_bytes() == ExampleArrays.of(list(table), table.origin).to_bytes()
    for number, example in enumerate(table):
        other = mismatched(table)[number]
        assert example.responses[0].tolist() == [number] * (number + 1)
        assert len(example.responses[1]) == min(other + 1, 8 - 2), "cut where it would be too long"
        assert example.columns["label"] == [number % 2, -1.0]
        assert example.columns["rating"] == [number / 8, other / 8]
    assert table.origin(7) == "b, row 1"


def test_what_is_scored_of_an_answer_is_scored_where_it_is_lent():
    made = []
    for number, answer in enumerate(answers([3, 3, 1, 5, 6, 9], "a")):
        # The first tokens are context; of answer 1 all are scored.
        mask = np.arange(number + 1) >= (0 if number == 1 else number - 1)
        made.append(dataclasses.replace(answer, scored=(mask,)))
    source, longest = MemoryExamples(made, "a"), 6
    for indices in (np.arange(6), np.array([0, 2, 3, 4])):
        lent = with_mismatched_answers(ExampleTable({"a": (source, indices)}), seed=0, longest=longest)
        for other, example in zip(mismatched(lent), lent, strict=True):
            kept = made[other].scored[0][: longest - 2]
            found = np.ones(len(kept), bool) if example.scored is None else example.scored[1]
            assert found.tolist() == (kept if kept.any() else ~kept).tolist()
        assert lent.arrays.to_bytes() == ExampleArrays.of(list(lent), lent.origin).to_bytes()
        whole = lent.components[0][0]  # with the rows that are not in the table
        assert whole.arrays.to_bytes() == ExampleArrays.of(list(whole), whole.origin).to_bytes()


def test_a_part_of_the_data_borrows_from_itself_alone():
    tables = split_by_prompt(components(), 0.5, seed=0)
    train, held_out = (with_mismatched_answers(table, seed=0, longest=64) for table in tables)
    assert len(train) and len(held_out)
    for table in (train, held_out):
        assert sorted(mismatched(table)) == sorted(int(example.responses[0][0]) for example in table)
    assert [source.checksums for source, _ in train.components] == [x.checksums for x in components().values()]
    fingerprints = {source.fingerprint for table in (train, held_out) for source, _ in table.components}
    assert len(fingerprints) == 4, "the reference's log-probs of one are not those of another"


def test_a_prompt_that_most_answers_have_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        table = with_mismatched_answers(whole_table({"a": answers([3, 3, 3, 1], "a")}), seed=0, longest=64)
    assert "2 of 4 answers are paired with an answer to the same prompt" in caplog.text
    assert sorted(mismatched(table)) == [0, 1, 2, 3]
    with caplog.at_level(logging.WARNING):
        assert mismatched(with_mismatched_answers(whole_table({"a": answers([3], "a")}), seed=0, longest=64)) == [0]
    assert "1 of 1 answers" in caplog.text


def test_a_part_without_answers_stays_empty():
    _, held_out = split_by_prompt(components(), 0.0, seed=0)
    assert len(with_mismatched_answers(held_out, seed=0, longest=64)) == 0


@pytest.mark.parametrize("count", [0, 2, 7])
def test_tables_of_any_size_have_partners(count):
    table = with_mismatched_answers(whole_table({"a": answers(list(range(count)), "a")}), seed=0, longest=64)
    assert sorted(mismatched(table)) == list(range(count)) and all(x != n for n, x in enumerate(mismatched(table)))
