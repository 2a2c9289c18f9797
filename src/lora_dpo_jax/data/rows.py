"""How a raw row becomes a PreferencePair: which of its columns is what, and where the prompt ends."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_dpo_jax.data.config import FormatConfig
from lora_dpo_jax.data.messages import (
    INPUT_ROLES,
    Message,
    Text,
    decode_json,
    kind,
    read_all_text,
    read_messages,
    says_something,
    without_nulls,
)
from lora_dpo_jax.data.sources import RowError

# Where a prompt stands in rows without `prompt_field`: text first, then messages that wait for an answer.
PROMPT_COLUMNS = ("question", "instruction", "input", "conversations", "messages")
OPENAI_RESPONSES = ("preferred_output", "non_preferred_output")
MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")


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
class _Prompt:
    column: str
    value: Text
    tools: Any = None  # OpenAI's `input` holds them


def read_pair(row: Any, format: FormatConfig, origin: str) -> PreferencePair:
    """The pair of one raw row. Raises RowError."""
    if not isinstance(row, Mapping):
        raise RowError("malformed", origin, f"is {kind(row)}; needed: an object with named columns")
    try:
        return _pair(row, format, origin)
    except RecursionError as error:
        raise RowError("malformed", origin, "is nested too deeply") from error


def _pair(row: Mapping, format: FormatConfig, origin: str) -> PreferencePair:
    for column in MEDIA_COLUMNS:
        if _holds_a_value(row.get(column)):
            raise RowError("malformed", origin, f"{column!r} has a value, and the model reads text alone")
    chosen, rejected = _responses(row, format, origin)
    prompt = _find_prompt(row, format, chosen, rejected, origin)
    options = _template_options(row, format, prompt, origin)
    value = prompt.value if prompt else None
    if isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(value, list):
        if not _is_chat(row, format):
            if options:
                raise RowError(
                    "malformed",
                    origin,
                    f"has {' and '.join(sorted(options))}, which need a chat template, but format.strings is plain. "
                    "Set it to chat",
                )
            return _string_pair(value, chosen, rejected, origin)
        if value is None:
            raise RowError(
                "malformed",
                origin,
                f"has no {format.prompt_field or 'prompt'!r}, so that nothing says where the user's turn ends. "
                "Set format.prompt_field to its column, or format.strings to plain",
            )
    return _chat_pair(prompt, _as_messages(chosen), _as_messages(rejected), options, format, origin)


def _is_chat(row: Mapping, format: FormatConfig) -> bool:
    """Whether strings are turns of a conversation."""
    if format.strings != "auto":
        return format.strings == "chat"
    columns = (format.system_prompt, format.tools_field, format.chat_template_kwargs)
    # An empty system message counts: other rows of the same column have one.
    return format.chat_template is not None or any(_column(row, column) is not None for column in columns)


def _string_pair(prompt: str | None, chosen: str, rejected: str, origin: str) -> PreferencePair:
    if prompt is not None:
        return PreferencePair(prompt, chosen, rejected, origin)
    shared = _shared_prefix(chosen, rejected)
    if shared and chosen[shared - 1] == " ":
        shared -= 1  # most tokenizers join a space to the word after it
    return PreferencePair(chosen[:shared], chosen[shared:], rejected[shared:], origin, implicit_prompt=True)


def _chat_pair(
    prompt: _Prompt | None,
    chosen: list[Message],
    rejected: list[Message],
    options: dict[str, Any],
    format: FormatConfig,
    origin: str,
) -> PreferencePair:
    messages, chosen, rejected = _split_prompt(prompt, chosen, rejected, origin)
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
        if not any(says_something(message) for message in response if message["role"] not in INPUT_ROLES):
            raise RowError("empty", origin, f"the {name} response is empty")
    return PreferencePair(messages, chosen, rejected, origin, **options)


def _split_prompt(
    prompt: _Prompt | None, chosen: list[Message], rejected: list[Message], origin: str
) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt and responses as lists that share no message, from full conversations or from responses alone."""
    text = prompt.value if prompt is not None else None
    if isinstance(text, list):
        size = len(text)
        if min(len(chosen), len(rejected)) > size and chosen[:size] == text == rejected[:size]:
            return text, chosen[size:], rejected[size:]
        return text, chosen, rejected
    if prompt is not None and text is not None and not {chosen[0]["role"], rejected[0]["role"]} & {*INPUT_ROLES}:
        if not text.strip():
            raise RowError("empty", origin, f"{prompt.column!r} is empty")
        return [{"role": "user", "content": text}], chosen, rejected
    shared = _shared_prefix(chosen, rejected)
    if shared == 0:
        raise RowError("malformed", origin, "has no prompt, and chosen and rejected share no first message")
    # A prompt column beside full conversations only repeats one of their messages.
    if prompt is not None and text not in [message.get("content") for message in chosen[:shared]]:
        raise RowError(
            "malformed",
            origin,
            f"{prompt.column!r} is none of the messages that chosen and rejected share. "
            "Set format.prompt_field to null to take the prompt from the messages",
        )
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _shared_prefix(chosen: Text, rejected: Text) -> int:
    """How much both begin with, never the whole of either."""
    limit = min(len(chosen), len(rejected)) - 1
    return next((i for i in range(limit) if chosen[i] != rejected[i]), limit)


def _responses(row: Mapping, format: FormatConfig, origin: str) -> tuple[Text, Text]:
    """Both strings, or both lists of messages."""
    columns = format.chosen_field, format.rejected_field
    if columns == ("chosen", "rejected") and all(row.get(column) is None for column in columns):
        if any(row.get(column) is not None for column in OPENAI_RESPONSES):
            columns = OPENAI_RESPONSES
    for column in columns:
        if row.get(column) is None:
            found = sorted(without_nulls(row))
            raise RowError("malformed", origin, f"has no {column!r}; its columns are {found}")
        if isinstance(row[column], str) and not row[column].strip():
            raise RowError("empty", origin, f"{column!r} is empty")
    if all(isinstance(row[column], str) for column in columns):
        chosen, rejected = read_all_text({column: row[column] for column in columns}, origin)
        return chosen, rejected
    chosen, rejected = (_text(row[column], column, origin) for column in columns)
    if isinstance(chosen, str) != isinstance(rejected, str):
        found = f"{columns[0]!r} is {kind(chosen)}, {columns[1]!r} is {kind(rejected)}"
        raise RowError("malformed", origin, f"{found}; needed: both strings, or both lists of messages")
    return chosen, rejected


def _find_prompt(row: Mapping, format: FormatConfig, chosen: Text, rejected: Text, origin: str) -> _Prompt | None:
    """The prompt of its column or, in rows without that column, of the one column that holds it elsewhere."""
    firsts = [response[0]["role"] for response in (chosen, rejected) if not isinstance(response, str)]
    in_responses = bool(firsts) and all(role in INPUT_ROLES for role in firsts)
    given = _column(row, format.prompt_field)
    if given is not None and not (in_responses and given == ""):
        return _read_prompt(row, str(format.prompt_field), origin)
    if format.prompt_field != "prompt" or in_responses:
        return None
    columns = [column for column in PROMPT_COLUMNS if row.get(column)]
    if {"instruction", "input"} <= {*columns} and isinstance(row["input"], str):
        columns.remove("input")  # stands in the prompt of the instruction
    prompts = [_read_prompt(row, column, origin) for column in columns]
    prompts = [prompt for prompt in prompts if _awaits(prompt.value, chosen, rejected)]
    if len(prompts) > 1:
        found = " and ".join(repr(prompt.column) for prompt in prompts)
        raise RowError("malformed", origin, f"has no 'prompt', and {found} may be it: set format.prompt_field to one")
    return prompts[0] if prompts else None


def _read_prompt(row: Mapping, column: str, origin: str) -> _Prompt:
    value = row[column]
    if isinstance(value, Mapping) and "messages" in value:  # of OpenAI
        messages = read_messages(value["messages"], f"{column}.messages", origin)
        return _Prompt(column, messages, value.get("tools"))
    more = row.get("input") if column == "instruction" else None  # of Alpaca
    if isinstance(value, str) and isinstance(more, str) and more.strip():
        value = f"{value}\n{more}"
    return _Prompt(column, _text(value, column, origin))


def _awaits(prompt: Text, chosen: Text, rejected: Text) -> bool:
    """Whether the responses answer this text, which stands in no column made for it."""
    if not isinstance(prompt, str):
        return prompt[-1]["role"] in INPUT_ROLES
    shared = chosen[: _shared_prefix(chosen, rejected)] if isinstance(chosen, str) else ""
    return bool(prompt.strip()) and prompt not in shared


def _text(value: Any, column: str, origin: str) -> Text:
    if isinstance(value, str):
        [text] = read_all_text({column: value}, origin)
        return text
    return read_messages(value, column, origin)


def _as_messages(response: Text) -> list[Message]:
    return [{"role": "assistant", "content": response}] if isinstance(response, str) else response


def _template_options(row: Mapping, format: FormatConfig, prompt: _Prompt | None, origin: str) -> dict[str, Any]:
    """Those of system, tools and chat_template_kwargs that the row has and that say something."""
    system = _column(row, format.system_prompt)
    if system is not None and not isinstance(system, str):
        raise RowError("malformed", origin, f"{format.system_prompt!r} is {kind(system)}; needed: a string")
    tools = _decoded(_column(row, format.tools_field), list, repr(format.tools_field), origin)
    if prompt is not None and prompt.tools is not None:
        tools = tools or _decoded(prompt.tools, list, f"'tools' of {prompt.column!r}", origin)
    kwargs = _decoded(_column(row, format.chat_template_kwargs), dict, repr(format.chat_template_kwargs), origin)
    options = {"system": system, "tools": tools, "chat_template_kwargs": without_nulls(kwargs or {})}
    return {name: value for name, value in options.items() if value}


def _decoded(value: Any, needed: type, what: str, origin: str) -> Any:
    """A list or a dict; tables often hold it as JSON text."""
    if isinstance(value, str) and value:
        value = decode_json(value, what, origin)
    if value and not isinstance(value, needed):
        raise RowError("malformed", origin, f"{what} is {kind(value)}; needed: {needed.__name__} or JSON of one")
    return value or None


def _column(row: Mapping, column: str | None) -> Any:
    return None if column is None else row.get(column)


def _holds_a_value(value: Any) -> bool:
    """Not of an empty list, nor of a struct that a table has filled with nulls."""
    if isinstance(value, Mapping):
        return any(map(_holds_a_value, value.values()))
    if isinstance(value, list):
        return any(map(_holds_a_value, value))
    return value is not None and not (isinstance(value, str | bool) and not value)
