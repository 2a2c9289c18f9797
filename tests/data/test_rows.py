import json

import pytest

from lora_dpo_jax.data.config import FormatConfig
from lora_dpo_jax.data.rows import read_example
from lora_dpo_jax.data.sources import RowError

USER, HELLO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
YES, NO = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}
MORE = {"role": "user", "content": "More?"}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def read(row, **format):
    return read_example(row, FormatConfig(**format), "a.jsonl, row 3")


def parts(row, **format):
    pair = read(row, **format)
    return pair.prompt, *pair.responses


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
        {"prompt": "", "chosen": [USER, YES], "rejected": [USER, NO]},
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
STRINGS = {"prompt": "Hi", "chosen": "yes", "rejected": "no"}
REFUSED = [
    ("malformed", [1, 2], "is a list; needed: an object"),
    ("malformed", {"chosen": "a"}, "has no 'rejected'; its columns are ['chosen']"),
    ("malformed", {"chosen": "a", "rejected": [NO]}, "'chosen' is a string, 'rejected' is a list; needed: all"),
    ("malformed", {"chosen": 5, "rejected": "a"}, "'chosen' is int 5; needed: a string or a list of messages"),
    ("malformed", {**CHAT, "chosen": ["yes"]}, "message 1 of 'chosen' needs 'role' and 'content'; found a string"),
    ("malformed", {**CHAT, "chosen": [{"from": "bing", "value": "x"}]}, "message 1 of 'chosen' is from 'bing'"),
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
    ("malformed", None, "is null; needed: an object"),
    ("malformed", {**STRINGS, "chosen": "{", "rejected": None}, "has no 'rejected'"),
    ("malformed", {"preferred_output": [YES]}, "has no 'non_preferred_output'; its columns are ['preferred_output']"),
    ("malformed", {**CHAT, "prompt": {"messages": "Hi"}}, "'prompt.messages' is a string; needed"),
    (
        "malformed",
        {**STRINGS, "prompt": None, "question": "Hi", "messages": [USER]},
        "'question' and 'messages' may be",
    ),
    ("malformed", {"chosen": "b", "rejected": "c", "system": "d"}, "has no 'prompt', so that nothing says where"),
    ("malformed", {**CHAT, "system": 5}, "'system' is int 5; needed: a string"),
    ("malformed", {**CHAT, "tools": "[{"}, "'tools' is text that is not JSON"),
    ("malformed", {**CHAT, "tools": {"a": 1}}, "'tools' is an object; needed: list"),
    ("malformed", {**CHAT, "tools": "[" * 100_000}, "'tools' is JSON that is nested too deeply"),
    ("malformed", {**CHAT, "images": ["a.png"]}, "'images' has a value, and the model reads text alone"),
    ("malformed", {**CHAT, "audio": {"bytes": b"x", "path": None}}, "'audio' has a value"),
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


QUESTION = {"chosen": "yes", "rejected": "no"}
ELSEWHERE = {
    "a question": {**QUESTION, "question": "Hi"},
    "an instruction": {**QUESTION, "instruction": "Hi", "input": ""},
    "an instruction with its input": {**QUESTION, "instruction": "H", "input": "i"},
    "an input": {**QUESTION, "input": "Hi"},
    "messages": {**QUESTION, "messages": [USER]},
    "messages as text": {**QUESTION, "messages": json.dumps([USER])},
    "one message": {"messages": [USER], "chosen": YES, "rejected": NO},
    "a conversation": {"conversations": [{"from": "human", "value": "Hi"}], "chosen": [YES], "rejected": [NO]},
    "OpenAI": {"input": {"messages": [USER]}, "preferred_output": [YES], "non_preferred_output": [NO]},
}


@pytest.mark.parametrize("row", ELSEWHERE.values(), ids=ELSEWHERE)
def test_a_prompt_is_found_where_other_tools_put_it(row):
    user = {**USER, "content": "H\ni"} if row.get("input") == "i" else USER
    assert parts(row, strings="chat") == ([user], [YES], [NO])


@pytest.mark.parametrize("row", ELSEWHERE.values(), ids=ELSEWHERE)
def test_a_prompt_may_be_named_where_other_tools_put_it(row):
    column = next(
        column for column in ("question", "instruction", "messages", "conversations", "input") if column in row
    )
    names = {"chosen_field": "preferred_output", "rejected_field": "non_preferred_output"}
    found = parts(row, strings="chat", prompt_field=column, **(names if "preferred_output" in row else {}))
    assert found == parts(row, strings="chat")


def test_the_tools_of_an_openai_row_are_those_of_its_input():
    row = {"input": {"messages": [USER], "tools": TOOLS}, "preferred_output": [YES], "non_preferred_output": [NO]}
    assert read(row).tools == TOOLS


def test_a_column_that_the_responses_do_not_answer_is_no_prompt():
    full = {"chosen": [USER, YES], "rejected": [USER, NO]}
    assert parts({**full, "question": "Other?", "messages": [MORE]}) == ([USER], [YES], [NO])
    assert parts({**full, "messages": [USER, YES]}) == ([USER], [YES], [NO])
    begun = {"chosen": "Hi A: yes", "rejected": "Hi A: no"}
    assert parts({**begun, "question": "Hi"}) == ("Hi A:", " yes", " no")
    assert parts({**begun, "question": " ", "messages": [USER, YES]}) == ("Hi A:", " yes", " no")
    assert parts({**begun, "messages": [], "conversations": []}) == ("Hi A:", " yes", " no")
    assert parts({**begun, "question": "Bye"}, prompt_field=None) == ("Hi A:", " yes", " no")
    with pytest.raises(RowError, match="has no prompt, and chosen and rejected share no first message"):
        parts({"messages": [USER, YES], "chosen": [YES], "rejected": [NO]})


def test_strings_are_turns_if_told_or_if_only_a_template_can_write_the_row():
    turns = ([USER], [YES], [NO])
    assert parts(STRINGS) == parts(STRINGS, strings="plain", chat_template="{{ messages }}") == ("Hi", "yes", "no")
    assert parts(STRINGS, strings="chat") == parts(STRINGS, chat_template="{{ messages }}") == turns
    assert parts({**STRINGS, "system": ""}) == turns
    assert parts({**STRINGS, "system": "Be brief."}) == ([SYSTEM, USER], [YES], [NO])
    assert parts({**STRINGS, "tools": TOOLS}) == turns and read({**STRINGS, "tools": TOOLS}).tools == TOOLS
    assert parts({**STRINGS, "system": None, "tools": None}) == ("Hi", "yes", "no")


def test_strings_without_a_prompt_are_no_turns():
    begun = {"chosen": "Q: Hi A: yes", "rejected": "Q: Hi A: no"}
    for format in ({"strings": "chat"}, {"chat_template": "{{ messages }}"}):
        with pytest.raises(RowError, match="has no 'prompt', so that nothing says where the user's turn ends"):
            read(begun, **format)
    assert read(begun, strings="plain", chat_template="{{ messages }}").implicit_prompt


def test_what_needs_a_template_is_refused_beside_plain_strings():
    with pytest.raises(RowError, match="has system and tools, which need a chat template, but format.strings is plain"):
        read({**STRINGS, "tools": TOOLS, "system": "d"}, strings="plain")


def test_cells_without_a_value_change_nothing():
    cells = {"tools": "", "chat_template_kwargs": "", "images": "", "messages": "", "question": ""}
    assert parts({**STRINGS, **cells}, strings="plain") == ("Hi", "yes", "no")
    assert parts({**CHAT, **cells, "system": ""}) == ([USER], [YES], [NO])
    assert parts({**cells, "prompt": "", "chosen": json.dumps([USER, YES]), "rejected": json.dumps([USER, NO])}) == (
        [USER],
        [YES],
        [NO],
    )


def test_messages_in_text_are_messages():
    row = {column: json.dumps(value) for column, value in CHAT.items()}
    assert parts(row) == ([USER], [YES], [NO])
    assert parts({**row, "prompt": "Hi"}) == ([USER], [YES], [NO])
    answer = {**STRINGS, "chosen": row["chosen"]}
    assert parts(answer) == ("Hi", row["chosen"], "no")


def test_columns_for_media_that_hold_nothing_are_harmless():
    empty = {"image": None, "images": [], "videos": [None], "audio": {"bytes": None, "path": None}, "video": ""}
    assert parts({**CHAT, **empty}) == ([USER], [YES], [NO])


def test_nulls_of_template_variables_are_missing_and_those_of_tools_are_data():
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"default": None}}}}}]
    pair = read({**CHAT, "tools": tools, "chat_template_kwargs": {"a": None, "b": [None]}})
    assert (pair.tools, pair.chat_template_kwargs) == (tools, {"b": [None]})


def test_a_row_that_is_nested_too_deeply_is_malformed():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    message = {**YES, "extra": deep}
    with pytest.raises(RowError, match="a.jsonl, row 3: is nested too deeply") as caught:
        read({"chosen": [USER, message, YES], "rejected": [USER, {**YES, "extra": [[]]}, NO], "images": deep})
    assert caught.value.reason == "malformed"


RANKED = {"prompt": "Hi", "responses": [" a", " b", " c", " d"], "scores": [2, 9.5, 2, 7]}


@pytest.mark.parametrize(
    "comparisons, expected",
    [
        ("all", ((1, 3), (1, 0), (1, 2), (3, 0), (3, 2))),
        ("best_worst", ((1, 2),)),
        ("adjacent", ((1, 3), (3, 0))),
    ],
)
def test_ranked_answers_are_one_example_whose_better_ones_are_compared_with_worse_ones(comparisons, expected):
    example = read(RANKED, type="ranked", comparisons=comparisons, response_columns=["scores"])
    assert example.prompt == "Hi" and example.responses == (" a", " b", " c", " d")
    assert example.comparisons == expected
    assert example.columns == {"scores": [2.0, 9.5, 2.0, 7.0]}
    by_rank = {"prompt": "Hi", "answers": RANKED["responses"], "places": [3, 1, 3, 2]}
    named = {"responses_field": "answers", "ranks_field": "places"}
    assert read(by_rank, type="ranked", comparisons=comparisons, **named).comparisons == expected


def test_two_ranked_answers_in_either_order_are_a_pair():
    conversation = {"prompt": [USER], "responses": [[NO], [YES]], "scores": [0, 1]}
    example = read(conversation, type="ranked")
    assert (example.responses, example.comparisons) == (([NO], [YES]), ((1, 0),))


@pytest.mark.parametrize(
    "row, reason, message",
    [
        ({"scores": [1, 1, 1, 1]}, "tied", "'scores' has the same number for all responses"),
        (
            {"scores": [1, 2]},
            "malformed",
            "'scores', which orders the responses, is .*; needed: a list of 4 finite numbers",
        ),
        ({"scores": [1, 2, 3, float("nan")]}, "malformed", "needed: a list of 4 finite numbers, one for each response"),
        ({"scores": None}, "malformed", "'scores', which orders the responses, is not there"),
        ({"responses": [" a"]}, "malformed", "'responses' has 1; needed: a list of two or more responses"),
        ({"responses": " a"}, "malformed", "'responses' is a string; needed: a list of two or more responses"),
        ({"responses": None}, "malformed", "'responses' is not there; needed: a list"),
        ({"responses": [" a", " ", " c", " d"]}, "empty", r"'responses\[1\]' is empty"),
        ({"responses": [" a", None, " c", " d"]}, "malformed", r"has no 'responses\[1\]'"),
        ({"responses": [" a", [YES], " c", " d"]}, "malformed", "needed: all strings, or all lists of messages"),
    ],
)
def test_a_ranked_row_with_a_mistake_is_named(row, reason, message):
    with pytest.raises(RowError, match=f"a.jsonl, row 3: .*{message}") as error:
        read(RANKED | row, type="ranked")
    assert error.value.reason == reason


@pytest.mark.parametrize(
    "comparisons, expected",
    [
        ("all", {(1, 3): 1.0, (1, 0): 1.0, (1, 2): 1.0, (3, 0): 1.0, (3, 2): 1.0, (0, 2): 0.5, (2, 0): 0.5}),
        ("best_worst", {(1, 2): 1.0}),
        ("adjacent", {(1, 3): 1.0, (3, 0): 1.0, (0, 2): 0.5, (2, 0): 0.5}),
    ],
)
def test_ties_may_count_both_ways_with_half_the_weight(comparisons, expected):
    example = read(RANKED, type="ranked", comparisons=comparisons, ties="both_ways")
    assert example.weights is not None
    found = dict(zip(example.comparisons, example.weights, strict=True))
    total = sum(expected.values())
    assert found == pytest.approx({pair: share / total for pair, share in expected.items()})


def test_a_row_of_ties_alone_is_kept_if_they_count():
    example = read(RANKED | {"scores": [1, 1, 1, 1]}, type="ranked", comparisons="best_worst", ties="both_ways")
    assert (example.comparisons, example.weights) == (((0, 3), (3, 0)), (0.5, 0.5))


NUMBERS = {"trust": 0.25, "gap": 1.5}


def test_the_weight_of_a_row_is_that_of_all_its_comparisons():
    assert read({**STRINGS, **NUMBERS}).weights is None
    assert read({**STRINGS, **NUMBERS}, weight_field="trust").weights == (0.25,)
    ranked = read(RANKED | NUMBERS, type="ranked", weight_field="trust")
    assert ranked.weights == pytest.approx((0.05,) * 5)
    answer = {"prompt": "Hi", "completion": " a", "label": True, **NUMBERS}
    assert read(answer, type="unpaired", weight_field="trust").columns == {"label": [1.0], "example_weight": 0.25}
    assert read(answer, type="unpaired").columns["example_weight"] == 1.0


def test_the_margin_of_a_pair_is_a_column():
    assert read({**STRINGS, **NUMBERS}, margin_field="gap").columns == {"target_margin": 1.5}
    for other in ("ranked", "unpaired"):
        with pytest.raises(
            ValueError, match=rf"format\.margin_field='gap' is the margin .* found format\.type={other}"
        ):
            FormatConfig(type=other, margin_field="gap")


@pytest.mark.parametrize(
    "value, found",
    [(-0.5, "-0.5"), (float("nan"), "nan"), (float("inf"), "inf"), (None, "not there"), ("1", "a string"), ([1], "a ")],
)
@pytest.mark.parametrize("setting", ["weight_field", "margin_field"])
def test_weights_and_margins_that_are_none_are_named(setting, value, found):
    message = f"a.jsonl, row 3: 'trust', format.{setting}, is {found}.*needed: a finite number of at least 0"
    with pytest.raises(RowError, match=message) as error:
        read({**STRINGS, "trust": value}, **{setting: "trust"})
    assert error.value.reason == "malformed"
