"""What is scored of a response: its turns, their weights, its thoughts; exactly, at the ends of tokens."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from chat_templates import CHATML, LLAMA, QWEN
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_dpo_jax.data.cache import tokenize_component
from lora_dpo_jax.data.chat import ExampleTokenizer, fit_to_length
from lora_dpo_jax.data.config import ComponentConfig, FormatConfig
from lora_dpo_jax.data.examples import TokenizedExample
from lora_dpo_jax.data.rows import read_example
from lora_dpo_jax.data.scored import scored_tokens, thinking_blocks
from lora_dpo_jax.data.sources import RowError, UrlSource


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


QUESTION = [user("What is the capital of France?")]
THOUGHT = "<think>\nHm\n</think>\n\nThe cat sat"
TURNS = [assistant("Paris"), user("the cat?"), assistant(THOUGHT), user("?"), assistant("Yes")]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Bern"}}}
CALLS = [
    assistant("", tool_calls=[CALL]),
    {"role": "tool", "content": "good"},
    assistant("It is good"),
]


def row_of(turns, prompt=QUESTION):
    return {"prompt": prompt, "chosen": turns, "rejected": [assistant("No")]}


def tokenized(tokenizer, row, template=None, **format):
    format = FormatConfig(**format)
    [result] = ExampleTokenizer(tokenizer, template, format).tokenize([read_example(row, format, "rows.jsonl, row 7")])
    if isinstance(result, RowError):
        raise result
    return result[0]


def scored_text(tokenizer, example, number=0):
    """The text of the scored tokens of a response; ¦ between tokens that are not neighbours."""
    if example.scored is None:
        return decode(tokenizer, example.responses[number])
    ids, scored = example.responses[number], example.scored[number]
    edges = np.flatnonzero(np.diff(np.concatenate([[False], scored, [False]]))).reshape(-1, 2)
    return "¦".join(decode(tokenizer, ids[start:stop]) for start, stop in edges)


def decode(tokenizer, ids):
    return tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)


# The same templates with marks around what the model writes, for transformers.
MARKED = {
    "chatml": CHATML.replace(
        "{{ message.content }}<|im_end|>\n",
        "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>\n{% endgeneration %}"
        "{% else %}{{ message.content }}<|im_end|>\n{% endif %}",
    ),
    "llama": LLAMA.replace(
        "{{ (message.content or message.tool_calls | tojson) | trim }}<|eot|>",
        "{% if message.role == 'assistant' %}{% generation %}"
        "{{ (message.content or message.tool_calls | tojson) | trim }}<|eot|>{% endgeneration %}"
        "{% else %}{{ message.content | trim }}<|eot|>{% endif %}",
    ),
    "qwen": QWEN.replace(
        "{% if message.role == 'assistant' and loop.last -%}",
        "{% if message.role == 'assistant' %}{% generation %}{% if loop.last -%}",
    ).replace(
        "{% endif -%}\n{{ content }}<|im_end|>\n",
        "{% endif -%}\n{{ content }}<|im_end|>\n{% endgeneration %}{% else %}{{ content }}<|im_end|>\n{% endif -%}",
    ),
}


@pytest.mark.parametrize("template", MARKED)
@pytest.mark.parametrize("turns", [TURNS, TURNS[:1], CALLS], ids=["turns", "one turn", "calls"])
def test_the_models_turns_are_those_that_marks_in_the_template_show(template, turns, make_tokenizer):
    if turns is CALLS and template == "qwen":
        turns = [assistant("the call"), *CALLS[1:]]  # it writes no calls
    tokenizer = make_tokenizer(template)
    example = tokenized(tokenizer, row_of(turns), train_on="all_turns")
    theirs = tokenizer.apply_chat_template(
        [*QUESTION, *turns],
        chat_template=MARKED[template],
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    assert [*example.prompt, *example.responses[0]] == theirs["input_ids"]
    ours = np.ones(len(example.responses[0]), bool) if example.scored is None else example.scored[0]
    assert ours.tolist() == [bool(x) for x in theirs["assistant_masks"][len(example.prompt) :]]
    last = tokenized(tokenizer, row_of(turns), train_on="last_turn")
    own = scored_text(tokenizer, example).split("¦")
    assert len(own) == len([turn for turn in turns if turn["role"] == "assistant"])
    assert scored_text(tokenizer, last) == own[-1]


def test_everything_after_the_prompt_is_scored_unless_set_otherwise(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    example = tokenized(tokenizer, row_of(TURNS))
    assert example.scored is None
    turns = tokenized(tokenizer, row_of(TURNS), train_on="all_turns")
    np.testing.assert_array_equal(turns.responses[0], example.responses[0])
    assert turns.scored is not None and turns.scored[1].all()


@pytest.mark.parametrize("template", ["thinking", "deepseek"])
def test_turns_are_found_behind_a_generation_prompt_that_conversations_lack(template, make_tokenizer):
    tokenizer = make_tokenizer(template)
    end = tokenizer.eos_token
    example = tokenized(tokenizer, row_of(TURNS), train_on="all_turns")
    first, *_, last = scored_text(tokenizer, example).split("¦")
    assert first.strip() == f"Paris{end}" and last.strip().endswith(f"Yes{end}")
    assert "The cat sat" in scored_text(tokenizer, example) and "the cat?" not in scored_text(tokenizer, example)


def test_turns_are_found_where_an_eos_ends_whole_conversations(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    template = CHATML + "{% if not add_generation_prompt %}<|im_end|>{% endif %}"  # like Phi-3's
    example = tokenized(tokenizer, row_of(TURNS), template, train_on="all_turns")
    assert scored_text(tokenizer, example) == f"Paris<|im_end|>\n¦{THOUGHT}<|im_end|>\n¦Yes<|im_end|>\n<|im_end|>"


def test_a_call_that_the_template_writes_without_content_is_a_turn(make_tokenizer):
    template = CHATML.replace("{{ message.content }}", "{{ message.tool_calls[0].function.name or message.content }}")
    template = template.replace("{{ message.t", "{% if message.tool_calls %}{{ message.t")
    template = template.replace(" or message.content }}", " }}{% else %}{{ message.content }}{% endif %}")
    tokenizer = make_tokenizer("chatml")
    example = tokenized(tokenizer, row_of(CALLS), template, train_on="all_turns")
    assert scored_text(tokenizer, example) == "weather<|im_end|>\n¦It is good<|im_end|>\n"


def test_a_turn_without_an_exact_end_is_refused_by_number(make_tokenizer):
    mark = "{{ message.content }}{% if loop.last and message.role == 'assistant' %} (last){% endif %}"
    template = CHATML.replace("{{ message.content }}", mark)
    tokenizer = make_tokenizer("chatml")
    assert tokenized(tokenizer, row_of(TURNS), template).scored is None
    last = tokenized(tokenizer, row_of(TURNS), template, train_on="last_turn")
    assert scored_text(tokenizer, last) == "Yes (last)<|im_end|>\n"
    with pytest.raises(RowError, match="rows.jsonl, row 7: message 1 of the chosen response: the chat") as caught:
        tokenized(tokenizer, row_of(TURNS), template, train_on="all_turns")
    assert caught.value.reason == "boundary"


@pytest.mark.parametrize(
    "train_on, weights, expected",
    [
        (None, (0, 1, 1), "<|im_start|>user\nthe cat?<|im_end|>\n<|im_start|>assistant\n{}"),
        ("all_turns", (0, 1.0, None), "{}"),
        ("all_turns", (1, 0, 0), "Paris<|im_end|>\n"),
        ("last_turn", (1, 0, 1), "Yes<|im_end|>\n"),
    ],
)
def test_a_message_of_weight_0_is_context(train_on, weights, expected, make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    turns = [*TURNS]
    for number, weight in zip((0, 2, 4), weights, strict=True):
        turns[number] = {**turns[number], "weight": weight}
    example = tokenized(tokenizer, row_of(turns), train_on=train_on)
    unweighted = tokenized(tokenizer, row_of(TURNS), train_on=train_on)
    for ours, theirs in zip(example.parts, unweighted.parts, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    rest = scored_text(tokenizer, unweighted).partition("assistant\n" if train_on is None else "¦")[2]
    assert scored_text(tokenizer, example) == expected.format(rest)


def test_a_weight_does_not_tell_messages_apart_and_reaches_no_template(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    shared = [*QUESTION, assistant("Hi", weight=0), user("?")]
    row = {"chosen": [*shared, assistant("a")], "rejected": [*QUESTION, assistant("Hi"), user("?"), assistant("b")]}
    example = tokenized(tokenizer, row)
    assert scored_text(tokenizer, example) == "a<|im_end|>\n" and example.scored is None
    keys = "{% for m in messages %}[{% for key in m %}{{ key }} {% endfor %}{{ m.content }}]{% endfor %}"
    assert decode(tokenizer, tokenized(tokenizer, row, keys).prompt).count("[role content ") == 3


@pytest.mark.parametrize(
    "message, error",
    [
        (assistant("a", weight=0.5), "the weight of message 1 of 'chosen' is float 0.5; needed: 0 or 1"),
        (assistant("a", weight="0"), "the weight of message 1 of 'chosen' is a string; needed: 0 or 1"),
        (assistant("a", weight=True), "the weight of message 1 of 'chosen' is bool True; needed: 0 or 1"),
        ({**user("a"), "weight": 0}, "message 1 of 'chosen' has a weight, and only messages of the assistant may"),
    ],
)
def test_a_weight_of_no_sense_is_named(message, error):
    with pytest.raises(RowError, match=f"rows.jsonl, row 7: {error}"):
        read_example(row_of([message]), FormatConfig(), "rows.jsonl, row 7")


@pytest.mark.parametrize(
    "turns, format",
    [
        ([assistant("a", weight=0)], {}),
        ([assistant("a"), user("b"), assistant("c", weight=0)], {"train_on": "last_turn"}),
        ([assistant("<think>a")], {"mask_thinking": True, "chat_template": CHATML}),
    ],
)
def test_a_response_of_which_nothing_is_scored_is_empty(turns, format, make_tokenizer):
    with pytest.raises(RowError, match="row 7: no token of the chosen response is scored") as caught:
        tokenized(make_tokenizer("chatml"), row_of(turns), **format)
    assert caught.value.reason == "empty"


BLOCKS = {
    "no block": (("answer", False), []),
    "a block": (("<t>a</t>answer", False), ["<t>a</t>"]),
    "two blocks": (("<t>a</t>b<t></t>c", False), ["<t>a</t>", "<t></t>"]),
    "one that is not closed": (("b<t>a", False), ["<t>a"]),
    "one opened before": (("a</t>b", True), ["a</t>"]),
    "one that nothing opened": (("a</t>b<t>c</t>", False), ["a</t>", "<t>c</t>"]),
    "one opened twice": (("<t>a<t>b</t>c", True), ["<t>a<t>b</t>"]),
    "all of it": (("answer", True), ["answer"]),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_blocks_of_thoughts_are_found(case):
    (text, is_open), expected = BLOCKS[case]
    assert [text[start:stop] for start, stop in thinking_blocks(text, ("<t>", "</t>"), is_open)] == expected


def test_thoughts_are_context_if_they_are_masked(make_tokenizer):
    tokenizer = make_tokenizer("qwen")
    row = row_of([assistant(THOUGHT)])
    whole, masked = (tokenized(tokenizer, row, mask_thinking=masked) for masked in (False, True))
    for ours, theirs in zip(whole.parts, masked.parts, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert scored_text(tokenizer, whole).startswith("<think>")
    assert scored_text(tokenizer, masked) == "\n\nThe cat sat<|im_end|>\n"
    assert scored_text(tokenizer, masked, 1) == "\n\nNo<|im_end|>\n"  # the template's empty block


def test_a_block_that_the_generation_prompt_opens_is_masked_too(make_tokenizer):
    tokenizer = make_tokenizer("thinking")
    example = tokenized(tokenizer, row_of([assistant(THOUGHT)]), mask_thinking=True)
    assert decode(tokenizer, example.prompt).endswith("<think>\n")
    assert scored_text(tokenizer, example) == "\n\nThe cat sat<|im_end|>\n"


def test_a_tag_that_the_user_writes_opens_no_block(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    turns = [assistant("a"), user("<think> b"), assistant("c")]
    example = tokenized(tokenizer, row_of(turns, [user("<think>?")]), mask_thinking=True, train_on="all_turns")
    assert scored_text(tokenizer, example) == "a<|im_end|>\n¦c<|im_end|>\n"


def test_strings_may_hold_thoughts_with_tags_of_their_own(make_tokenizer):
    tokenizer = make_tokenizer()
    row = {"prompt": "The cat", "chosen": " sat[T]the mat[/T] there.", "rejected": " sat."}
    example = tokenized(tokenizer, row, mask_thinking=True, thinking_tags=["[T]", "[/T]"])
    assert scored_text(tokenizer, example) == " sat¦ there.<|im_end|>"


def test_a_response_that_is_tokenized_by_itself_is_masked_alike(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    row = row_of([assistant("\n\n<think>the cat</think>\n\nThe cat sat")])
    example = tokenized(tokenizer, row, mask_thinking=True)
    assert scored_text(tokenizer, example) == "\n\n¦\n\nThe cat sat<|im_end|>\n"


def test_a_token_over_the_end_of_a_block_is_not_scored(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    row = row_of([assistant("[I think that.\n\nThe cat")])
    example = tokenized(tokenizer, row, mask_thinking=True, thinking_tags=["[", "that."])
    pieces = [decode(tokenizer, ids) for ids in example.responses[0][:, None]]
    assert ".\n\n" in pieces  # the end of the tag with what follows it
    assert scored_text(tokenizer, example) == "The cat<|im_end|>\n"


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
@settings(deadline=None, max_examples=40)
@given(text=st.text("the cat\n.é", min_size=1, max_size=20), data=st.data())
def test_a_token_is_scored_if_all_of_its_characters_are(kind, text, data, make_tokenizer):
    tokenizer = ExampleTokenizer(cached(make_tokenizer, kind))
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(text), max_size=len(text))))
    [ids] = tokenizer.encode([text])
    scored = tokenizer._scored_tokens("", text, ids, mask)
    for number, token in enumerate(tokenizer._with_spans.encode(text, add_special_tokens=False).offsets):
        characters = mask[slice(*token)]
        assert scored[number] == characters.all() if len(characters) else True
    assert scored.all() == mask.all() or kind == "metaspace"  # where runs of unknown characters are one token


@functools.cache
def cached(make, kind):
    return make(kind=kind)


def test_an_empty_span_is_that_of_the_character_after_it():
    is_scored = np.array([True, False, True])
    assert scored_tokens([(0, 0), (1, 1), (0, 2), (2, 3), (3, 3)], is_scored).tolist() == [
        True,
        False,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("tags", [[], ["<think>"], ["<t>", "<t>"], ["<t>", " "], ["a", "b", "c"]])
def test_tags_of_no_sense_are_named(tags):
    with pytest.raises(ValueError, match=r"format.thinking_tags=.* must be two texts"):
        FormatConfig(thinking_tags=tags)


def test_masks_go_to_disk_under_a_key_with_their_settings(make_tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row_of(TURNS)) + "\n" + json.dumps(row_of([assistant(THOUGHT)])) + "\n")
    tokenizer = make_tokenizer("chatml")

    def load(**format):
        component = ComponentConfig(UrlSource([str(path)]), FormatConfig(**format))
        return tokenize_component(component, tokenizer, split="train", train_seq_len=256, cache_dir=tmp_path)

    kinds = [
        {},
        {"train_on": "all_turns"},
        {"mask_thinking": True},
        {"mask_thinking": True, "thinking_tags": ["c", "t"]},
    ]
    loaded = [load(**kind) for kind in kinds]
    assert len({examples.fingerprint for examples in loaded}) == 4
    assert loaded[0].arrays.sizes.unscored.tolist() == [0, 0]
    for examples, kind in zip(loaded, kinds, strict=True):
        for number, turns in enumerate((TURNS, [assistant(THOUGHT)])):
            direct = tokenized(tokenizer, row_of(turns), **kind)
            for response in (0, 1):
                text = scored_text(tokenizer, examples[number], response)
                assert text == scored_text(tokenizer, direct, response)


def test_a_response_cut_before_its_scored_tokens_is_too_long():
    pair = TokenizedExample.pair(*(np.arange(size, dtype=np.int32) for size in (3, 6, 2)))
    late = dataclasses.replace(pair, scored=(np.arange(6) > 4, np.ones(2, bool)))
    cut = fit_to_length(dataclasses.replace(pair, scored=(np.arange(6) > 3, np.ones(2, bool))), 8, "right", "row 7")
    assert [mask.tolist() for mask in cut.scored] == [[False] * 4 + [True], [True] * 2]
    with pytest.raises(RowError, match="row 7: cut to train_seq_len, the chosen response has no token to score"):
        fit_to_length(late, 8, "right", "row 7")
