"""Tokenizers in Hugging Face's format. No code of a model's folder is run, asked about or passed on."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`; ValueError names the folder if none loads."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{folder / 'tokenizer_config.json'} asks for Python code of its own (auto_map), which is never run"
            ) from error
        raise ValueError(f"{folder} holds no tokenizer that loads. {error}") from error


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes its files, with the chat template in chat_template.jinja, as transformers and TRL do."""
    tokenizer.save_pretrained(folder)
    drop_code(folder)


def drop_code(folder: Path) -> None:
    """Takes out of an export what names Python code (auto_map), which neither training nor the export had."""
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if settings.pop("auto_map", None) is not None:
            path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
