"""Tokenizers in Hugging Face's format. No code of a model's folder is run."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lora_dpo_jax.json_objects import JsonObject, is_number, is_texts, read_json_object

FILES = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "config.json")
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces")


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`; ValueError names the file or the folder if none loads."""
    found = {name: read_json_object(folder / name) for name in FILES if (folder / name).exists()}
    if "tokenizer_config.json" in found:
        _check(found["tokenizer_config.json"])
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions, hostile values any kind
        said = " ".join(str(error).split())
        raise ValueError(f"{folder} holds no tokenizer that loads. {type(error).__name__}: {said}") from error


def _check(settings: JsonObject) -> None:
    """ValueError for values of the wrong kind that would show later, or never."""
    settings.text("tokenizer_class", None)
    settings.taken("model_max_length", None, lambda length: is_number(length) and length > 0, "a number above 0")
    settings.taken("chat_template", None, _is_template, "a template, or several with their names")
    for key in SPECIAL_TOKENS:
        settings.taken(key, None, _is_token, "text, or an object with its content")
    for key in FLAGS:
        settings.taken(key, None, lambda value: isinstance(value, bool), "true or false")


def _is_template(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(item, dict) and is_texts([item.get("name"), item.get("template")]) for item in value)
    return is_texts([*value.values()] if isinstance(value, dict) else [value])


def _is_token(value: Any) -> bool:
    return isinstance(value.get("content") if isinstance(value, dict) else value, str)
