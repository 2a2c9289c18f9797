"""Rows in the shapes and files of other tools: what docs/data.md shows, and one set of rows in every kind of file."""

import io
import json
import re
from pathlib import Path

import pytest

from lora_dpo_jax.data.cache import tokenize_component
from lora_dpo_jax.data.preferences import ComponentConfig
from lora_dpo_jax.data.preview import preview
from lora_dpo_jax.data.sources import UrlSource

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
BLOCKS = re.findall(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)
EXAMPLES = [json.loads(row) for block in BLOCKS for row in re.split(r"\n(?=\{)", block)]


@pytest.mark.parametrize("row", EXAMPLES, ids=[",".join(row) for row in EXAMPLES])
def test_each_example_of_the_documentation_is_shown_as_the_same_pair(row, make_tokenizer, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    tokenizer, component = make_tokenizer("chatml"), ComponentConfig(UrlSource([str(tmp_path / "rows.jsonl")]))
    pairs = tokenize_component(component, tokenizer, split="train", train_seq_len=64, cache_dir=tmp_path / "cache")
    shown = io.StringIO()
    preview(pairs, tokenizer, 1, shown)
    parts = re.split(r"--- (\w+) \(.*\)\n", shown.getvalue().rstrip())[1:]
    assert dict(zip(parts[::2], parts[1::2], strict=True)) == {
        "prompt": "<|im_start|>user↵\nCapital of France?<|im_end|>↵\n<|im_start|>assistant↵\n\n",
        "chosen": "Paris.<|im_end|>↵\n\n",
        "rejected": "Lyon.<|im_end|>↵",
    }


def test_the_documentation_has_an_example_of_each_shape():
    assert len(EXAMPLES) == 12
