import copy

import numpy as np
import peft
import pytest
import torch
import transformers
from tiny_models import load, summed_log_probs, tiny_folder

from lora_dpo_jax.huggingface.adapters import load_adapter
from lora_dpo_jax.huggingface.tokenizers import read_tokenizer
from lora_dpo_jax.judging import rewards
from lora_dpo_jax.judging.rewards import ImplicitReward, ImplicitRewardConfig
from lora_dpo_jax.runs.prompts import Prompt

BASE = "llama2"
SYSTEM = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
PROMPTS = [Prompt(content, "here") for content in ("Hi", SYSTEM, "Hi", "Hi")]
COMPLETIONS = ["Hello.", "No.", "Go away", "Hello."]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> tuple[peft.PeftModel, str]:
    """An adapter of PEFT's own with random factors, and its folder."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder(BASE), dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return model.eval(), folder


@pytest.fixture(scope="module")
def ours(theirs):
    return load_adapter(load(tiny_folder(BASE)), theirs[1])


@pytest.fixture(scope="module")
def tokenizer():
    return read_tokenizer(tiny_folder(BASE))


def log_ratio(model: peft.PeftModel, prompt: list[int], response: list[int]) -> float:
    """log p of the adapter - log p of the base, in nats."""
    with model.disable_adapter():
        base = summed_log_probs(model, prompt, response)
    return summed_log_probs(model, prompt, response) - base


def tokens_of(tokenizer, prompt, completion: str) -> tuple[list[int], list[int]]:
    """Of a prompt and of the assistant's turn after it, by transformers."""
    messages = [{"role": "user", "content": prompt.content}] if isinstance(prompt.content, str) else prompt.content
    whole = [*messages, {"role": "assistant", "content": completion}]
    start = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    ids = tokenizer.apply_chat_template(whole, return_dict=False)
    assert ids[: len(start)] == start
    return start, ids[len(start) :]


def test_a_reward_is_beta_times_pefts_log_ratio_and_is_per_token_if_length_normalized(theirs, ours, tokenizer):
    tokens = [tokens_of(tokenizer, *pair) for pair in zip(PROMPTS, COMPLETIONS, strict=True)]
    expected = np.array([log_ratio(theirs[0], *pair) for pair in tokens])
    assert np.ptp(expected) > 0.5
    reward = ImplicitReward(ours, tokenizer, ImplicitRewardConfig(beta=0.3))
    np.testing.assert_allclose(reward.score(PROMPTS, COMPLETIONS), 0.3 * expected, rtol=0, atol=1e-4)
    per_token = copy.copy(reward)  # whose program is compiled
    per_token.config = ImplicitRewardConfig(beta=0.3, length_normalized=True)
    lengths = [len(response) for _, response in tokens]
    np.testing.assert_allclose(per_token.score(PROMPTS, COMPLETIONS), 0.3 * expected / lengths, rtol=0, atol=1e-5)


def test_plain_texts_end_with_the_end_of_sequence_token_and_have_no_template(theirs, ours, tokenizer):
    prompts, completions = [Prompt(text, "here", chat=False) for text in ("Two", "Three")], [" and one", " more"]
    prompt_ids = [tokenizer(prompt.content)["input_ids"] for prompt in prompts]
    answers = [[*tokenizer(text, add_special_tokens=False)["input_ids"], 2] for text in completions]
    expected = [log_ratio(theirs[0], *pair) for pair in zip(prompt_ids, answers, strict=True)]
    found = ImplicitReward(ours, tokenizer, ImplicitRewardConfig(beta=1.0)).score(prompts, completions)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_a_prompt_brings_a_template_of_its_own(theirs, ours, tokenizer):
    template = "{% for message in messages %}{{ message['content'] + '|' }}{% endfor %}{{ mark }}"
    prompt = Prompt("Hi", "here", template_kwargs={"chat_template": template, "mark": ""})
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Hi|", "Yo|")]
    reward = ImplicitReward(ours, tokenizer, ImplicitRewardConfig(beta=1.0), template_kwargs={"mark": "?"})
    np.testing.assert_allclose(reward.score([prompt], ["Yo"]), [log_ratio(theirs[0], *ids)], rtol=0, atol=1e-4)


def test_completions_of_one_prompt_share_it_in_groups_that_change_no_reward(ours, tokenizer, monkeypatch):
    prompts, completions = [Prompt(text, "here") for text in ("Hi", "Yo", "Hi", "Hi", "Hi")], [*"abcde"]
    reward = ImplicitReward(ours, tokenizer)
    together = reward.score(prompts, completions)
    monkeypatch.setattr(rewards, "SHARING_A_PROMPT", 1)
    np.testing.assert_allclose(reward.score(prompts, completions), together, rtol=0, atol=1e-5)
    assert len(set(together)) == 5
    assert reward.score([], []) == []


def test_errors_name_the_setting_and_the_completion(ours, tokenizer):
    with pytest.raises(ValueError, match="beta=0.0 must be a positive number"):
        ImplicitRewardConfig(beta=0.0)
    reward = ImplicitReward(ours, tokenizer)
    with pytest.raises(ValueError, match="1 prompts for 2 completions"):
        reward.score(PROMPTS[:1], ["a", "b"])
    with pytest.raises(ValueError, match="here.*half of a surrogate pair"):
        reward.score(PROMPTS[:2], ["a", "\ud800"])
