"""From a raw row to an Example: what each column means, and where the prompt ends."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

from lora_dpo_jax.columns import DESIRABLE, LABEL, MARGIN, UNDESIRABLE, WEIGHT
from lora_dpo_jax.data.config import Comparisons, FormatConfig
from lora_dpo_jax.data.examples import PAIR
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
    without_weight,
)
from lora_dpo_jax.data.sources import RowError

# Columns of the prompt in rows without `prompt_field`: first texts, then messages that end before an answer.
PROMPT_COLUMNS = ("question", "instruction", "input", "conversations", "messages")
CONVERSATION_COLUMNS = ("messages", "conversations")  # of whole conversations, in supervised rows without a completion
OPENAI_RESPONSES = ("preferred_output", "non_preferred_output")
LARGEST_FLOAT32 = 3.4e38
MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")


@dataclass(frozen=True)
class Example:
    """One prompt with its responses: all are strings, or all are lists of messages."""

    prompt: Text
    responses: tuple[Text, ...]
    origin: str  # "train.jsonl, row 12"
    names: tuple[str, ...] = ("chosen", "rejected")  # of the responses, in errors
    comparisons: tuple[tuple[int, int], ...] = PAIR  # (chosen, rejected), numbers of responses
    weights: tuple[float, ...] | None = None  # one for each comparison; None: equal, with sum 1
    columns: Mapping[str, float | list[float]] = field(default_factory=dict)  # a number, or one for each response
    tools: list[dict] | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    # Only for strings: the prompt is the text that the responses share, so only their tokens decide where it ends.
    implicit_prompt: bool = False


@dataclass(frozen=True)
class _Prompt:
    column: str
    value: Text
    tools: Any = None  # OpenAI's `input` may hold tools


@dataclass(frozen=True)
class _Answers:
    """The responses of a row: all strings, or all lists of messages."""

    names: tuple[str, ...]  # of the responses, in errors
    texts: list[Any]

    @property
    def are_strings(self) -> bool:
        return all(isinstance(text, str) for text in self.texts)

    @property
    def messages(self) -> "list[list[Message]]":
        return [[{"role": "assistant", "content": text}] if isinstance(text, str) else text for text in self.texts]

    @property
    def first_roles(self) -> set[str]:
        return {text[0]["role"] for text in self.texts if not isinstance(text, str)}


def read_example(row: Any, format: FormatConfig, origin: str) -> Example:
    """The example of one raw row. Raises RowError."""
    if not isinstance(row, Mapping):
        raise RowError("malformed", origin, f"is {kind(row)}; needed: an object with named columns")
    try:
        example = _example(row, format, origin)
    except RecursionError as error:
        raise RowError("malformed", origin, "is nested too deeply") from error
    what = "one of format.columns"
    columns: dict[str, float | list[float]] = {name: _number(row, name, what, origin) for name in format.columns}
    count, what = len(example.responses), "one of format.response_columns"
    columns |= {name: _numbers(row, name, what, count, origin) for name in format.response_columns}
    if format.margin_field is not None:
        columns[MARGIN] = _number(row, format.margin_field, "format.margin_field", origin, least=0)
    weight = 1.0
    if format.weight_field is not None:
        weight = _number(row, format.weight_field, "format.weight_field", origin, least=0)
    if format.type == "unpaired":
        columns |= {LABEL: [_label(row, format, origin)], WEIGHT: weight}
        return replace(example, comparisons=(), columns=columns)
    if format.type == "supervised":
        columns |= {WEIGHT: weight} if format.weight_field is not None else {}
        return replace(example, comparisons=(), columns=columns)
    if format.type == "ranked":
        shares = _comparisons(row, format, count, origin)
        weights = tuple(weight * share for share in shares.values())
        return replace(example, comparisons=tuple(shares), weights=weights, columns=columns)
    return replace(example, weights=None if format.weight_field is None else (weight,), columns=columns)


def _example(row: Mapping, format: FormatConfig, origin: str) -> Example:
    for column in MEDIA_COLUMNS:
        if _holds_a_value(row.get(column)):
            raise RowError("malformed", origin, f"{column!r} has a value, and the model reads text alone")
    answers = _answers(row, format, origin)
    prompt = _find_prompt(row, format, answers, origin)
    options = _template_options(row, format, prompt, origin)
    value = prompt.value if prompt else None
    if answers.are_strings and not isinstance(value, list):
        if not _is_chat(row, format):
            if options:
                raise RowError(
                    "malformed",
                    origin,
                    f"has {' and '.join(sorted(options))}, which need a chat template, but format.strings is plain. "
                    "Set it to chat",
                )
            return _string_example(value, answers, origin)
        if value is None:
            raise RowError(
                "malformed",
                origin,
                f"has no {format.prompt_field or 'prompt'!r}, so that nothing says where the user's turn ends. "
                "Set format.prompt_field to its column, or format.strings to plain",
            )
    return _chat_example(prompt, answers, options, format, origin)


def _is_chat(row: Mapping, format: FormatConfig) -> bool:
    """Whether strings are turns of a conversation."""
    if format.strings != "auto":
        return format.strings == "chat"
    columns = (format.system_prompt, format.tools_field, format.chat_template_kwargs)
    # An empty system message counts: other rows of the same column have one.
    return format.chat_template is not None or any(_column(row, column) is not None for column in columns)


def _string_example(prompt: str | None, answers: _Answers, origin: str) -> Example:
    texts = answers.texts
    if prompt is not None:
        return Example(prompt, tuple(texts), origin, answers.names)
    if len(texts) == 1:
        raise RowError("malformed", origin, "has no prompt: set format.prompt_field to its column")
    shared = _shared_prefix(texts)
    if shared and texts[0][shared - 1] == " ":
        shared -= 1  # most tokenizers join a space to the word after it
    responses = tuple(text[shared:] for text in texts)
    return Example(texts[0][:shared], responses, origin, answers.names, implicit_prompt=True)


def _chat_example(
    prompt: _Prompt | None, answers: _Answers, options: dict[str, Any], format: FormatConfig, origin: str
) -> Example:
    messages, responses = _split_prompt(prompt, answers, format, origin)
    system = options.pop("system", None)
    if system is not None:
        if messages[0]["role"] not in ("system", "developer"):
            messages = [{"role": "system", "content": system}, *messages]
        elif messages[0].get("content") != system:
            raise RowError(
                "malformed", origin, f"has a system message in its messages and another in {format.system_prompt!r}"
            )
    for name, response in zip(answers.names, responses, strict=True):
        if response[0]["role"] in INPUT_ROLES:
            raise RowError(
                "malformed",
                origin,
                f"the {name} response begins with a message of role {response[0]['role']!r}. "
                f"{' and '.join(answers.names).capitalize()} must share every message before the first that differs, "
                "and that one must be the assistant's",
            )
        if not any(says_something(message) for message in response if message["role"] not in INPUT_ROLES):
            raise RowError("empty", origin, f"the {name} response is empty")
    return Example(messages, tuple(responses), origin, answers.names, **options)


def _split_prompt(
    prompt: _Prompt | None, answers: _Answers, format: FormatConfig, origin: str
) -> tuple[list[Message], list[list[Message]]]:
    """Prompt and responses as lists that share no message, from full conversations or from responses alone."""
    responses = answers.messages
    text = prompt.value if prompt is not None else None
    bare = [[*map(without_weight, response)] for response in responses]
    if isinstance(text, list):
        size, start = len(text), [*map(without_weight, text)]
        if all(len(response) > size and response[:size] == start for response in bare):
            return text, [response[size:] for response in responses]
        return text, responses
    first_roles = {response[0]["role"] for response in responses}
    if prompt is not None and text is not None and not first_roles & {*INPUT_ROLES}:
        if not text.strip():
            raise RowError("empty", origin, f"{prompt.column!r} is empty")
        return [{"role": "user", "content": text}], responses
    shared = _before_first_answer(bare[0], origin) if format.type == "supervised" else _shared_prefix(bare)
    names = " and ".join(answers.names)
    if shared == 0:
        raise RowError("malformed", origin, f"has no prompt, and {names} share no first message")
    # If the responses are full conversations, a prompt column only repeats one of their messages.
    if prompt is not None and text not in [message.get("content") for message in responses[0][:shared]]:
        raise RowError(
            "malformed",
            origin,
            f"{prompt.column!r} is none of the messages that {names} share. "
            "Set format.prompt_field to null to take the prompt from the messages",
        )
    return responses[0][:shared], [response[shared:] for response in responses]


def _before_first_answer(conversation: list[Message], origin: str) -> int:
    """How many messages come before the first of the assistant: the prompt of a supervised row."""
    for number, message in enumerate(conversation):
        if message["role"] not in INPUT_ROLES:
            return number
    raise RowError("malformed", origin, "has a conversation without a message of the assistant")


def _shared_prefix(texts: Sequence[Text]) -> int:
    """The length of the beginning that all share, always less than the whole of any."""
    first, limit = texts[0], min(map(len, texts)) - 1
    return next((i for i in range(limit) if any(text[i] != first[i] for text in texts)), limit)


def _answers(row: Mapping, format: FormatConfig, origin: str) -> _Answers:
    names, values = _answer_values(row, format, origin)
    for column, value in values.items():
        if value is None:
            found = sorted(without_nulls(row))
            raise RowError("malformed", origin, f"has no {column!r}; its columns are {found}")
        if isinstance(value, str) and not value.strip():
            raise RowError("empty", origin, f"{column!r} is empty")
    if all(isinstance(value, str) for value in values.values()):
        return _Answers(names, read_all_text(values, origin))
    texts = [_text(value, column, origin) for column, value in values.items()]
    if len({isinstance(text, str) for text in texts}) > 1:
        found = ", ".join(f"{column!r} is {kind(text)}" for column, text in zip(values, texts, strict=True))
        raise RowError("malformed", origin, f"{found}; needed: all strings, or all lists of messages")
    return _Answers(names, texts)


def _answer_values(row: Mapping, format: FormatConfig, origin: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """(the names of the responses in messages, the responses by their columns)."""
    if format.type == "supervised" and row.get(format.completion_field) is None:
        given = [column for column in CONVERSATION_COLUMNS if row.get(column) is not None]
        if given:
            return ("completion",), {given[0]: row[given[0]]}
    if format.type in ("unpaired", "supervised"):
        return ("completion",), {format.completion_field: row.get(format.completion_field)}
    if format.type == "ranked":
        column, responses = format.responses_field, row.get(format.responses_field)
        if not isinstance(responses, list) or len(responses) < 2:
            found = f"has {len(responses)}" if isinstance(responses, list) else f"is {kind(responses)}"
            found = "is not there" if responses is None else found
            raise RowError("malformed", origin, f"{column!r} {found}; needed: a list of two or more responses")
        names = tuple(f"response {number}" for number in range(1, len(responses) + 1))
        return names, {f"{column}[{index}]": response for index, response in enumerate(responses)}
    columns = format.chosen_field, format.rejected_field
    if columns == ("chosen", "rejected") and all(row.get(column) is None for column in columns):
        if any(row.get(column) is not None for column in OPENAI_RESPONSES):
            columns = OPENAI_RESPONSES
    return ("chosen", "rejected"), {column: row.get(column) for column in columns}


def _comparisons(row: Mapping, format: FormatConfig, count: int, origin: str) -> dict[tuple[int, int], float]:
    """The comparisons of a ranked row, (index of the better response, index of the worse one), and their shares."""
    has_ranks = row.get(format.scores_field) is None and row.get(format.ranks_field) is not None
    column = format.ranks_field if has_ranks else format.scores_field
    scores = _numbers(row, column, "which orders the responses", count, origin)
    if has_ranks:
        scores = [-rank for rank in scores]
    order = sorted(range(count), key=lambda index: -scores[index])
    found: dict[tuple[int, int], float] = {}
    for better, worse in compared(order, format.comparisons):
        if scores[better] > scores[worse]:
            found[better, worse] = 1.0
        elif format.ties == "both_ways":
            found[better, worse] = found[worse, better] = 0.5
    if not found:
        raise RowError("tied", origin, f"{column!r} has the same number for all responses")
    total = sum(found.values())
    return {pair: share / total for pair, share in found.items()}


def compared(order: Sequence[int], comparisons: Comparisons) -> Iterable[tuple[int, int]]:
    """Those of two or more responses, given from best to worst, that are compared: (better, worse)."""
    ways: dict[Comparisons, Iterable[tuple[int, int]]] = {
        "all": itertools.combinations(order, 2),
        "adjacent": itertools.pairwise(order),
        "best_worst": [(order[0], order[-1])],
    }
    return ways[comparisons]


def _number(row: Mapping, name: str, what: str, origin: str, least: float = -LARGEST_FLOAT32) -> float:
    """A row's number in a column, which is `what`, of at least `least`."""
    value = row.get(name)
    if not _is_number(value) or value < least:
        found = "is not there" if value is None else f"is {value if isinstance(value, int | float) else kind(value)}"
        needed = "a finite number" if least < 0 else f"a finite number of at least {least}"
        raise RowError("malformed", origin, f"{name!r}, {what}, {found}; needed: {needed}")
    return float(value)


def _numbers(row: Mapping, name: str, what: str, count: int, origin: str) -> list[float]:
    """A row's numbers in a column that has one for each response."""
    values = row.get(name)
    if not (isinstance(values, list) and len(values) == count and all(map(_is_number, values))):
        found = "is not there" if values is None else f"is {kind(values)}"
        raise RowError(
            "malformed",
            origin,
            f"{name!r}, {what}, {found}; needed: a list of {count} finite numbers, one for each response",
        )
    return [float(value) for value in values]


def _label(row: Mapping, format: FormatConfig, origin: str) -> float:
    """Whether the response of an unpaired row is desirable."""
    value = row.get(format.label_field) if format.label is None else format.label
    if not isinstance(value, int | float) or value not in (0, 1):
        found = repr(value) if isinstance(value, int | float) else kind(value)
        raise RowError("malformed", origin, f"{format.label_field!r} is {found}; needed: true or false")
    return DESIRABLE if value else UNDESIRABLE


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and abs(value) <= LARGEST_FLOAT32


def _find_prompt(row: Mapping, format: FormatConfig, answers: _Answers, origin: str) -> _Prompt | None:
    """The prompt from its column or, if the row lacks that column, from the only one of PROMPT_COLUMNS that fits."""
    in_responses = bool(answers.first_roles) and answers.first_roles <= {*INPUT_ROLES}
    given = _column(row, format.prompt_field)
    if given is not None and not (in_responses and given == ""):
        return _read_prompt(row, str(format.prompt_field), origin)
    if format.prompt_field != "prompt" or in_responses:
        return None
    columns = [column for column in PROMPT_COLUMNS if row.get(column)]
    if {"instruction", "input"} <= {*columns} and isinstance(row["input"], str):
        columns.remove("input")  # it becomes part of the instruction's prompt
    prompts = [_read_prompt(row, column, origin) for column in columns]
    prompts = [prompt for prompt in prompts if _awaits(prompt.value, answers)]
    if len(prompts) > 1:
        found = " and ".join(repr(prompt.column) for prompt in prompts)
        raise RowError("malformed", origin, f"has no 'prompt', and {found} may be it: set format.prompt_field to one")
    return prompts[0] if prompts else None


def _read_prompt(row: Mapping, column: str, origin: str) -> _Prompt:
    value = row[column]
    if isinstance(value, Mapping) and "messages" in value:  # as in OpenAI's format
        messages = read_messages(value["messages"], f"{column}.messages", origin)
        return _Prompt(column, messages, value.get("tools"))
    more = row.get("input") if column == "instruction" else None  # as in Alpaca
    if isinstance(value, str) and isinstance(more, str) and more.strip():
        value = f"{value}\n{more}"
    return _Prompt(column, _text(value, column, origin))


def _awaits(prompt: Text, answers: _Answers) -> bool:
    """Whether the responses may answer this text, which is not from the prompt's own column."""
    if not isinstance(prompt, str):
        return prompt[-1]["role"] in INPUT_ROLES
    first = answers.texts[0]
    shared = first[: _shared_prefix(answers.texts)] if isinstance(first, str) and len(answers.texts) > 1 else ""
    return bool(prompt.strip()) and prompt not in shared


def _text(value: Any, column: str, origin: str) -> Text:
    if isinstance(value, str):
        [text] = read_all_text({column: value}, origin)
        return text
    return read_messages(value, column, origin)


def _template_options(row: Mapping, format: FormatConfig, prompt: _Prompt | None, origin: str) -> dict[str, Any]:
    """Those of system, tools and chat_template_kwargs that the row has and that are not empty."""
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
    """A list or a dict, None if it is empty. Tables often hold it as JSON text."""
    if isinstance(value, str) and value:
        value = decode_json(value, what, origin)
    if value and not isinstance(value, needed):
        raise RowError("malformed", origin, f"{what} is {kind(value)}; needed: {needed.__name__} or JSON of one")
    return value or None


def _column(row: Mapping, column: str | None) -> Any:
    return None if column is None else row.get(column)


def _holds_a_value(value: Any) -> bool:
    """False for an empty list, and for a struct that a table filled with nulls."""
    if isinstance(value, Mapping):
        return any(map(_holds_a_value, value.values()))
    if isinstance(value, list):
        return any(map(_holds_a_value, value))
    return value is not None and not (isinstance(value, str | bool) and not value)
