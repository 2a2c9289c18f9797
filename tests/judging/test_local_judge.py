"""The local judge against transformers' own logits."""

import numpy as np
import pytest
import torch
import transformers
from tiny_runs import instruct_folder

from lora_dpo_jax.judging.interface import Question, RunModels, Usage
from lora_dpo_jax.judging.local_judge import LocalJudge, LocalJudgeConfig
from lora_dpo_jax.runs.prompts import Prompt

TEMPLATE = "{prompt} A: {first} B: {second} Which?"
PROMPTS = [Prompt(f"why the owl {'sleeps ' * number}?", f"prompts[{number}]") for number in range(5)]
QUESTIONS = [
    asked
    for number, prompt in enumerate(PROMPTS)
    for pair in [Question(prompt, "the moon " * (number + 1), "a tree")]
    for asked in (pair, pair.swapped)
]


def judge_with(tmp_path, template: str = TEMPLATE, **settings) -> LocalJudge:
    (tmp_path / "template.txt").write_text(template)
    settings = {"model": str(instruct_folder()), "template": str(tmp_path / "template.txt"), **settings}
    run = RunModels(cache=tmp_path / "cache")
    config = LocalJudgeConfig(**settings)
    config.check(run)
    return config.start(run)


def test_the_verdict_is_the_likelier_letter_as_transformers_computes_it(tmp_path):
    judge = judge_with(tmp_path, batch_size=2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(instruct_folder(), dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(instruct_folder())
    letters = [tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "AB"]
    found = dict(judge.verdicts(QUESTIONS))
    assert sorted(found) == [*range(len(QUESTIONS))]
    preferred = set()
    for number, question in enumerate(QUESTIONS):
        text = TEMPLATE.format(prompt=question.prompt.content, first=question.first, second=question.second)
        messages = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            log_probs = theirs(**ids).logits[0, -1].double().log_softmax(-1)[letters].tolist()
        verdict = found[number]
        numbers = [float(part.split()[0]) for part in verdict.reason.replace(",", "").split(" = ")[1:]]
        np.testing.assert_allclose(numbers, log_probs, atol=2e-4)  # four decimals are shown
        assert verdict.preferred == ("first" if log_probs[0] > log_probs[1] else "second")
        assert verdict.usage == Usage(ids["input_ids"].shape[1], 1)
        preferred.add(verdict.preferred)
    assert preferred == {"first", "second"}  # else the comparison would say little
    assert list(judge.verdicts([])) == []


def test_a_question_that_is_too_long_names_its_prompt(tmp_path):
    long = Question(Prompt("owl " * 300, "prompts_file='p.txt', line 7"), "a", "b")
    with pytest.raises(ValueError, match=r"^prompts_file='p.txt', line 7: the question has \d+ tokens .* at most 256"):
        list(judge_with(tmp_path).verdicts([QUESTIONS[0], long]))


def test_a_tokenizer_that_cannot_tell_the_letters_apart_is_refused(tmp_path):
    judge = judge_with(tmp_path)
    judge._encode = lambda texts: [[1, 2, 0] for _ in texts]  # both are the unknown token
    with pytest.raises(ValueError, match="judge.model: its tokenizer writes A and B with the same token"):
        list(judge.verdicts(QUESTIONS[:1]))


def test_the_identity_is_that_of_the_files_and_the_template(tmp_path):
    first = judge_with(tmp_path).identity
    assert judge_with(tmp_path, batch_size=3).identity == first
    assert judge_with(tmp_path, template=TEMPLATE + "!").identity != first
    assert judge_with(tmp_path, quantization="int8").identity != first


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model": "./gone"}, "judge.model: ./gone"),
        ({"adapter": "./gone"}, "judge.adapter: ./gone"),
        ({"template": "./gone"}, "judge.template='./gone' is not a file"),
        ({"quantization": "int3"}, "quantization='int3' must be one of"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_the_setting_that_is_wrong_is_named(settings, says):
    with pytest.raises((FileNotFoundError, ValueError), match=says):
        LocalJudgeConfig(**{"model": str(instruct_folder()), **settings}).check(RunModels())
