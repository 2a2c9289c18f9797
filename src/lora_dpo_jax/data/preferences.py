"""The `data:` section of a config, and how a raw row becomes a PreferencePair."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lora_dpo_jax.data.sources import Reason, RowError, SourceConfig

Message = dict[str, Any]
Text = str | list[Message]

# The optional columns of a row and what they are called unless the config says otherwise.
COLUMN_SETTINGS = {
    "prompt_field": "prompt",
    "system_prompt": "system",
    "tools_field": "tools",
    "chat_template_kwargs": "chat_template_kwargs",
}
# Roles that speak to the model. A response begins with any other role: the model's own, whatever it is called.
INPUT_ROLES = ("system", "developer", "user", "tool", "function", "ipython")
# What chat_template_kwargs may not set, because it would change what is asked of the template or the tokenizer.
RESERVED_TEMPLATE_KWARGS = (
    "conversation",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "padding",
    "truncation",
    "max_length",
    "tokenizer_kwargs",
)


@dataclass(frozen=True)
class PreferencePair:
    """One prompt with two responses: all three are strings, or all three are lists of messages."""

    prompt: Text
    chosen: Text
    rejected: Text
    origin: str  # "train.jsonl, row 12"
    tools: list[dict] | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    # Strings alone: the prompt is what the responses share, so nothing but their tokens says where it ends.
    implicit_prompt: bool = False


@dataclass(frozen=True)
class FormatConfig:
    """In which columns a row's parts stand, and what becomes of rows that do not fit. Each row tells its own shape.

    As in Levanter, `system_prompt` and `chat_template_kwargs` are names of columns, not their values.
    """

    type: Literal["preference_chat"] = "preference_chat"  # the only one
    chosen_field: str = "chosen"  # a column
    rejected_field: str = "rejected"  # a column
    prompt_field: str | None = "prompt"  # null: the prompt is what chosen and rejected share
    system_prompt: str | None = "system"  # the column of a system message
    tools_field: str | None = "tools"  # the column of tool schemas
    chat_template_kwargs: str | None = "chat_template_kwargs"  # the column of arguments for the template
    chat_template: str | None = None  # instead of the tokenizer's own: a Jinja text, or the path of one
    slice_strategy: Literal["raise", "drop", "left", "right"] = "raise"  # of rows longer than train_seq_len
    invalid_rows: Literal["raise", "drop"] = "raise"  # empty, malformed, identical, or without a clear prompt boundary

    def __post_init__(self):
        _require_choice("format.slice_strategy", self.slice_strategy, ("raise", "drop", "left", "right"))
        _require_choice("format.invalid_rows", self.invalid_rows, ("raise", "drop"))

    @property
    def named_columns(self) -> dict[str, str]:
        """Setting -> column, of the columns that the user named: all but the defaults."""
        columns = {setting: getattr(self, setting) for setting in COLUMN_SETTINGS}
        return {name: column for name, column in columns.items() if column not in (None, COLUMN_SETTINGS[name])}

    def refuses(self, reason: Reason) -> bool:
        """Whether a row with this fault is an error. Otherwise it is dropped and counted."""
        return (self.slice_strategy if reason == "too_long" else self.invalid_rows) == "raise"

    def template_text(self) -> str | None:
        """The overriding template, read from its file if a path was given."""
        template = self.chat_template
        if template is None or "{{" in template or "{%" in template:
            return template
        path = Path(template).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"format.chat_template={template!r} is neither a Jinja template nor a file")
        return path.read_text(encoding="utf-8")


@dataclass(frozen=True)
class ComponentConfig:
    source: SourceConfig
    format: FormatConfig = field(default_factory=FormatConfig)


@dataclass(frozen=True)
class PreferenceDataConfig:
    components: dict[str, ComponentConfig]  # by name
    tokenizer: str | None = None  # id or folder; null: the one of initialize_from_hf
    shuffle: bool = True  # a new seeded order in each epoch; false keeps the order of the files
    train_weights: dict[str, float] | None = None  # how often each component is drawn; null: in proportion to its pairs
    cache_dir: str | None = None  # null: $LORA_DPO_JAX_CACHE, or lora_dpo_jax in the user's cache folder

    def __post_init__(self):
        if not self.components:
            raise ValueError("data.components is empty; name at least one component with its source")
        if self.cache_dir is not None and "://" in self.cache_dir:
            raise ValueError(f"data.cache_dir={self.cache_dir!r} must be a folder of this machine")
        if self.train_weights is not None:
            self._check_weights(self.train_weights)

    def _check_weights(self, weights: dict[str, float]) -> None:
        unknown, missing = sorted(set(weights) - set(self.components)), sorted(set(self.components) - set(weights))
        if unknown:
            raise ValueError(f"data.train_weights names {unknown}; the components are {sorted(self.components)}")
        if missing:
            raise ValueError(
                f"data.train_weights has no weight for {missing}. Give each one; 0 keeps a component out of training"
            )
        # Written so that NaN is refused too.
        if bad := {name: weight for name, weight in weights.items() if not 0 <= weight < float("inf")}:
            raise ValueError(f"data.train_weights must be finite and not negative; found {bad}")
        if not sum(weights.values()) > 0:
            raise ValueError(f"data.train_weights={weights} are all zero; at least one must be positive")
        for name, weight in weights.items():
            if weight > 0 and not self.components[name].source.has_split("train"):
                raise ValueError(f"data.train_weights.{name}={weight}, but {name} has no training rows (train_urls)")


def default_cache_dir() -> Path:
    if explicit := os.environ.get("LORA_DPO_JAX_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_dpo_jax"


def read_pair(row: Any, format: FormatConfig, origin: str) -> PreferencePair:
    """The pair of one raw row. Raises RowError."""
    if not isinstance(row, Mapping):
        raise RowError("malformed", origin, f"is {_kind(row)}; needed: an object with named columns")
    chosen = _response(row, format.chosen_field, origin)
    rejected = _response(row, format.rejected_field, origin)
    if isinstance(chosen, str) != isinstance(rejected, str):
        found = f"{format.chosen_field!r} is {_kind(chosen)}, {format.rejected_field!r} is {_kind(rejected)}"
        raise RowError("malformed", origin, f"{found}; needed: both strings, or both lists of messages")
    prompt = _column(row, format.prompt_field)
    if prompt is not None and not isinstance(prompt, str):
        prompt = _messages(prompt, str(format.prompt_field), origin)
    options = _template_options(row, format, origin)
    if isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(prompt, list):
        if options:
            raise RowError(
                "malformed",
                origin,
                f"has {' and '.join(sorted(options))}, which need a chat template, but its responses are "
                "strings, which get none. Write prompt, chosen and rejected as lists of messages",
            )
        return _string_pair(prompt, chosen, rejected, origin)
    return _chat_pair(prompt, _as_messages(chosen), _as_messages(rejected), options, format, origin)


def _string_pair(prompt: str | None, chosen: str, rejected: str, origin: str) -> PreferencePair:
    if prompt is not None:
        return PreferencePair(prompt, chosen, rejected, origin)
    shared = _shared_prefix(chosen, rejected)
    if shared and chosen[shared - 1] == " ":
        shared -= 1  # most tokenizers join a space to the word after it
    return PreferencePair(chosen[:shared], chosen[shared:], rejected[shared:], origin, implicit_prompt=True)


def _chat_pair(
    prompt: Text | None,
    chosen: list[Message],
    rejected: list[Message],
    options: dict[str, Any],
    format: FormatConfig,
    origin: str,
) -> PreferencePair:
    messages, chosen, rejected = _split_prompt(prompt, chosen, rejected, format, origin)
    system = options.pop("system", None)
    if system is not None:
        if messages[0]["role"] not in ("system", "developer"):
            messages = [{"role": "system", "content": system}, *messages]
        elif messages[0].get("content") != system:
            raise RowError(
                "malformed", origin, f"has a system message in its messages and another in {format.system_prompt!r}"
            )
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if response[0]["role"] in INPUT_ROLES:
            raise RowError(
                "malformed",
                origin,
                f"the {name} response begins with a message of role {response[0]['role']!r}. Chosen and rejected "
                "must share every message before the first that differs, and that one must be the assistant's",
            )
        if not any(_says_something(message) for message in response if message["role"] not in INPUT_ROLES):
            raise RowError("empty", origin, f"the {name} response is empty")
    return PreferencePair(messages, chosen, rejected, origin, **options)


def _split_prompt(
    prompt: Text | None, chosen: list[Message], rejected: list[Message], format: FormatConfig, origin: str
) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt and responses as lists that share no message, from full conversations or from responses alone."""
    if isinstance(prompt, list):
        size = len(prompt)
        if min(len(chosen), len(rejected)) > size and chosen[:size] == prompt == rejected[:size]:
            return prompt, chosen[size:], rejected[size:]
        return prompt, chosen, rejected
    if prompt is not None and chosen[0]["role"] not in INPUT_ROLES and rejected[0]["role"] not in INPUT_ROLES:
        if not prompt.strip():
            raise RowError("empty", origin, f"{format.prompt_field!r} is empty")
        return [{"role": "user", "content": prompt}], chosen, rejected
    shared = _shared_prefix(chosen, rejected)
    if shared == 0:
        raise RowError("malformed", origin, "has no prompt, and chosen and rejected share no first message")
    # A prompt column beside full conversations only repeats one of their messages.
    if prompt is not None and prompt not in [message.get("content") for message in chosen[:shared]]:
        raise RowError(
            "malformed",
            origin,
            f"{format.prompt_field!r} is none of the messages that chosen and rejected share. "
            "Set format.prompt_field to null to take the prompt from the messages",
        )
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _shared_prefix(chosen: Text, rejected: Text) -> int:
    """How much both begin with, never the whole of either."""
    limit = min(len(chosen), len(rejected)) - 1
    return next((i for i in range(limit) if chosen[i] != rejected[i]), limit)


def _response(row: Mapping, column: str, origin: str) -> Text:
    value = row.get(column)
    if value is None:
        raise RowError(
            "malformed", origin, f"has no {column!r}; its columns are {sorted(k for k in row if row[k] is not None)}"
        )
    if isinstance(value, str):
        if not value.strip():
            raise RowError("empty", origin, f"{column!r} is empty")
        return value
    return _messages(value, column, origin)


def _messages(value: Any, column: str, origin: str) -> list[Message]:
    if not isinstance(value, list):
        raise RowError("malformed", origin, f"{column!r} is {_kind(value)}; needed: a string or a list of messages")
    if not value:
        raise RowError("empty", origin, f"{column!r} is an empty list")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            found = sorted(message) if isinstance(message, Mapping) else _kind(message)
            raise RowError(
                "malformed", origin, f"message {number} of {column!r} needs 'role' and 'content'; found {found}"
            )
        if not isinstance(message.get("content"), str | list | None):
            raise RowError(
                "malformed", origin, f"the content of message {number} of {column!r} is {_kind(message['content'])}"
            )
        if not any(item is not None for key, item in message.items() if key != "role"):
            raise RowError("malformed", origin, f"message {number} of {column!r} has a role and nothing else")
    return [{key: item for key, item in message.items() if item is not None} for message in value]


def _as_messages(response: Text) -> list[Message]:
    return [{"role": "assistant", "content": response}] if isinstance(response, str) else response


def _says_something(message: Message) -> bool:
    return any(item.strip() if isinstance(item, str) else item for key, item in message.items() if key != "role")


def _template_options(row: Mapping, format: FormatConfig, origin: str) -> dict[str, Any]:
    """Those of system, tools and chat_template_kwargs that the row has and that say something."""
    system = _column(row, format.system_prompt)
    tools = _decoded(row, format.tools_field, list, origin)
    kwargs = _decoded(row, format.chat_template_kwargs, dict, origin)
    if system is not None and not isinstance(system, str):
        raise RowError("malformed", origin, f"{format.system_prompt!r} is {_kind(system)}; needed: a string")
    if reserved := sorted(set(kwargs or ()) & set(RESERVED_TEMPLATE_KWARGS)):
        raise RowError("malformed", origin, f"{format.chat_template_kwargs!r} may not set {reserved}")
    options = {"system": system, "tools": tools, "chat_template_kwargs": kwargs}
    return {name: value for name, value in options.items() if value}


def _decoded(row: Mapping, column: str | None, kind: type, origin: str) -> Any:
    """A list or a dict; parquet files often hold it as JSON text."""
    value = _column(row, column)
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise RowError("malformed", origin, f"{column!r} is text that is not JSON: {error}") from error
    if value and not isinstance(value, kind):
        raise RowError("malformed", origin, f"{column!r} is {_kind(value)}; needed: {kind.__name__} or JSON of one")
    return value or None


def _column(row: Mapping, column: str | None) -> Any:
    return None if column is None else row.get(column)


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a string"}.get(type(value), f"{type(value).__name__} {value!r}")


def _require_choice(setting: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{setting}={value!r} must be one of {', '.join(choices)}")
