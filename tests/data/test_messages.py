import json

import pytest

from lora_dpo_jax.data.messages import holds_fills, read_all_text, read_messages
from lora_dpo_jax.data.sources import RowError

USER, YES = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}


def one(message):
    [read] = read_messages([message], "chosen", "a.jsonl, row 3")
    return read


def calling(arguments, **keys):
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [{**call, **keys}]}


@pytest.mark.parametrize(
    "value",
    [
        [USER, YES],
        {"role": ["user", "assistant"], "content": ["Hi", "yes"]},
        {"role": ["user", "assistant"], "content": ["Hi", "yes"], "name": None},
        {"from": ["human", "gpt"], "value": ["Hi", "yes"]},
        [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "yes"}],
        [{"from": "user", "value": "Hi", "role": None}, {"from": "assistant", "content": "yes"}],
        [{"role": "human", "content": "Hi"}, {"role": "gpt", "value": "yes"}],
        [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, YES],
        [{"role": "user", "content": [{"text": "Hi", "type": None, "image_url": None}]}, YES],
        [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}, {**YES, "tool_calls": None}],
    ],
)
def test_every_shape_of_messages_gives_the_same_messages(value):
    assert read_messages(value, "chosen", "") == [USER, YES]


def test_one_message_is_a_list_of_one():
    assert read_messages(YES, "chosen", "") == read_messages({"from": "gpt", "value": "yes"}, "chosen", "") == [YES]


@pytest.mark.parametrize(
    "value", ["yes", 5, {}, {"a": 1}, {"role": ["user"], "content": "x"}, {"role": ["user"], "content": ["x", "y"]}]
)
def test_what_is_no_list_of_messages_is_malformed(value):
    with pytest.raises(RowError, match="^a, row 1: 'chosen' is .*; needed: a string or a list of messages"):
        read_messages(value, "chosen", "a, row 1")


def test_a_message_keeps_the_order_of_its_keys_and_the_keys_that_are_its_own():
    assert [*one({"content": "yes", "weight": 1, "role": "assistant"}).items()] == [
        ("content", "yes"),
        ("weight", 1),
        ("role", "assistant"),
    ]


@pytest.mark.parametrize("speaker", ["tool", "observation", "function", "function_response"])
def test_the_answers_of_tools_in_share_gpt_are_those_of_a_tool(speaker):
    assert one({"from": speaker, "value": "rain"}) == {"role": "tool", "content": "rain"}


@pytest.mark.parametrize("as_list", [False, True])
def test_a_call_in_share_gpt_is_a_tool_call(as_list):
    call = {"name": "weather", "arguments": {"town": "Bern"}}
    value = json.dumps([call] if as_list else call)
    assert one({"from": "function_call", "value": value}) == calling({"town": "Bern"})


def test_arguments_as_text_are_decoded():
    arguments = {"town": "Bern", "days": None, "more": [1, {"a": None}]}
    assert one(calling(json.dumps(arguments))) == one(calling(arguments)) == calling(arguments)
    flat = {"name": "f", "arguments": '{"a": 1}'}
    assert one({"role": "assistant", "tool_calls": [flat]})["tool_calls"] == [{"name": "f", "arguments": {"a": 1}}]
    assert one({"role": "assistant", "function_call": flat})["function_call"] == {"name": "f", "arguments": {"a": 1}}
    text = {"role": "assistant", "content": "", "tool_calls": json.dumps(calling({})["tool_calls"])}
    assert one(text) == calling({})


def test_nulls_that_fill_a_struct_go_and_those_of_arguments_stay():
    filled = calling({"town": None, "days": {"from": None}}, id=None)
    filled["tool_calls"][0]["function"]["strict"] = None
    assert one({**filled, "name": None}) == calling({"town": None, "days": {"from": None}})
    assert one({**calling({}), "content": None}) == {k: v for k, v in calling({}).items() if k != "content"}


BAD = [
    ("yes", "needs 'role' and 'content'; found a string"),
    ({"role": 5, "content": "x"}, "found the role int 5"),
    ({"role": ["a"], "content": "x"}, "found the role a list"),
    ({"from": "bing", "value": "x"}, "is from 'bing'; needed: one of ['system'"),
    ({"from": 3, "value": "x"}, "is from 3"),
    ({"text": "x"}, "found ['text']"),
    ({"role": "assistant", "text": "x"}, "has no content; found ['role', 'text']"),
    ({"role": "assistant", "refusal": "No"}, "has no content; found ['refusal', 'role']"),
    ({"role": "assistant", "content": None}, "has a role and nothing else"),
    ({"role": "assistant", "content": {"a": 1}}, "the content of message 1 of 'chosen' is an object"),
    ({"role": "user", "content": [{"type": "image"}]}, "the content of message 1 of 'chosen' is of type 'image'"),
    ({"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}, "part 2 of the content of message 1"),
    ({"role": "user", "content": [{"type": "text"}]}, "needed: a text part, as this is a text model"),
    (calling('{"town": '), "'arguments' of tool call 1 of message 1 of 'chosen' is text that is not JSON"),
    (calling("[1]"), "'arguments' of tool call 1 of message 1 of 'chosen' is a list; needed: an object or JSON of one"),
    (calling("null"), "is null; needed: an object"),
    (calling(""), "is text that is not JSON"),
    (calling('{"a": ' + "9" * 5000 + "}"), "is text that is not JSON"),
    (calling('{"a": ' + "[" * 100_000), "is JSON that is nested too deeply"),
    (calling(7), "is int 7; needed: an object"),
    ({"role": "assistant", "tool_calls": {"a": 1}}, "of message 1 of 'chosen' is an object; needed: a list"),
    ({"role": "assistant", "tool_calls": ["f"]}, "tool call 1 of message 1 of 'chosen' is a string; needed: an object"),
    ({"role": "assistant", "tool_calls": [{"function": "f"}]}, "needs 'name' and 'arguments'; found a string"),
    ({"from": "function_call", "value": '{"town": "Bern"}'}, "needs 'name' and 'arguments'; found ['town']"),
    ({"from": "function_call", "value": "weather"}, "message 1 of 'chosen' is text that is not JSON"),
    ({"from": "function_call"}, "needs 'name' and 'arguments'; found null"),
]  # fmt: skip


@pytest.mark.parametrize(("message", "why"), BAD, ids=range(len(BAD)))
def test_what_is_no_message_is_malformed_by_row_and_number(message, why):
    with pytest.raises(RowError) as caught:
        one(message)
    assert caught.value.reason == "malformed"
    assert str(caught.value).startswith("a.jsonl, row 3: ")
    assert why in str(caught.value)


ANSWERS = ['[{"role": "assistant", "content": "yes"}]', '[{"from": "gpt", "value": "no"}]']


def both(chosen, rejected):
    return read_all_text({"chosen": chosen, "rejected": rejected}, "a.csv, row 3")


def test_texts_that_are_all_json_of_messages_are_messages():
    assert both(*ANSWERS) == [[YES], [{"role": "assistant", "content": "no"}]]
    assert both(ANSWERS[0][1:-1], ANSWERS[1]) == both(*ANSWERS)


@pytest.mark.parametrize(
    "text",
    [
        "no",
        "[1, 2]",
        '[{"name": "f", "arguments": {}}]',
        '{"role": "engineer", "content": "builds"}',
        '[{"role": "assistant"}]',
        '[{"role": "assistant", "content": "yes"}',
        '[{"role": "assistant", "content": "yes"}] is what you asked for',
        "[]",
        '{"answer": "role"}',
        "[" * 100_000 + '"role"',
    ],
    ids=range(10),
)
def test_a_text_that_only_looks_like_json_of_messages_is_left_as_it_is(text):
    assert both(text, text) == [text, text]
    assert both(ANSWERS[0], text) == [ANSWERS[0], text]


def test_messages_as_python_writes_them_are_refused():
    with pytest.raises(RowError, match="a.csv, row 3: 'chosen' and 'rejected': messages in Python's notation"):
        both(str([YES]), str([USER]))
    assert both(str([YES]), "no") == [str([YES]), "no"]


def test_null_in_the_place_of_a_schema_is_a_fill():
    def tool(properties):
        return {"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}

    assert holds_fills([tool({"a": {"default": None}}), tool({"a": None})])
    assert holds_fills([tool({"a": None})["function"]])
    assert not holds_fills([tool({"a": {"default": None, "enum": [None]}}), {"function": None}, {}, tool(None)])
