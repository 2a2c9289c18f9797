import json
import shutil

import pytest
from tiny_models import tiny_folder

from lora_dpo_jax.huggingface.tokenizers import read_tokenizer


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(tiny_folder("llama2"), tmp_path / "model")


def change(path, **settings) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    "key", ["pad_token", "model_max_length", "added_tokens_decoder", "padding_side", "chat_template"]
)
def test_a_setting_of_the_wrong_kind_names_file_and_key(key, folder):
    change(folder / "tokenizer_config.json", **{key: 5.5 if key != "model_max_length" else "long"})
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json: {key}=.* must be"):
        read_tokenizer(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eos_token", {"content": "</s>", "lstrip": "no"}),
        ("split_special_tokens", "no"),
        ("model_input_names", 5),
        ("model_specific_special_tokens", {"image_token": 5}),
    ],
)
def test_a_setting_that_would_only_end_in_the_library_names_file_and_key(key, value, folder):
    change(folder / "tokenizer_config.json", **{key: value})
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json: {key}=.* must be"):
        read_tokenizer(folder)


def test_an_added_token_without_a_number_names_file_and_token(folder):
    (folder / "added_tokens.json").write_text('{"<new>": "x"}')
    with pytest.raises(ValueError, match=r"added_tokens\.json: '<new>'='x' must be a whole number"):
        read_tokenizer(folder)


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"])
def test_a_template_that_is_not_utf8_is_named(name, folder):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"{{ \xff }}")
    with pytest.raises(ValueError, match=rf"{name} is not UTF-8"):
        read_tokenizer(folder)


def test_a_damaged_vocabulary_names_its_file_and_place(folder):
    change(folder / "tokenizer.json", added_tokens="none")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer: .* at line 1 column \d+$"):
        read_tokenizer(folder)


def test_a_folder_without_a_tokenizer_is_named_in_a_line(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} holds no tokenizer that loads") as error:
        read_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_code_that_a_folder_brings_is_not_run(folder):
    program = folder / "tokenization_mine.py"
    program.write_text("raise SystemExit('it ran')")
    change(
        folder / "tokenizer_config.json",
        tokenizer_class="Mine",
        auto_map={"AutoTokenizer": [None, "tokenization_mine.Mine"]},
    )
    change(folder / "config.json", auto_map={"AutoConfig": "tokenization_mine.Mine"})
    try:
        tokenizer = read_tokenizer(folder)
    except ValueError as error:
        assert str(folder) in str(error)
    else:
        assert tokenizer("hello")["input_ids"]


def test_named_chat_templates_are_all_read(folder):
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    assert sorted(read_tokenizer(folder).chat_template) == ["default", "tool_use"]
