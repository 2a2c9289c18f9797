"""Tokenizers in Hugging Face's format. Code in a model's folder is never run or exported, and no prompt offers it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from lora_dpo_jax.json_objects import JsonObject, is_number, is_texts, read_json_object

CHECKED = ("tokenizer_config.json", "special_tokens_map.json")
ALSO_READ = ("added_tokens.json", "config.json")
TEMPLATES = ("*.jinja", "additional_chat_templates/*.jinja")
VOCABULARY = "tokenizer.json"  # large, so it is checked only if loading fails
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MORE_SPECIAL_TOKENS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
FLAGS = ("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces", "split_special_tokens")
TOKEN_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`. If it does not load, ValueError names the file and, if known, the key."""
    for name in (*CHECKED, *ALSO_READ):
        if (folder / name).exists():
            settings = read_json_object(folder / name)
            if name in CHECKED:
                _check(settings)
            if name == "added_tokens.json":
                for token in settings.values:
                    settings.whole(token, least=0)
    for path in (path for pattern in TEMPLATES for path in folder.glob(pattern) if path.is_file()):
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}") from error
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # hostile values raise errors of any type
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{folder / 'tokenizer_config.json'} asks for Python code of its own (auto_map), which is never run"
            ) from error
        if (folder / VOCABULARY).exists():
            _check_vocabulary(folder / VOCABULARY)
        raise ValueError(f"{folder} holds no tokenizer that loads. {type(error).__name__}: {_line(error)}") from error


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes its files, with the chat template in chat_template.jinja, as transformers and TRL do."""
    tokenizer.save_pretrained(folder)
    drop_code(folder)


def drop_code(folder: Path) -> None:
    """Removes references to Python code (auto_map) from an export, because neither training nor the export has it."""
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if settings.pop("auto_map", None) is not None:
            path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check(settings: JsonObject) -> None:
    """Raises ValueError for values of the wrong type. Some would fail later or never, others without their key."""
    kinds: dict[str, tuple[Callable[[Any], bool], str]] = {
        "tokenizer_class": (lambda value: isinstance(value, str), "text"),
        "model_max_length": (lambda length: is_number(length) and length > 0, "a number above 0"),
        "chat_template": (_is_template, "a template, or several with their names"),
        **dict.fromkeys(FLAGS, (lambda value: isinstance(value, bool), "true or false")),
        **dict.fromkeys(SPECIAL_TOKENS, (_is_token, "text, or an object with its content")),
        "model_input_names": (is_texts, "a list of texts"),
        **dict.fromkeys(MORE_SPECIAL_TOKENS, (_are_tokens, "a list of tokens, or an object of tokens by name")),
    }
    for key, (is_right, needed) in kinds.items():
        settings.taken(key, None, is_right, needed)
    for key in ("padding_side", "truncation_side"):
        settings.taken(key, "right", lambda side: side in ["left", "right"], "left or right")
    settings.taken("added_tokens_decoder", {}, _are_tokens_by_id, "an object of tokens by id")


def _check_vocabulary(path: Path) -> None:
    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exceptions, with line and column
        raise ValueError(f"{path} is no tokenizer: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _is_template(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(item, dict) and is_texts([item.get("name"), item.get("template")]) for item in value)
    return is_texts([*value.values()] if isinstance(value, dict) else [value])


def _is_token(value: Any) -> bool:
    if not isinstance(value, dict):
        return isinstance(value, str)
    return isinstance(value.get("content"), str) and all(isinstance(value.get(key, True), bool) for key in TOKEN_FLAGS)


def _are_tokens(value: Any) -> bool:
    items = [*value.values()] if isinstance(value, dict) else value
    return isinstance(items, list) and all(map(_is_token, items))


def _are_tokens_by_id(value: Any) -> bool:
    return isinstance(value, dict) and all(
        number.isdecimal() and isinstance(token, dict) and _is_token(token) for number, token in value.items()
    )
