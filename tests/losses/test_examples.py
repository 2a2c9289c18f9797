"""Arrays of examples say which responses are compared, in rows of slots as in one long table."""

import haliax as hax
import jax
import numpy as np
import pytest
from tiny_pairs import named

from lora_dpo_jax.data.batches import packed_batches
from lora_dpo_jax.data.examples import TokenizedExample
from lora_dpo_jax.data.memory import MemoryExamples
from lora_dpo_jax.data.packing import pack
from lora_dpo_jax.data.shapes import PartShape, choose_shapes
from lora_dpo_jax.data.table import whole_table
from lora_dpo_jax.losses import Examples
from lora_dpo_jax.losses.examples import add_up, take
from lora_dpo_jax.objective import Mean

IDS = np.array([1, 2, 3], np.int32)
PAIR = TokenizedExample(IDS, (IDS, IDS[:2]), ((0, 1),), columns={"margin": 0.5, "rating": [2.0, 1.0]})
LIST = TokenizedExample(
    IDS, (IDS, IDS[:2], IDS[:1]), ((0, 1), (0, 2), (1, 2)), columns={"margin": 0.25, "rating": [3.0, 2.0, 1.0]}
)
SHAPE = PartShape(1, 1, row_length=32, targets=16, examples=3, responses=6, comparisons=5)


def in_a_table() -> Examples:
    return MemoryExamples([PAIR, LIST]).arrays.examples


def in_a_row() -> Examples:
    table = MemoryExamples([PAIR, LIST])
    columns = {name: column.per_response for name, column in table.arrays.columns.items()}
    return pack(table, [np.array([0, 1])], SHAPE, columns=columns).micro_batch(0).examples


def used(array: hax.NamedArray, count: int) -> list:
    """Without the empty slots at the end, and without the row."""
    return np.asarray(array.array).reshape(-1)[:count].tolist()


@pytest.mark.parametrize("make", [in_a_table, in_a_row])
def test_the_arrays_are_those_of_the_drawing(make):
    examples = make()
    assert used(examples.example_of_response, 5) == [0, 0, 1, 1, 1]
    assert used(examples.chosen, 4) == [0, 2, 2, 3]
    assert used(examples.rejected, 4) == [1, 3, 4, 4]
    assert used(examples.example_of_comparison, 4) == [0, 1, 1, 1]
    np.testing.assert_allclose(used(examples.weight, 4), [1, 1 / 3, 1 / 3, 1 / 3])
    np.testing.assert_allclose(used(examples.share, 4), [1, 1 / 3, 1 / 3, 1 / 3], rtol=1e-6)
    assert used(examples.columns["margin"], 2) == [0.5, 0.25]
    assert used(examples.columns["rating"], 5) == [2, 1, 3, 2, 1]
    assert used(examples.of_comparisons(examples.columns["margin"]), 4) == [0.5, 0.25, 0.25, 0.25]
    chosen, rejected = examples.compared(examples.columns["rating"])
    assert (used(chosen, 4), used(rejected, 4)) == ([2, 3, 3, 2], [1, 2, 1, 1])
    assert used(examples.sum_of_responses(examples.columns["rating"]), 2) == [3, 6]


def test_a_row_says_nothing_of_its_empty_slots():
    examples = in_a_row()
    assert not np.any(examples.is_example.array[0, 2:]) and not np.any(examples.is_response.array[0, 5:])
    assert not np.any(examples.weight.array[0, 4:]) and not np.any(examples.share.array[0, 4:])


def test_weights_of_the_data_scale_a_loss_and_shares_do_not():
    weighted = TokenizedExample(IDS, PAIR.responses, PAIR.comparisons, weights=(0.25,))
    examples = MemoryExamples([weighted]).arrays.examples
    assert (used(examples.weight, 1), used(examples.share, 1)) == ([0.25], [1.0])


@pytest.mark.parametrize("rows", [(), (2,)])
def test_adding_up_is_the_transpose_of_taking(rows):
    rng = np.random.default_rng(0)
    index = named(rng.integers(-1, 4, (*rows, 7)), *["row"][: len(rows)], "slot")
    values = named(rng.normal(size=(*rows, 4)).astype(np.float32), *["row"][: len(rows)], "example")
    back = named(rng.normal(size=(*rows, 7)).astype(np.float32), *["row"][: len(rows)], "slot")
    taken, pull = jax.vjp(lambda values: take(values, "example", index), values)
    expected = np.where(index.array >= 0, np.take_along_axis(values.array, np.maximum(index.array, 0), axis=-1), 0)
    np.testing.assert_array_equal(taken.array, expected)
    np.testing.assert_allclose(pull(back)[0].array, add_up(back, index, values.axes[-1]).array, rtol=1e-6)


def test_nan_in_one_slot_reaches_no_other():
    values = named([1.0, np.nan, 3.0], "example")
    in_rows = hax.named(values.array[None], (hax.Axis("row", 1), *values.axes))
    index = named(np.array([[0, 2, -1]]), "row", "slot")
    assert take(in_rows, "example", index).array.tolist() == [[1.0, 3.0, 0.0]]
    assert float(Mean.over(in_rows, named([[1.0, 0.0, 1.0]], "row", "example")).value) == 2.0


@pytest.mark.parametrize(
    "example, message",
    [
        (
            TokenizedExample(IDS, (IDS,), ((0, 1),)),
            r"mine, row 1: comparison \(0, 1\) must name two of its 1",
        ),
        (TokenizedExample(IDS, (IDS, IDS), ((1, 1),)), r"row 1: comparison \(1, 1\) must name two"),
        (TokenizedExample(IDS, (IDS, IDS), ((0, 1),), (1.0, 2.0)), "row 1: has 2 weights for 1 comparisons"),
        (TokenizedExample(IDS, (IDS, IDS), ((0, 1),), (-1.0,)), "row 1: weights of comparisons must be finite"),
        (TokenizedExample(IDS, ()), "row 1: an example needs at least one response"),
        (TokenizedExample.pair(IDS, IDS, IDS, margin=1.0), r"row 1: has the columns \['margin'\], and the first"),
    ],
)
def test_an_example_that_is_not_sound_is_named(example, message):
    with pytest.raises(ValueError, match=message):
        MemoryExamples([TokenizedExample.pair(IDS, IDS, IDS[:1]), example], "mine")


@pytest.mark.parametrize("value", [[1.0], [1.0, 2.0, 3.0], np.nan, "x"])
def test_a_column_is_a_number_or_one_for_each_response(value):
    with pytest.raises(ValueError, match="column 'rating'"):
        MemoryExamples([TokenizedExample.pair(IDS, IDS, IDS[:1], rating=value)])


def test_a_column_that_the_batch_lacks_is_named_with_those_that_it_has():
    with pytest.raises(ValueError, match=r"has the columns \['margin', 'rating'\], but the loss reads 'trust'"):
        in_a_row().column("trust")


def test_batches_have_all_columns_unless_some_are_chosen():
    table = whole_table({"mine": MemoryExamples([PAIR, LIST])})
    ids, shapes = [np.arange(2)], choose_shapes([np.arange(2)], table.sizes)
    for chosen, expected in ((None, {"margin", "rating"}), (("margin",), {"margin"}), ((), set())):
        (parts,) = packed_batches(table, ids, shapes, place=lambda batch: batch, columns=chosen)
        assert all(part.examples.columns.keys() == expected for part in parts)
