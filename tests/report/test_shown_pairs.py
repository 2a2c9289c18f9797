"""Log-ratios of single tokens: they add up to those of responses, however many there are and whatever is scored."""

import numpy as np
import pytest
from tiny_pairs import VOCAB, moved, new_adapters, table_of

from lora_dpo_jax.data.examples import TokenizedExample
from lora_dpo_jax.data.memory import MemoryExamples
from lora_dpo_jax.evaluation import Scorer
from lora_dpo_jax.lora import reference_model
from lora_dpo_jax.runs.shown_pairs import most_right_and_wrong
from lora_dpo_jax.training.step import TrainState


class Letters:
    """A tokenizer of one letter for each id."""

    def decode(self, ids, **_) -> str:
        return "".join(chr(0x4E00 + i) for i in ids)


def ranked(rng: np.random.Generator) -> TokenizedExample:
    """Three responses with three comparisons; of the second, only some tokens are scored."""

    def tokens(count: int) -> np.ndarray:
        return rng.integers(0, VOCAB, count).astype(np.int32)

    responses = (tokens(4), tokens(5), tokens(3))
    scored = (np.ones(4, bool), np.array([True, False, True, False, True]), np.ones(3, bool))
    return TokenizedExample(tokens(3), responses, ((0, 1), (0, 2), (1, 2)), scored=scored)


def test_log_ratios_of_tokens_add_up_to_those_of_responses():
    rng = np.random.default_rng(0)
    table = table_of(MemoryExamples([ranked(rng) for _ in range(4)]))
    model = moved(new_adapters())
    state = TrainState(model=model, opt_state=None, step=None, skipped=None, key=None)  # type: ignore[arg-type]
    score = Scorer(table, rows=2)
    ratios = np.asarray(score(model).log_probs.array) - np.asarray(score(reference_model(model, None)).log_probs.array)
    chosen, rejected = (np.asarray(x.array) for x in (table.arrays.examples.chosen, table.arrays.examples.rejected))
    margins = ratios[chosen] - ratios[rejected]
    right, wrong = most_right_and_wrong(score, state, margins, Letters())
    assert (len(right), len(wrong)) == (5, 5)
    np.testing.assert_allclose([pair.margin for pair in right], np.sort(margins)[::-1][:5])
    np.testing.assert_allclose([pair.margin for pair in wrong], np.sort(margins)[:5])
    for pair in right + wrong:
        total = np.sum(pair.chosen.log_ratios) - np.sum(pair.rejected.log_ratios)
        assert total == pytest.approx(pair.margin, abs=2e-5)  # sums of log-probs of about -5 nats in float32
        for side in (pair.chosen, pair.rejected):
            assert len(side.pieces) == len(side.log_ratios) in (3, 4, 5)
            if len(side.pieces) == 5:
                assert [x == 0 for x in side.log_ratios] == [False, True, False, True, False], "what is not scored"
