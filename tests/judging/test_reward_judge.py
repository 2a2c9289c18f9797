"""The judge that compares rewards."""

from collections.abc import Sequence

import pytest

from lora_dpo_jax.judging.interface import Question, RunModels
from lora_dpo_jax.judging.reward_judge import RewardJudge, RewardJudgeConfig
from lora_dpo_jax.runs.prompts import Prompt

PLAIN = Prompt("Why?", "p", chat=False)
CHAT = Prompt([{"role": "user", "content": "Why?"}], "q", template_kwargs={"mark": "!"})


class Length:
    """A reward of one for each character."""

    def __init__(self):
        self.scored: list[tuple[Prompt, str]] = []

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        self.scored += zip(prompts, completions, strict=True)
        return [float(len(text)) for text in completions]


def test_the_greater_reward_is_preferred_in_either_order_and_each_answer_is_scored_once():
    pairs = [Question(prompt, *answers) for prompt in (PLAIN, CHAT) for answers in (("a", "bb"), ("bb", "cc"))]
    asked = [question for pair in pairs for question in (pair, pair.swapped)]
    reward = Length()
    judge = RewardJudge(reward, {"type": "reward"})
    found = dict(judge.verdicts(asked))
    expected = ["second", "first", "tie", "tie"] * 2
    assert [found[number].preferred for number in range(8)] == expected
    assert found[0].reason == "reward of A = 1.0000, of B = 2.0000"
    assert reward.scored == [(prompt, text) for prompt in (PLAIN, CHAT) for text in ("a", "bb", "cc")]


def test_an_empty_answer_has_no_reward_and_no_verdict():
    judge = RewardJudge(Length(), {})
    found = dict(judge.verdicts([Question(PLAIN, "a", " \n"), Question(PLAIN, "a", "bb")]))
    assert (found[0].preferred, found[0].reason) == (None, "an empty answer has no reward")
    assert found[1].preferred == "second"


@pytest.mark.parametrize(
    ("settings", "run", "says"),
    [
        ({}, RunModels(adapter="a"), "judge.model is missing: set it, or initialize_from_hf"),
        ({}, RunModels(base="b"), "judge.adapter is missing: set it, or peft_save_path"),
        ({"model": "./gone", "adapter": "./gone"}, RunModels(), "judge.model: ./gone"),
        ({"beta": 0.0}, RunModels(), "beta=0.0 must be positive"),
        ({"quantization": "int3"}, RunModels(), "quantization='int3'"),
    ],
)
def test_the_setting_that_is_wrong_is_named(settings, run, says):
    with pytest.raises((FileNotFoundError, ValueError), match=says):
        RewardJudgeConfig(**settings).check(run)
