"""K responses in one example are what their comparisons are as rows of their own; a labelled answer trains too."""

import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_pairs import VOCAB, moved, new_adapters
from tiny_runs import preference_rows, run_config, training_metrics, write_rows

from lora_dpo_jax import log_probs
from lora_dpo_jax.data.batches import packed_batches
from lora_dpo_jax.data.config import FormatConfig
from lora_dpo_jax.data.examples import TokenizedExample
from lora_dpo_jax.data.memory import MemoryExamples
from lora_dpo_jax.data.rows import read_example
from lora_dpo_jax.data.shapes import choose_shapes
from lora_dpo_jax.data.sources import RowError
from lora_dpo_jax.data.table import ExampleTable, whole_table
from lora_dpo_jax.evaluation import Scorer
from lora_dpo_jax.lora import unwrap_lora
from lora_dpo_jax.losses import Dpo
from lora_dpo_jax.main.train import main
from lora_dpo_jax.objective import ExampleLosses, Mean
from lora_dpo_jax.preference_objective import PreferenceObjective
from lora_dpo_jax.runs.assembly import load_tables
from lora_dpo_jax.runs.base import load_tokenizer
from lora_dpo_jax.training.step import Accumulated, accumulate, micro_batches

pytestmark = pytest.mark.usefixtures("two_devices")

ALL_SIX = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))


def ranked_lists(count: int) -> list[TokenizedExample]:
    rng = np.random.default_rng(0)

    def tokens(longest: int) -> np.ndarray:
        return rng.integers(0, VOCAB, rng.integers(4, longest)).astype(np.int32)

    return [TokenizedExample(tokens(30), tuple(tokens(12) for _ in range(4)), ALL_SIX) for _ in range(count)]


def as_pairs(examples: list[TokenizedExample]) -> list[TokenizedExample]:
    """Each comparison by itself, with its weight."""
    return [
        TokenizedExample(x.prompt, (x.responses[chosen], x.responses[rejected]), ((0, 1),), weights=(weight,))
        for x in examples
        for (chosen, rejected), weight in zip(x.comparisons, x.comparison_weights, strict=True)
    ]


def in_memory(examples) -> ExampleTable:
    return whole_table({"memory": MemoryExamples(examples)})


def accumulated(table: ExampleTable, objective, **options) -> tuple[Accumulated, float]:
    """Of one step over the whole table; and the tokens that it computes."""
    ids = [np.arange(len(table))]
    shapes = choose_shapes(ids, table.sizes, longest_row=256)
    (batch,) = packed_batches(table, ids, shapes, place=lambda batch: jax.tree.map(jnp.asarray, batch), **options)
    model = moved(new_adapters())
    found = jax.jit(lambda model, batch: accumulate(objective, model, None, batch, key=None))(model, batch)
    return found, sum(float((part.segment_ids.array > 0).sum()) for part in batch)


def test_four_ranked_answers_are_the_six_comparisons_as_rows_of_their_own():
    lists = ranked_lists(3)
    together, tokens = accumulated(in_memory(lists), PreferenceObjective(Dpo(beta=0.3)))
    apart, tokens_apart = accumulated(in_memory(as_pairs(lists)), PreferenceObjective(Dpo(beta=0.3)))
    # Three examples whose weights add up to one, and eighteen with a sixth each: the means differ by that.
    assert float(together.loss) == pytest.approx(6 * float(apart.loss), abs=1e-6)
    for mine, theirs in zip(jax.tree.leaves(together.gradients), jax.tree.leaves(apart.gradients), strict=True):
        np.testing.assert_allclose(mine, 6 * theirs, atol=1e-6)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(together.gradients)) > 1e-3
    assert tokens < 0.45 * tokens_apart
    for name in ("dpo_accuracy", "rewards/margins"):
        assert float(together.metrics[name].value) == pytest.approx(float(apart.metrics[name].value), abs=1e-5)


def test_dropout_draws_for_each_token_of_many_answers_on_its_own():
    rng = np.random.default_rng(0)
    responses = tuple(rng.integers(0, VOCAB, 8).astype(np.int32) for _ in range(7))
    table = in_memory([TokenizedExample(responses[0], responses, ((0, 6),))])
    ids = [np.arange(1)]
    shapes = choose_shapes(ids, table.sizes, longest_row=256)
    (batch,) = packed_batches(table, ids, shapes, place=lambda batch: jax.tree.map(jnp.asarray, batch))
    micro = next(micro_batches(batch))
    key = log_probs._token_key(jax.random.key(0), micro)
    assert key is not None
    numbers = np.stack([np.asarray(number.array)[np.asarray(micro.segment_ids.array) > 0] for number in key.token])
    assert len({*map(tuple, numbers.T)}) == numbers.shape[1] >= 8 + 7 * 7


def test_the_share_of_an_example_does_not_depend_on_how_many_comparisons_it_has():
    lists = ranked_lists(2)
    pair = as_pairs(lists)[0]
    pair = TokenizedExample(pair.prompt, pair.responses, pair.comparisons)
    losses = [float(accumulated(in_memory([x]), PreferenceObjective(Dpo()))[0].loss) for x in (lists[1], pair)]
    together, _ = accumulated(in_memory([lists[1], pair]), PreferenceObjective(Dpo()))
    assert float(together.loss) == pytest.approx(sum(losses) / 2, abs=1e-6)


@pytest.mark.parametrize("rows", [1, 3])
def test_every_response_is_scored_once_whatever_the_number_of_them(rows):
    lists = ranked_lists(3)
    mixed = [lists[0], TokenizedExample(lists[1].prompt, lists[1].responses[:1]), as_pairs(lists)[7], lists[2]]
    model = moved(new_adapters())
    together = Scorer(in_memory(mixed), rows=rows)(model)
    alone = [
        float(Scorer(in_memory([TokenizedExample(x.prompt, (response,))]), rows=1)(model).log_probs.array[0])
        for x in mixed
        for response in x.responses
    ]
    # float32 sums over some twelve tokens, in rows of another shape.
    np.testing.assert_allclose(together.log_probs.array, alone, rtol=1e-5)
    np.testing.assert_array_equal(together.tokens.array, [len(r) for x in mixed for r in x.responses])


class ByLabel:
    """An objective for single answers: likelier where the label is 1, less likely where it is 0."""

    def __call__(self, model, reference, micro, /, *, key):
        policy, theirs = PreferenceObjective(Dpo()).scores(model, reference, micro, key=key)
        assert theirs is not None
        examples = micro.examples
        reward, label = 0.1 * (policy.log_probs - theirs.log_probs), examples.columns["label"]
        loss = hax.where(examples.is_response, -hax.nn.log_sigmoid(hax.where(label > 0, reward, -reward)), 0.0)
        return ExampleLosses(
            examples.sum_of_responses(loss), {"rewards/desirable": Mean.over(reward, hax.where(label > 0, 1.0, 0.0))}
        )


def test_single_answers_with_labels_pass_through_rows_batch_and_scores():
    rows = [
        {"prompt": [{"role": "user", "content": "Hi"}], "completion": "Hello", "label": True},
        {"prompt": "Hi", "completion": "Go away", "label": 0},
    ]
    read = [read_example(row, FormatConfig(type="unpaired"), f"row {n}") for n, row in enumerate(rows)]
    assert [len(example.responses) for example in read] == [1, 1]
    assert [example.columns["label"] for example in read] == [[1.0], [0.0]]
    assert {example.comparisons for example in read} == {()}
    rng = np.random.default_rng(1)
    examples = [
        TokenizedExample(
            rng.integers(0, VOCAB, 5).astype(np.int32), (rng.integers(0, VOCAB, 4).astype(np.int32),), columns=x.columns
        )
        for x in read
    ]
    found, _ = accumulated(in_memory(examples), ByLabel(), columns=["label"])
    scores = [Scorer(in_memory(examples), rows=1)(model).log_probs.array for model in models()]
    reward = 0.1 * (scores[0] - scores[1])
    expected = np.logaddexp(0, -reward * np.array([1, -1]))
    assert float(found.loss) == pytest.approx(expected.mean(), abs=1e-6)
    assert float(found.metrics["rewards/desirable"].value) == pytest.approx(float(reward[0]), abs=1e-5)


def models():
    model = moved(new_adapters())
    return model, unwrap_lora(model)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "Hi", "completion": "Yes"}, "'label' is null; needed: true or false"),
        ({"prompt": "Hi", "completion": "Yes", "label": "true"}, "'label' is a string; needed: true or false"),
        ({"prompt": "Hi", "label": True}, "has no 'completion'"),
        ({"completion": "Yes", "label": True}, "has no prompt"),
    ],
)
def test_an_unpaired_row_that_lacks_something_is_named(row, message):
    with pytest.raises(RowError, match=f"train.jsonl, row 3.*{message}"):
        read_example(row, FormatConfig(type="unpaired"), "train.jsonl, row 3")


def test_ranked_rows_train_and_evaluate_by_the_command(tmp_path):
    question_mark = [{"role": "assistant", "content": "?"}]
    rows = [
        {"prompt": row["prompt"], "responses": [row["rejected"], row["chosen"], question_mark], "scores": [1, 2, 0]}
        for row in preference_rows(12)
    ]
    config = run_config(
        tmp_path,
        write_rows(tmp_path / "train.jsonl", rows),
        validation_split_fraction=0.25,
        data__components__prefs__format={"type": "ranked", "comparisons": "adjacent"},
    )
    main(config)
    first, second = training_metrics(config)
    assert first["train/loss"] == pytest.approx(np.log(2), abs=1e-5) and second["train/loss"] != first["train/loss"]
    tables = load_tables(config, load_tokenizer(config))
    assert [list(table.counts) for table in tables] == [[9], [3]]
    assert all(len(table.arrays.comparisons) == 2 * len(table) for table in tables)
