"""Tokens that are not scored are in the rows, and in no log-prob, count or gradient of their own."""

import dataclasses

import haliax as hax
import jax
import numpy as np
import pytest
from tiny_pairs import moved, new_adapters, packed, random_answers, random_pairs, table_of

from lora_dpo_jax.axes import TARGET
from lora_dpo_jax.columns import DESIRABLE, LABEL, MISMATCHED, UNDESIRABLE, WEIGHT
from lora_dpo_jax.data.batches import packed_batches
from lora_dpo_jax.data.examples import TokenizedExample
from lora_dpo_jax.data.memory import MemoryExamples
from lora_dpo_jax.data.shapes import PartShape, choose_shapes
from lora_dpo_jax.evaluation import Scorer
from lora_dpo_jax.log_probs import score_responses
from lora_dpo_jax.losses import LOSSES, Dpo
from lora_dpo_jax.losses.scores import Scores, TokenScores
from lora_dpo_jax.losses.token_metrics import STATISTICS, token_metrics
from lora_dpo_jax.preference_objective import PreferenceObjective
from lora_dpo_jax.training.step import micro_batches


def masks_of(example):
    return [np.ones(len(x), bool) for x in example.responses] if example.scored is None else example.scored


def masked_pairs(count, seed=0):
    rng = np.random.default_rng(seed)

    def mask(size):
        scored = rng.random(size) < 0.6
        scored[rng.integers(size)] = True
        return scored

    pairs = random_pairs(count, seed=seed)
    return [
        dataclasses.replace(pair, scored=tuple(mask(len(response)) for response in pair.responses)) if n % 3 else pair
        for n, pair in enumerate(pairs)
    ]


def test_masks_of_a_table_are_those_of_its_examples():
    examples = masked_pairs(9)
    table = table_of(MemoryExamples(examples))
    for of, numbers in ((table, range(9)), (table.subset(np.array([1, 2, 5, 6])), (1, 2, 5, 6))):
        for mine, number in zip(of, numbers, strict=True):
            again = of.arrays.example(list(numbers).index(number), np.concatenate(mine.parts))
            assert again.scored is not None or all(mask.all() for mask in masks_of(mine))
            for scored in (masks_of(mine), masks_of(again)):
                for ours, theirs in zip(scored, masks_of(examples[number]), strict=True):
                    np.testing.assert_array_equal(ours, theirs)
        counts = [sum(int(mask.sum()) for mask in masks_of(x)) for x in of]
        assert of.sizes.targets.tolist() == counts
        assert of.sizes.tokens.tolist() == [x.size for x in of]
    whole = [dataclasses.replace(example, scored=None) for example in examples]
    assert MemoryExamples(examples).fingerprint != MemoryExamples(whole).fingerprint


def test_a_mask_of_another_length_is_refused():
    pair = masked_pairs(2)[1]
    short = (pair.scored[0][1:], pair.scored[1])
    as_lists = tuple(mask.tolist() for mask in pair.scored)
    assert MemoryExamples([dataclasses.replace(pair, scored=as_lists)])[0].scored[0].dtype == bool
    for scored, error in ((short, "a bool for each token"), ([np.zeros_like(x) for x in pair.scored], "at least one")):
        with pytest.raises(ValueError, match=f"memory, row 0: scored must .*{error}"):
            MemoryExamples([dataclasses.replace(pair, scored=tuple(scored))])


def test_log_probs_are_sums_over_scored_tokens_in_the_same_context():
    masked = masked_pairs(5)
    whole = [dataclasses.replace(pair, scored=None) for pair in masked]
    layout = PartShape.of_pairs(micro_batches=1, rows=2, row_length=128, targets=96, pairs=5)
    model = moved(new_adapters())
    score = jax.jit(lambda micro: score_responses(model, micro, per_token=True))
    rows = [[0, 1], [2, 3, 4]]
    found, of_all = (score(packed(table_of(MemoryExamples(x)), layout, rows).micro_batch(0)) for x in (masked, whole))
    for row, numbers in enumerate(rows):
        masks = [mask for number in numbers for mask in masks_of(masked[number])]
        of_tokens = np.split(np.asarray(of_all.per_token.log_probs.array[row]), np.cumsum([len(m) for m in masks]))
        response, index = (np.asarray(x.array[row]) for x in (found.per_token.response, found.per_token.index))
        for slot, (mask, log_probs) in enumerate(zip(masks, of_tokens, strict=False)):
            assert float(found.log_probs.array[row, slot]) == pytest.approx(log_probs[mask].sum(), abs=1e-5)
            assert int(found.tokens.array[row, slot]) == mask.sum()
            assert index[response == slot].tolist() == list(range(int(mask.sum())))


def test_losses_per_token_divide_by_the_scored_tokens():
    table = table_of(MemoryExamples(masked_pairs(4)))
    shapes = choose_shapes([np.arange(4)], table.sizes)
    assert shapes.parts[0].targets >= table.sizes.targets.max()
    scores = Scorer(table, rows=1)(moved(new_adapters()))
    tokens = [int(mask.sum()) for x in table for mask in masks_of(x)]
    assert scores.tokens.array.tolist() == tokens
    found = LOSSES["sft"]()(scores, None, table.arrays.examples).metrics["nll_loss"]
    chosen = np.asarray(scores.log_probs.array)[::2].sum() / sum(tokens[::2])
    assert float(found.value) == pytest.approx(-chosen, rel=1e-5)


def test_metrics_of_tokens_count_what_is_to_be_imitated():
    """A ranked list and a single response, against sums of their own."""
    first, second = random_pairs(2, seed=3)
    ranked = TokenizedExample(first.prompt, (*first.responses, second.responses[0]), ((0, 1), (0, 2), (2, 1)))
    single = TokenizedExample(second.prompt, second.responses[1:])
    table = table_of(MemoryExamples([ranked, single]))
    model, ids = moved(new_adapters()), [np.arange(2)]
    (batch,) = packed_batches(table, ids, choose_shapes(ids, table.sizes), place=jax.device_put)
    micro = next(micro_batches(batch))
    score = jax.jit(lambda micro: score_responses(model, micro, statistics=STATISTICS))
    policy = score(micro)
    found = token_metrics(policy, micro.examples)
    tokens = policy.per_token
    is_likeliest, entropy, response = (
        np.asarray(x.array[0])
        for x in (tokens.statistics["is_likeliest"], tokens.statistics["entropy"], tokens.response)
    )
    # Response 0 wins two of three comparisons, response 2 one; the single one counts as a whole.
    weight = np.array([2 / 3, 0, 1 / 3, 1, 0])[response]
    assert float(found["entropy"].value) == pytest.approx(entropy[response >= 0].mean(), rel=1e-5)
    expected = (weight * is_likeliest).sum() / weight.sum()
    assert float(found["mean_token_accuracy"].value) == pytest.approx(expected, abs=1e-6)


def test_undesirable_and_mismatched_answers_are_not_to_be_imitated():
    examples = random_answers(8, seed=8).arrays.examples
    labels, weights = (np.array(examples.column(name).array) for name in (LABEL, WEIGHT))
    assert set(labels) == {DESIRABLE, UNDESIRABLE, MISMATCHED}
    weights[np.argmax(labels == DESIRABLE) // 2] = 0.0
    weight = hax.named(weights, examples.column(WEIGHT).axes)
    examples = dataclasses.replace(examples, columns=examples.columns | {WEIGHT: weight})
    counts = (labels == DESIRABLE) & (np.repeat(weights, 2) > 0)
    assert examples.is_imitated.array.tolist() == counts.tolist() and 0 < counts.sum() < 8
    # One token of each response, which is the likeliest one except in those to imitate.
    rng, Target = np.random.default_rng(0), hax.Axis(TARGET, len(counts))
    found = {"entropy": hax.ones(Target), "is_likeliest": hax.named(np.where(counts, 0.0, 1.0), Target)}
    tokens = TokenScores(hax.zeros(Target), hax.arange(Target), hax.zeros(Target, dtype=int), found)
    lengths, log_probs = rng.integers(1, 9, len(counts)), -rng.uniform(1, 9, len(counts)).astype(np.float32)
    Response = examples.example_of_response.axes
    policy = Scores(hax.named(log_probs, Response), hax.named(lengths, Response), tokens)
    assert float(token_metrics(policy, examples)["mean_token_accuracy"].value) == 0.0
    losses = LOSSES["sft"]()(policy, None, examples)
    expected = -log_probs[counts].sum() / lengths[counts].sum()
    assert float(losses.metrics["nll_loss"].value) == pytest.approx(expected, rel=1e-5)
    by_weight = np.where(counts, -log_probs * np.repeat(weights, 2), 0.0).reshape(-1, 2).sum(axis=1)
    np.testing.assert_allclose(losses.loss.array, by_weight / lengths[counts].mean(), rtol=1e-5)


def test_metrics_of_tokens_cost_nothing_unless_asked_for():
    pairs = table_of(random_pairs(2))
    ids = [np.arange(2)]
    (batch,) = packed_batches(pairs, ids, choose_shapes(ids, pairs.sizes), place=jax.device_put)
    micro, model = next(micro_batches(batch)), new_adapters()
    scores = {on: jax.eval_shape(PreferenceObjective(Dpo(), on).scores, model, None, micro) for on in (False, True)}
    assert scores[False][0].per_token is None
    assert set(scores[True][0].per_token.statistics) == set(STATISTICS) and scores[True][1].per_token is None
