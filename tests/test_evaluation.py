"""Every pair is scored exactly once, whatever the batches."""

import numpy as np
import pytest
from tiny_pairs import moved, new_adapters, plain_sequences, random_pairs, response_log_probs, table_of

from lora_dpo_jax.data.memory import MemoryExamples
from lora_dpo_jax.evaluation import Scorer, summarize
from lora_dpo_jax.lora import unwrap_lora
from lora_dpo_jax.losses import Dpo, Examples

ALL = random_pairs(16, seed=7)


@pytest.fixture(scope="module")
def model():
    return moved(new_adapters())


@pytest.fixture(scope="module")
def truth(model):
    """float32 [pair, chosen / rejected] of policy and reference, each response a sequence of its own."""
    return [
        np.asarray(response_log_probs(m, *plain_sequences(ALL))).reshape(-1, 2) for m in (model, unwrap_lora(model))
    ]


def examples(count: int) -> Examples:
    return MemoryExamples(ALL.examples[:count]).arrays.examples


def scores(pairs: MemoryExamples, model, rows: int):
    scorer = Scorer(table_of(pairs), rows=rows)
    policy, reference = scorer(model), scorer(unwrap_lora(model))
    return policy, reference


@pytest.mark.parametrize("count, rows", [(1, 4), (7, 2), (13, 1)])
def test_the_last_partial_batch_is_exact(model, truth, count, rows):
    policy, reference = scores(MemoryExamples(ALL.examples[:count]), model, rows)
    for ours, expected in zip((policy, reference), truth, strict=True):
        # Sums of a dozen log-probs of a few nats each, in float32.
        np.testing.assert_allclose(ours.log_probs.array, expected[:count].reshape(-1), rtol=1e-5)
    lengths = [len(response) for pair in ALL.examples[:count] for response in pair.responses]
    np.testing.assert_array_equal(policy.tokens.array, lengths)

    (policy_truth, reference_truth), loss = [x[:count].astype(np.float64) for x in truth], Dpo(beta=0.1)
    rewards = 0.1 * (policy_truth - reference_truth)
    margins = rewards[:, 0] - rewards[:, 1]
    expected = {
        "loss": np.log1p(np.exp(-margins)).mean(),
        "dpo_loss": np.log1p(np.exp(-margins)).mean(),
        "dpo_accuracy": (margins > 0).mean(),
        "rewards/accuracies": (margins > 0).mean(),
        "rewards/margins": margins.mean(),
        "rewards/chosen": rewards[:, 0].mean(),
        "dpo_margin_ref": (reference_truth[:, 0] - reference_truth[:, 1]).mean(),
        "logps/rejected": policy_truth[:, 1].mean(),
    }
    summary = summarize(loss, policy, reference, examples(count))
    # Differences of log-probs of some 50 nats: float32 leaves them 1e-5 nats.
    assert {name: summary[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_the_order_of_pairs_does_not_matter(model):
    order = np.random.default_rng(0).permutation(13)
    pairs, shuffled = MemoryExamples(ALL.examples[:13]), MemoryExamples([ALL.examples[i] for i in order])
    one, other = scores(pairs, model, rows=1), scores(shuffled, model, rows=1)
    for ours, theirs in zip(one, other, strict=True):
        np.testing.assert_allclose(
            np.asarray(ours.log_probs.array).reshape(-1, 2)[order].reshape(-1), theirs.log_probs.array, rtol=1e-5
        )
    assert summarize(Dpo(), *one, examples(13)) == pytest.approx(
        summarize(Dpo(), *other, examples(13)), rel=1e-5, abs=1e-5
    )


def test_a_scorer_compiles_once_for_all_its_batches_and_shows_progress(model):
    scorer = Scorer(table_of(MemoryExamples(ALL.examples[:13])), rows=1)
    compilations = scorer._scores._compiled._cached._cache_size  # of all scorers
    before, seen = compilations(), []

    def progress(batches, total):
        for batch in batches:
            seen.append(batch)
            yield batch
        assert len(seen) == total > 1

    scorer(model, progress)
    scorer(model)
    assert compilations() <= before + 1
