"""Exports bring the tokenizer and the chat template of training."""

import json
import logging
import os

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_runs import instruct_folder, preference_rows, run_config, write_rows
from transformers import AutoTokenizer

from lora_dpo_jax.huggingface.tokenizers import read_tokenizer
from lora_dpo_jax.main import generate
from lora_dpo_jax.main.train import main
from lora_dpo_jax.runs.exports import with_trained_template

pytestmark = pytest.mark.usefixtures("two_devices")

OWN = read_tokenizer(instruct_folder()).chat_template
TRAINED = OWN.replace("message.content", "message.content + ' [trained]'")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, folder, prompts): two steps with format.chat_template as a file, all paths relative to a folder."""
    folder, prompts = tmp_path_factory.mktemp("run"), []
    write_rows(folder / "rows.jsonl", preference_rows(8))
    (folder / "mine.jinja").write_text(TRAINED)
    (folder / "base").symlink_to(instruct_folder())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = run_config(
            folder,
            folder / "rows.jsonl",
            initialize_from_hf="base",
            hf_revision="v1",
            data__components__prefs__format={"chat_template": "mine.jinja"},
            sample_prompts=["why sleeps the cat?"],
            generation={"max_new_tokens": 1},
            peft_save_path="adapter",
            merged_hf_save_path="merged",
            gguf_save_path="gguf",
        )
        patch.setattr("lora_dpo_jax.generation.generate", lambda model, ids, *_, **__: prompts.extend(ids) or [[0]])
        main(config)
    return config, folder, prompts


@pytest.mark.parametrize("export", ["adapter", "merged"])
def test_an_export_has_the_template_and_the_tokens_of_training(run, export):
    _, folder, _ = run
    tokenizer, base = (AutoTokenizer.from_pretrained(folder / name) for name in (export, "base"))
    assert TRAINED != base.chat_template and tokenizer.chat_template == TRAINED
    assert (folder / export / "chat_template.jinja").read_text() == TRAINED
    assert "chat_template" not in json.loads((folder / export / "tokenizer_config.json").read_text())
    text = "the owl<|im_end|> Grüße\n"
    assert tokenizer(text)["input_ids"] == base(text)["input_ids"]
    assert tokenizer.special_tokens_map == base.special_tokens_map


def test_the_gguf_adapter_of_a_run_is_its_peft_adapter(run):
    _, folder, _ = run
    factors = load_file(folder / "adapter" / "adapter_model.safetensors")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(folder / "gguf" / "adapter.gguf").tensors}
    assert len(tensors) == len(factors)
    for factor in ("a", "b"):
        key = f"base_model.model.model.layers.1.mlp.up_proj.lora_{factor.upper()}.weight"
        np.testing.assert_array_equal(tensors[f"blk.1.ffn_up.weight.lora_{factor}"], factors[key])


def test_samples_are_rendered_with_the_template_of_training(run):
    _, folder, prompts = run
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    assert len(prompts) == 2  # before and after
    assert {tokenizer.decode(ids).count("[trained]") for ids in prompts} == {1}


@pytest.mark.parametrize("export", ["adapter", "merged"])
def test_generate_takes_the_template_of_an_export_from_anywhere(run, export, monkeypatch, tmp_path):
    """It finds the base of an adapter that was trained with a relative path."""
    rendered = []
    monkeypatch.setattr("lora_dpo_jax.generation.generate", lambda model, ids, *_, **__: rendered.extend(ids) or [[]])
    monkeypatch.chdir(tmp_path)
    generate.main(generate.GenerateConfig(model=os.path.relpath(run[1] / export), prompts=["why?"]))
    assert "why? [trained]" in read_tokenizer(instruct_folder()).decode(rendered[0])


def test_the_base_of_an_adapter_is_an_absolute_path_with_its_revision(run):
    settings = json.loads((run[1] / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(run[1] / "base")
    assert settings["revision"] == "v1"


def config_of(tmp_path, templates: dict, **settings):
    """A component for each name, with its format.chat_template."""
    source = {"type": "url", "train_urls": ["rows.jsonl"]}
    components = {name: {"source": source, "format": {"chat_template": text}} for name, text in templates.items()}
    return run_config(tmp_path, tmp_path / "rows.jsonl", data__components=components, **settings)


@pytest.mark.parametrize(
    ("templates", "settings", "exported", "others"),
    [
        ({"a": None, "b": None}, {}, OWN, []),
        ({"a": TRAINED, "b": TRAINED}, {}, TRAINED, []),
        ({"a": OWN, "b": None}, {}, OWN, []),
        ({"a": None, "b": TRAINED}, {}, TRAINED, ["a"]),
        ({"a": TRAINED, "b": "{{ 1 }}", "c": None}, {}, TRAINED, ["b", "c"]),
        ({"a": TRAINED, "b": "{{ 1 }}"}, {"data__train_weights": {"a": 0.0, "b": 1.0}}, "{{ 1 }}", []),
    ],
)
def test_the_first_template_that_is_set_decides_and_the_log_names_those_that_differ(
    tmp_path, caplog, templates, settings, exported, others
):
    tokenizer = read_tokenizer(instruct_folder())
    with caplog.at_level(logging.WARNING):
        chosen = with_trained_template(config_of(tmp_path, templates, **settings).data, tokenizer)
    assert chosen.chat_template == exported
    assert tokenizer.chat_template == OWN  # by which other rows are still rendered
    assert (f"; {', '.join(others)} " in caplog.text) if others else not caplog.text
