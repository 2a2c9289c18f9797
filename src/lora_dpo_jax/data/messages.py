"""Messages as chat templates take them, from the various forms in data sets.

    {"role": "assistant", "content": "Let me see.",
     "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"town": "Bern", "days": null}}}]}

A null in a message, in a part of its content or in a tool call means a missing key, because tables give every struct
the keys of all structs. A null inside `arguments` is data and stays.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from lora_dpo_jax.data.sources import RowError

Message = dict[str, Any]
Text = str | list[Message]

# Roles of messages to the model. A response begins with any other role: the model's own, under any name.
INPUT_ROLES = ("system", "developer", "user", "tool", "function", "ipython", "observation")
# ShareGPT's names for roles, which are renamed in messages with any keys.
RENAMED_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
# Values of ShareGPT's `from`. A tool's answer has several names there, and a call is a message of its own.
SHARE_GPT_ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **RENAMED_ROLES,
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
TEXT_PARTS = ("text", "input_text", "output_text")
REASONING = ("reasoning_content", "reasoning", "thinking")  # templates may write these without content
WEIGHT = "weight"  # of a message of the model, as in OpenAI's and Mistral's formats: 1, or 0 if it is not scored
# Matches messages in Python's notation, as pandas writes lists into the cells of a CSV file.
PYTHON_MESSAGES = re.compile(r"\s*\[?\s*\{\s*'(role|content|from|value)'\s*:.*[\]}]\s*", re.DOTALL)


def read_messages(value: Any, column: str, origin: str) -> list[Message]:
    """Messages from a list, one message or an object of lists, with keys of OpenAI or ShareGPT. Raises RowError."""
    items = _items(value)
    if items is None:
        raise RowError("malformed", origin, f"{column!r} is {kind(value)}; needed: a string or a list of messages")
    if not items:
        raise RowError("empty", origin, f"{column!r} is an empty list")
    return [_message(item, f"message {n} of {column!r}", origin) for n, item in enumerate(items, start=1)]


def read_all_text(texts: Mapping[str, str], origin: str) -> list[Text]:
    """The texts as they are; or messages if each of the texts is JSON of messages, as in cells of CSV files."""
    written = [_messages_in_text(text) for text in texts.values()]
    if all(written):
        return [read_messages(value, column, origin) for value, column in zip(written, texts, strict=True)]
    if all(PYTHON_MESSAGES.fullmatch(text) for text in texts.values()):
        columns = " and ".join(map(repr, texts))
        raise RowError("malformed", origin, f"{columns}: messages in Python's notation; write JSON (json.dumps)")
    return [*texts.values()]


def says_something(message: Message) -> bool:
    """Whether a message holds more than its role for a template to write."""
    return any(
        item.strip() if isinstance(item, str) else item
        for key, item in message.items()
        if key in ("content", *REASONING) or isinstance(item, list | dict)
    )


def without_weight(message: Message) -> Message:
    return {key: item for key, item in message.items() if key != WEIGHT}


def decode_json(text: str, what: str, origin: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RowError("malformed", origin, f"{what} is text that is not JSON: {error}") from error
    except RecursionError as error:
        raise RowError("malformed", origin, f"{what} is JSON that is nested too deeply") from error


def without_nulls(struct: Mapping[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in struct.items() if item is not None}


def kind(value: Any) -> str:
    """A description of a value, for errors."""
    named = {dict: "an object", list: "a list", str: "a string", type(None): "null"}.get(type(value))
    return named or f"{type(value).__name__} {repr(value)[:80]}"


def holds_fills(tools: list[dict]) -> bool:
    """Whether a tool has null parameters, which are no schemas: a table gave it the parameters of other tools."""
    return any(
        None in _struct(_struct(_struct(tool, "function") or tool, "parameters"), "properties").values()
        for tool in tools
    )


def _struct(value: Mapping, key: str) -> Mapping:
    found = value.get(key)
    return found if isinstance(found, Mapping) else {}


def _items(value: Any) -> list | None:
    """The messages of a list, of one message, or of an object of lists; None if `value` is none of these."""
    if isinstance(value, list):
        return value
    if not isinstance(value, Mapping):
        return None
    fields = without_nulls(value)
    role = fields.get("role", fields.get("from"))
    if isinstance(role, str):
        return [value]
    if not isinstance(role, list) or any(not isinstance(f, list) or len(f) != len(role) for f in fields.values()):
        return None
    return [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]


def _messages_in_text(text: str) -> Any:
    """The decoded text if it is JSON of messages with known roles; None for any other text."""
    if not text.lstrip().startswith(("[", "{")) or ('"role"' not in text and '"from"' not in text):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if all(map(_is_message, _items(value) or [None])) else None


def _is_message(item: Any) -> bool:
    if not isinstance(item, Mapping) or {"content", "value", "tool_calls"}.isdisjoint(item):
        return False
    role = item.get("role", item.get("from"))
    return isinstance(role, str) and role in (*INPUT_ROLES, *SHARE_GPT_ROLES)


def _message(item: Any, where: str, origin: str) -> Message:
    if not isinstance(item, Mapping):
        raise RowError("malformed", origin, f"{where} needs 'role' and 'content'; found {kind(item)}")
    message = without_nulls(item)
    if "role" not in message and "from" in message:
        message = _from_share_gpt(message, where, origin)
    if "content" not in message and "value" in message:
        message["content"] = message.pop("value")
    role = message.get("role")
    if not isinstance(role, str):
        found = sorted(message) if role is None else f"the role {kind(role)}"
        raise RowError("malformed", origin, f"{where} needs 'role' and 'content'; found {found}")
    message["role"] = RENAMED_ROLES.get(role, role)
    if WEIGHT in message:
        _check_weight(message, where, origin)
    if "content" in message:
        message["content"] = _joined(message["content"], where, origin)
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], where, origin)
    if isinstance(message.get("function_call"), Mapping):  # OpenAI's older form of a call
        message["function_call"] = _function(message["function_call"], where, origin)
    if "content" not in message and not says_something(message):
        found = "has a role and nothing else" if len(message) == 1 else f"has no content; found {sorted(message)}"
        raise RowError("malformed", origin, f"{where} {found}")
    return message


def _check_weight(message: Message, where: str, origin: str) -> None:
    weight = message[WEIGHT]
    if message["role"] in INPUT_ROLES:
        raise RowError("malformed", origin, f"{where} has a weight, and only messages of the assistant may have one")
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError("malformed", origin, f"the weight of {where} is {kind(weight)}; needed: 0 or 1")


def _from_share_gpt(message: Message, where: str, origin: str) -> Message:
    """The message with `role` and `content` instead of `from` and `value`."""
    speaker = message.pop("from")
    role = SHARE_GPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise RowError("malformed", origin, f"{where} is from {speaker!r}; needed: one of {[*SHARE_GPT_ROLES]}")
    value = message.pop("value", message.pop("content", None))
    if speaker != "function_call":
        return {"role": role, **({} if value is None else {"content": value}), **message}
    calls = decode_json(value, where, origin) if isinstance(value, str) else value
    functions = [_function(call, where, origin) for call in (calls if isinstance(calls, list) else [calls])]
    calls = [{"type": "function", "function": function} for function in functions]
    return {"role": role, "content": "", **message, "tool_calls": calls}


def _joined(content: Any, where: str, origin: str) -> str:
    """The content as one string, from a string or a list of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError("malformed", origin, f"the content of {where} is {kind(content)}")
    texts = []
    for number, part in enumerate(content, start=1):
        fields = without_nulls(part) if isinstance(part, Mapping) else {}
        is_text = fields.get("type") in TEXT_PARTS or set(fields) == {"text"}
        if not is_text or not isinstance(fields.get("text"), str):
            found = f"of type {part.get('type')!r}" if isinstance(part, Mapping) else kind(part)
            raise RowError(
                "malformed",
                origin,
                f"part {number} of the content of {where} is {found}; needed: a text part, as this is a text model",
            )
        texts.append(fields["text"])
    return "".join(texts)


def _tool_calls(calls: Any, where: str, origin: str) -> list[dict]:
    if isinstance(calls, str):
        calls = decode_json(calls, f"'tool_calls' of {where}", origin)
    if not isinstance(calls, list):
        raise RowError("malformed", origin, f"'tool_calls' of {where} is {kind(calls)}; needed: a list of calls")
    return [_tool_call(call, f"tool call {n} of {where}", origin) for n, call in enumerate(calls, start=1)]


def _tool_call(call: Any, where: str, origin: str) -> dict:
    if not isinstance(call, Mapping):
        raise RowError("malformed", origin, f"{where} is {kind(call)}; needed: an object")
    call = without_nulls(call)
    if "function" not in call:  # its name and arguments are in the call itself
        return _function(call, where, origin)
    return {**call, "function": _function(call["function"], where, origin)}


def _function(function: Any, where: str, origin: str) -> dict:
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        found = sorted(function) if isinstance(function, Mapping) else kind(function)
        raise RowError("malformed", origin, f"{where} needs 'name' and 'arguments'; found {found}")
    function = without_nulls(function)
    arguments = function.get("arguments")
    if arguments is None:
        return function
    if isinstance(arguments, str):
        arguments = decode_json(arguments, f"'arguments' of {where}", origin)
    if not isinstance(arguments, Mapping):
        raise RowError(
            "malformed", origin, f"'arguments' of {where} is {kind(arguments)}; needed: an object or JSON of one"
        )
    return {**function, "arguments": arguments}
