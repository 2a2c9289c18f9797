import pytest

from lora_dpo_jax.data.preferences import FormatConfig
from lora_dpo_jax.data.rows import read_pair
from lora_dpo_jax.data.sources import RowError

USER, HELLO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
YES, NO = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}
MORE = {"role": "user", "content": "More?"}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def read(row, **format):
    return read_pair(row, FormatConfig(**format), "a.jsonl, row 3")


def parts(row, **format):
    pair = read(row, **format)
    return pair.prompt, pair.chosen, pair.rejected


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {"prompt": [USER], "chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": [USER], "chosen": "yes", "rejected": "no"},
        {"prompt": "Hi", "chosen": [YES], "rejected": [NO]},
        {"prompt": "Hi", "chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": None, "chosen": [USER, YES], "rejected": [USER, NO], "system": "", "tools": [], "score": 1.0},
        {"prompt": [USER], "chosen": [{**YES, "tool_calls": None}], "rejected": [NO]},
    ],
)
def test_every_shape_of_a_conversation_gives_the_same_pair(row):
    assert parts(row) == ([USER], [YES], [NO])


def test_strings_stay_strings():
    assert parts({"prompt": "Hi", "chosen": " yes", "rejected": " no"}) == ("Hi", " yes", " no")


def test_strings_without_prompt_share_one_up_to_the_space_before_they_part():
    assert parts({"chosen": "Q: Hi A: yes", "rejected": "Q: Hi A: no"}) == ("Q: Hi A:", " yes", " no")


def test_the_shared_prompt_is_never_the_whole_of_a_response():
    assert parts({"chosen": [USER, YES], "rejected": [USER, YES, MORE, NO]}) == ([USER], [YES], [YES, MORE, NO])
    assert parts({"chosen": "abc", "rejected": "abcd"}) == ("ab", "c", "cd")


def test_turns_that_both_share_belong_to_the_prompt():
    row = {"chosen": [USER, HELLO, MORE, YES], "rejected": [USER, HELLO, MORE, NO]}
    assert parts(row) == ([USER, HELLO, MORE], [YES], [NO])


def test_the_system_field_becomes_the_first_message():
    row = {"chosen": [USER, YES], "rejected": [USER, NO], "system": "Be brief."}
    assert parts(row)[0] == [SYSTEM, USER]
    assert parts({**row, "prompt": [SYSTEM, USER], "chosen": [YES], "rejected": [NO]})[0] == [SYSTEM, USER]
    assert parts(row, system_prompt=None)[0] == [USER]


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_template_options_come_along(as_text):
    tools, kwargs = ('[{"type": "function", "function": {"name": "f"}}]', '{"a": 1}') if as_text else (TOOLS, {"a": 1})
    pair = read({"prompt": [USER], "chosen": [YES], "rejected": [NO], "tools": tools, "chat_template_kwargs": kwargs})
    assert (pair.tools, pair.chat_template_kwargs) == (TOOLS, {"a": 1})


def test_columns_may_have_other_names():
    row = {"question": "Hi", "better": " yes", "worse": " no"}
    names = {"prompt_field": "question", "chosen_field": "better", "rejected_field": "worse"}
    assert parts(row, **names) == ("Hi", " yes", " no")


CHAT = {"prompt": [USER], "chosen": [YES], "rejected": [NO]}
REFUSED = [
    ("malformed", [1, 2], "is a list; needed: an object"),
    ("malformed", {"chosen": "a"}, "has no 'rejected'; its columns are ['chosen']"),
    ("malformed", {"chosen": "a", "rejected": [NO]}, "'chosen' is a string, 'rejected' is a list; needed: both"),
    ("malformed", {"chosen": 5, "rejected": "a"}, "'chosen' is int 5; needed: a string or a list of messages"),
    ("malformed", {**CHAT, "chosen": ["yes"]}, "message 1 of 'chosen' needs 'role' and 'content'; found a string"),
    ("malformed", {**CHAT, "chosen": [{"from": "gpt", "value": "x"}]}, "found ['from', 'value']"),
    (
        "malformed",
        {**CHAT, "chosen": [{"role": "assistant", "content": 5}]},
        "the content of message 1 of 'chosen' is int",
    ),
    ("malformed", {**CHAT, "chosen": [{"role": "assistant", "content": None}]}, "has a role and nothing else"),
    ("malformed", {"chosen": [YES], "rejected": [NO]}, "share no first message"),
    ("malformed", {"chosen": [USER, YES], "rejected": [MORE, NO]}, "share no first message"),
    ("malformed", {"chosen": [USER, HELLO, MORE, YES], "rejected": [USER, HELLO, USER, NO]}, "role 'user'. Chosen and"),
    ("malformed", {"prompt": "Bye", "chosen": [USER, YES], "rejected": [USER, NO]}, "Set format.prompt_field to null"),
    ("malformed", {**CHAT, "prompt": [SYSTEM, USER], "system": "Be long."}, "another in 'system'"),
    (
        "malformed",
        {"prompt": "a", "chosen": "b", "rejected": "c", "system": "d"},
        "has system, which need a chat template",
    ),
    ("malformed", {"prompt": "a", "chosen": "b", "rejected": "c", "tools": TOOLS}, "has tools, which need a chat"),
    ("malformed", {**CHAT, "system": 5}, "'system' is int 5; needed: a string"),
    ("malformed", {**CHAT, "tools": "[{"}, "'tools' is text that is not JSON"),
    ("malformed", {**CHAT, "tools": {"a": 1}}, "'tools' is an object; needed: list"),
    ("malformed", {**CHAT, "chat_template_kwargs": {"tokenize": True}}, "may not set ['tokenize']"),
    ("empty", {"prompt": "a", "chosen": " \n", "rejected": "b"}, "'chosen' is empty"),
    ("empty", {**CHAT, "rejected": []}, "'rejected' is an empty list"),
    ("empty", {**CHAT, "rejected": [{"role": "assistant", "content": " "}]}, "the rejected response is empty"),
    ("empty", {"prompt": " ", "chosen": [YES], "rejected": [NO]}, "'prompt' is empty"),
]


@pytest.mark.parametrize(("reason", "row", "message"), REFUSED, ids=[message[:30] for _, _, message in REFUSED])
def test_rows_that_are_no_pair_say_which_and_why(reason, row, message):
    with pytest.raises(RowError) as caught:
        read(row)
    assert str(caught.value).startswith("a.jsonl, row 3: ")
    assert message in str(caught.value)
    assert caught.value.reason == reason
