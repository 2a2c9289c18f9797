import io
import json
import re

import pytest

from lora_dpo_jax.data.cache import tokenize_component
from lora_dpo_jax.data.config import ComponentConfig, FormatConfig
from lora_dpo_jax.data.preview import SHADES, preview
from lora_dpo_jax.data.sources import UrlSource

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer("chatml")


@pytest.fixture
def pairs(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"prompt": [{"role": "user", "content": "Hello"}], "chosen": "Grüße 🙂", "rejected": "No \x1b[2J"}
    path.write_text((json.dumps(row) + "\n") * 3)
    component = ComponentConfig(UrlSource([str(path)]))
    return tokenize_component(component, tokenizer, split="train", train_seq_len=128, cache_dir=tmp_path / "cache")


def shown(pairs, tokenizer, count, **options):
    file = io.StringIO()
    preview(pairs, tokenizer, count, file, **options)
    return file.getvalue()


def test_a_log_gets_labelled_blocks_of_plain_text(pairs, tokenizer):
    text = shown(pairs, tokenizer, 1)
    sizes = [len(part) for part in pairs[0].parts]
    assert f"=== pair 1 of 3: {pairs.origin(0)}\n--- prompt ({sizes[0]} tokens, not scored)\n" in text
    assert "<|im_start|>user↵\nHello<|im_end|>↵\n<|im_start|>assistant↵\n" in text
    assert f"--- chosen ({sizes[1]} tokens, scored)\nGrüße 🙂<|im_end|>↵\n" in text
    assert f"--- rejected ({sizes[2]} tokens, scored)\nNo \\x1b[2J<|im_end|>↵\n" in text
    assert "\x1b" not in text


def test_colours_tell_the_roles_and_change_no_text(pairs, tokenizer):
    colored, plain = (shown(pairs, tokenizer, 2, color=color) for color in (True, False))
    assert ESCAPE.sub("", colored) == plain
    for role, shades in ((role, SHADES[role]) for role in ("prompt", "chosen", "rejected")):
        block = colored.split(f"--- {role}")[1].split("---")[0]
        assert set(ESCAPE.findall(block)) == {*shades, "\x1b[0m"}


def test_no_more_pairs_are_shown_than_there_are(pairs, tokenizer):
    assert shown(pairs, tokenizer, 10).count("=== pair") == 3


def test_what_is_not_scored_of_a_response_is_shown_apart(tokenizer, tmp_path):
    said = (("assistant", "Hi"), ("user", "?"), ("assistant", "Yes"))
    turns = [{"role": role, "content": content} for role, content in said]
    rejected = {"role": "assistant", "content": "No"}
    row = {"prompt": [{"role": "user", "content": "Hello"}], "chosen": turns, "rejected": rejected}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    component = ComponentConfig(UrlSource([str(path)]), FormatConfig(train_on="all_turns"))
    pairs = tokenize_component(component, tokenizer, split="train", train_seq_len=128, cache_dir=tmp_path / "cache")
    text, colored = (shown(pairs, tokenizer, 1, color=color) for color in (False, True))
    _, first, asked, last = text.split("--- chosen, tokens ")
    assert first.endswith("(scored)\nHi<|im_end|>↵\n\n")
    assert asked.endswith("(not scored)\n<|im_start|>user↵\n?<|im_end|>↵\n<|im_start|>assistant↵\n\n")
    assert "(scored)\nYes<|im_end|>↵\n\n--- rejected (" in last
    assert ESCAPE.sub("", colored) == text
    assert {*ESCAPE.findall(colored.split(" (not scored)")[1].split("---")[0])} == {*SHADES["prompt"], "\x1b[0m"}
