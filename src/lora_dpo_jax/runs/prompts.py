"""Prompts to complete: given ones, and those of a file."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fsspec.core import url_to_fs

from lora_dpo_jax.data.config import FormatConfig
from lora_dpo_jax.data.messages import Text, read_messages
from lora_dpo_jax.data.readers import decompress, suffixes
from lora_dpo_jax.data.rows import read_example
from lora_dpo_jax.data.sources import RowError, RowFile
from lora_dpo_jax.places import spelled_alike


@dataclass(frozen=True)
class Prompt:
    """What is completed: a text or a list of messages, and what a chat template needs beside it."""

    content: Text
    origin: str  # for errors: prompts[0]; prompts_file='p.jsonl', row 3
    chat: bool = True  # whether a text goes through the chat template, if there is one
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # tools, and the arguments of its row

    @property
    def readable(self) -> str:
        """The text for people. Messages have their role before them, unless there is only one of the user."""
        content = self._without_role
        if isinstance(content, str):
            return content
        return "\n".join(f"[{message['role']}] {message.get('content', '')}" for message in content)

    @property
    def key(self) -> str:
        """The same for a text and for a single message of the user with this text."""
        return json.dumps(self._without_role, sort_keys=True)

    @property
    def _without_role(self) -> Text:
        """The text of a single message of the user; else the content."""
        if isinstance(self.content, str) or len(self.content) > 1:
            return self.content
        (message,) = self.content
        is_text = {*message} == {"role", "content"} and message["role"] == "user"
        return message["content"] if is_text else self.content

    def with_system(self, system: str | None) -> "Prompt":
        """The prompt with a system message before it. Raises ValueError if it has one already."""
        if system is None:
            return self
        messages = [{"role": "user", "content": self.content}] if isinstance(self.content, str) else self.content
        if messages[0]["role"] == "system":
            raise ValueError(f"system is set, but {self.origin} has a system message already: {messages[0]}")
        return dataclasses.replace(self, content=[{"role": "system", "content": system}, *messages])


def listed_prompts(texts: Sequence[str], *, chat: bool = True) -> list[Prompt]:
    """Those of the setting `prompts`."""
    return [Prompt(text, f"prompts[{index}]", chat) for index, text in enumerate(texts)]


def file_prompts(url: str, *, chat: bool = True) -> list[Prompt]:
    """Those of the setting `prompts_file`: .txt, one a line, or .jsonl, with a `prompt` in each row, or with pairs.

    Raises FileNotFoundError or ValueError with the file and the row; also if there is no prompt.
    """
    found = [Prompt(content, origin, chat) for origin, content in _contents(url)]
    if not found:
        raise ValueError(f"prompts_file={url!r} holds no prompts")
    return found


def refuse_duplicates(prompts: Sequence[Prompt]) -> None:
    """Raises ValueError that names the first prompt which is there twice."""
    origins: dict[str, str] = {}
    for prompt in prompts:
        if (before := origins.setdefault(prompt.key, prompt.origin)) != prompt.origin:
            raise ValueError(f"{prompt.origin} is the same prompt as {before}: leave one of them out")


def choose_prompts(prompts: Sequence[Prompt], count: int | None, seed: int) -> list[Prompt]:
    """`count` of the prompts in their order, drawn at random by the seed; all if there are no more."""
    if count is None or count >= len(prompts):
        return [*prompts]
    chosen = np.random.default_rng([seed, 0x9A0]).permutation(len(prompts))[:count]
    return [prompts[index] for index in np.sort(chosen)]


def _contents(url: str) -> Iterator[tuple[str, Text]]:
    """(origin, prompt) of each prompt in a file."""
    filesystem, path = url_to_fs(url)
    if not filesystem.isfile(path):
        raise FileNotFoundError(f"prompts_file={url!r} is not a file{spelled_alike(url)}")
    suffix, compression = suffixes(path)
    if suffix == "txt":
        with filesystem.open(path, "rb") as raw:
            lines = decompress(raw, compression).read().decode("utf-8").splitlines()
        yield from (
            (f"prompts_file={url!r}, line {number}", line) for number, line in enumerate(lines, start=1) if line.strip()
        )
    elif suffix == "jsonl":
        for number, row in RowFile(url, filesystem, path).rows():
            origin = f"prompts_file={url!r}, row {number}"
            yield origin, row_prompt(row, origin)
    else:
        raise ValueError(f"prompts_file={url!r}: the suffix must be .txt or .jsonl (then .gz, .zst, ... if compressed)")


def row_prompt(row: Any, origin: str) -> Text:
    """The `prompt` of a row, or what its `chosen` and `rejected` share. Raises ValueError with the origin."""
    if isinstance(row, RowError):
        raise row
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if prompt is None and isinstance(row, dict) and None not in (row.get("chosen"), row.get("rejected")):
        return read_example(row, FormatConfig(), origin).prompt  # of a pair of whole conversations
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt:
        return read_messages(prompt, "prompt", origin)  # as in rows to train on
    found = sorted(row) if isinstance(row, dict) and prompt is None else repr(prompt or row)[:80]
    raise ValueError(f"{origin}: needs `prompt`, a string or a list of messages (`role`, `content`); found {found}")
