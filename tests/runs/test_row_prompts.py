"""The prompts of a run's rows, which a system completes from the tokens that training has for them."""

import pytest
from tiny_runs import plain_rows, preference_rows, run_config, write_rows

from lora_dpo_jax.generation import encode_prompt
from lora_dpo_jax.runs.assembly import load_data
from lora_dpo_jax.runs.prompts import Prompt, choose_prompts, refuse_duplicates
from lora_dpo_jax.runs.row_prompts import row_prompts

TEMPLATE = "{% for m in messages %}<{{ m['content'] }}{{ mark }}>{% endfor %}{{ '<' if add_generation_prompt }}"
WITH_ARGUMENTS = [row | {"chat_template_kwargs": {"mark": "!"}} for row in preference_rows(6)]
CASES = {
    "messages": (preference_rows(9), {}),
    "plain texts": (plain_rows(9), {}),
    "a template of the rows": (WITH_ARGUMENTS, {"chat_template": TEMPLATE}),
    "texts as turns": (plain_rows(6), {"strings": "chat"}),
    "no column of prompts": (
        [{key: row["prompt"] + row[key] for key in ("chosen", "rejected")} for row in preference_rows(6)],
        {"prompt_field": None},
    ),
}


def config_of(tmp_path, rows, format, **settings):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    component = {"source": {"train_urls": [str(path)]}, "format": format}
    return run_config(tmp_path, path, data__components={"prefs": component}, **settings)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_prompt_has_the_tokens_that_it_is_trained_with(tmp_path, case, split):
    rows, format = CASES[case]
    config = config_of(tmp_path, rows, format, validation_split_fraction=0.4)
    prompts, data = row_prompts(config, split), load_data(config)
    table = data.pairs if split == "train" else data.held_out
    assert len(prompts) == len(table) > 1
    for prompt, example in zip(prompts, table, strict=True):
        ids = encode_prompt(data.tokenizer, prompt.content, chat=prompt.chat, **prompt.template_kwargs)
        assert ids == example.prompt.tolist()


def test_validation_files_give_the_held_out_prompts_each_once(tmp_path):
    rows = preference_rows(8)
    files = {
        "train_urls": [str(write_rows(tmp_path / "train.jsonl", rows[:3]))],
        "validation_urls": [str(write_rows(tmp_path / "test.jsonl", [*rows[3:], rows[4]]))],
    }
    config = run_config(tmp_path, tmp_path / "train.jsonl", data__components={"prefs": {"source": files}})
    prompts = row_prompts(config)
    assert [prompt.content for prompt in prompts] == [row["prompt"] for row in rows[3:]]
    assert prompts[1].origin.endswith("test.jsonl, row 2")


def test_prompts_are_chosen_by_the_seed_in_their_order():
    prompts = [Prompt(str(number), f"prompts[{number}]") for number in range(20)]
    chosen = choose_prompts(prompts, 5, seed=0)
    numbers = [prompts.index(prompt) for prompt in chosen]
    assert len(numbers) == 5 and numbers == sorted(numbers)
    assert choose_prompts(prompts, 5, seed=0) == chosen != choose_prompts(prompts, 5, seed=1)
    assert choose_prompts(prompts, 20, seed=0) == choose_prompts(prompts, None, seed=3) == prompts


def test_a_text_and_a_message_of_the_user_are_the_same_prompt():
    message = Prompt([{"role": "user", "content": "Hi"}], "b")
    with pytest.raises(ValueError, match="^b is the same prompt as a: leave one of them out"):
        refuse_duplicates([Prompt("Hi", "a"), message])
    refuse_duplicates([Prompt("Hi", "a"), message.with_system("Be brief.")])
