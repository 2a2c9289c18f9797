import inspect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from lora_dpo_jax.data.chat import ExampleTokenizer, fit_to_length
from lora_dpo_jax.data.config import FormatConfig
from lora_dpo_jax.data.examples import TokenizedExample
from lora_dpo_jax.data.rows import Example, read_example
from lora_dpo_jax.data.sources import RowError, attempt


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


QUESTION = [user("What is the capital of France?")]
CONVERSATION = [
    system("Be brief."),
    user("Hello"),
    assistant("<think>\nHm\n</think>\n\nHello there!"),
    user("The cat?"),
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
ROWS = {
    "strings": [
        {"prompt": "The cat sat", "chosen": " on the mat.", "rejected": " there."},
        {"prompt": "Hello\n", "chosen": "Paris", "rejected": "Paris is good"},
    ],
    "strings, implicit prompt": [
        {"chosen": "The cat sat on the mat.", "rejected": "The cat sat there."},
        {"chosen": "Human: Hello\n\nAssistant: Hi!", "rejected": "Human: Hello\n\nAssistant: Hello world"},
        {"chosen": "The weather is good", "rejected": "The weather is gold"},  # parts within a word
    ],
    "messages": [
        {"prompt": QUESTION, "chosen": [assistant("Paris")], "rejected": [assistant("The cat\n\n")]},
        {
            "prompt": CONVERSATION,
            "chosen": [assistant("<think>\nA\n</think>\n\nIt sat.")],
            "rejected": [assistant("No")],
        },
        {"prompt": QUESTION, "chosen": [assistant("a"), user("b"), assistant("c")], "rejected": [assistant("d")]},
    ],
    "messages, implicit prompt": [
        {"chosen": [*CONVERSATION, assistant("Yes")], "rejected": [*CONVERSATION, assistant("No")]},
        {"chosen": [*QUESTION, assistant("Paris")], "rejected": [*QUESTION, assistant("I think"), user("?")]},
    ],
}
LLAMA_ROWS = [
    {"prompt": QUESTION, "chosen": [assistant("Paris")], "rejected": [assistant("No")], "tools": TOOLS},
    {
        "prompt": QUESTION,
        "chosen": [assistant("Paris")],
        "rejected": [assistant("No")],
        "chat_template_kwargs": {"date_string": "Friday"},
    },
]


def pairs_of(rows, **format):
    return [read_example(row, FormatConfig(**format), f"rows.jsonl, row {n}") for n, row in enumerate(rows, start=1)]


def tokenized(tokenizer, *rows, template=None, **format):
    """The tokens of each row; raises if one is refused."""
    results = ExampleTokenizer(tokenizer, template).tokenize(pairs_of(rows, **format))
    for result in results:
        if isinstance(result, RowError):
            raise result
    return results


def one(tokenizer, row, **options):
    return tokenized(tokenizer, row, **options)[0][0]


def as_lists(pairs):
    return [tuple(part.tolist() for part in pair.parts) for pair, _ in pairs]


def text(tokenizer, ids):
    return tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("shape", ["messages", "messages, implicit prompt"])
@pytest.mark.parametrize("template", ["chatml", "llama", "qwen"])
def test_tokens_of_messages_are_those_of_trl(template, shape, make_tokenizer, trl_pairs):
    tokenizer = make_tokenizer(template, add_bos=True)
    ours = tokenized(tokenizer, *ROWS[shape])
    assert {boundary for _, boundary in ours} == {"exact"}
    assert as_lists(ours) == trl_pairs(ROWS[shape], tokenizer)


@pytest.mark.parametrize("shape", ["strings", "strings, implicit prompt"])
@pytest.mark.parametrize("add_bos", [False, True])
def test_tokens_of_strings_are_those_of_trl(add_bos, shape, make_tokenizer, trl_pairs):
    tokenizer = make_tokenizer(add_bos=add_bos)
    ours = tokenized(tokenizer, *ROWS[shape])
    assert {boundary for _, boundary in ours} == {"exact"}
    assert as_lists(ours) == trl_pairs(ROWS[shape], tokenizer)


@pytest.mark.parametrize("row", LLAMA_ROWS, ids=["tools", "chat_template_kwargs"])
def test_template_options_are_those_of_trl(row, make_tokenizer, trl_pairs):
    tokenizer = make_tokenizer("llama")
    plain = {key: row[key] for key in ("prompt", "chosen", "rejected")}
    ours = tokenized(tokenizer, row)
    assert as_lists(ours) == trl_pairs([row], tokenizer)
    assert as_lists(ours) != as_lists(tokenized(tokenizer, plain))


def test_thinking_can_be_switched_off_by_row_as_in_trl(make_tokenizer, trl_pairs):
    row = {**ROWS["messages"][0], "chat_template_kwargs": {"enable_thinking": False}}
    tokenizer = make_tokenizer("qwen")
    assert as_lists(tokenized(tokenizer, row)) == trl_pairs([row], tokenizer)
    assert text(tokenizer, one(tokenizer, row).responses[0]) == "Paris<|im_end|>\n"


def test_the_thoughts_that_the_template_adds_to_a_response_are_scored(make_tokenizer):
    tokenizer = make_tokenizer("qwen")
    pair = one(tokenizer, ROWS["messages"][0])
    assert text(tokenizer, pair.prompt).endswith("<|im_start|>assistant\n")
    assert text(tokenizer, pair.responses[0]) == "<think>\n\n</think>\n\nParis<|im_end|>\n"


def test_right_truncation_is_the_keep_start_of_trl(make_tokenizer, trl_pairs):
    tokenizer = make_tokenizer("chatml")
    rows = ROWS["messages"]
    expected = trl_pairs(rows, tokenizer, max_length=40)
    ours = []
    for pair, _ in tokenized(tokenizer, *rows):
        try:
            ours.append(fit_to_length(pair, 40, "right", "row"))
        except RowError as error:
            assert error.reason == "too_long"
    assert len(ours) == len(expected) < len(rows)
    for pair, (prompt, chosen, rejected) in zip(ours, expected, strict=True):
        # TRL cuts prompt + response in its collator.
        assert np.concatenate([pair.prompt, pair.responses[0]]).tolist() == (prompt + chosen)[:40]
        assert np.concatenate([pair.prompt, pair.responses[1]]).tolist() == (prompt + rejected)[:40]


@settings(deadline=None, max_examples=60)
@given(
    question=st.text("ab \n", min_size=1, max_size=8),
    answers=st.lists(st.text("ab \n", min_size=1, max_size=8), min_size=2, max_size=2),
    template=st.sampled_from(["chatml", "llama", "qwen", "thinking"]),
)
def test_the_prompt_is_what_the_model_is_given_and_the_rest_is_scored(question, answers, template, make_tokenizer):
    tokenizer = make_tokenizer(template)
    chosen, rejected = ([assistant(answer + "c")] for answer in answers)
    pair = Example([user(question)], (chosen, rejected), "row")
    [(tokens, _)] = ExampleTokenizer(tokenizer).tokenize([pair])
    given_ids = tokenizer.apply_chat_template(pair.prompt, add_generation_prompt=True)["input_ids"]
    assert tokens.prompt.tolist() == given_ids
    for response, ids in ((chosen, tokens.responses[0]), (rejected, tokens.responses[1])):
        whole = tokenizer.apply_chat_template([*pair.prompt, *response], tokenize=False)
        assert text(tokenizer, np.concatenate([tokens.prompt, ids])) == whole


def test_tokens_that_merge_over_the_end_of_the_prompt_are_kept_apart(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    row = {"prompt": QUESTION, "chosen": [assistant("\n\nParis")], "rejected": [assistant("Hello")]}
    [(pair, boundary)] = tokenized(tokenizer, row)
    assert boundary == "merged"
    assert pair.prompt.tolist() == tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
    assert text(tokenizer, pair.responses[0]) == "\n\nParis<|im_end|>\n"
    assert text(tokenizer, pair.responses[1]) == "Hello<|im_end|>\n"


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_a_prompt_that_ends_within_a_word_ends_there(kind, make_tokenizer):
    tokenizer = make_tokenizer(kind=kind)
    [(pair, boundary)] = tokenized(
        tokenizer, {"prompt": "The capit", "chosen": "al of France", "rejected": "ol is bad"}
    )
    assert boundary == "merged"
    assert pair.prompt.tolist() == tokenizer("The capit", add_special_tokens=False)["input_ids"]
    assert text(tokenizer, np.concatenate([pair.prompt, pair.responses[0]])).endswith("The capital of France<|im_end|>")
    assert text(tokenizer, np.concatenate([pair.prompt, pair.responses[1]])).endswith("The capitol is bad<|im_end|>")


def test_a_generation_prompt_that_conversations_lack_is_left_out(make_tokenizer, trl_pairs):
    tokenizer = make_tokenizer("deepseek")
    row = {"prompt": QUESTION, "chosen": [assistant("<think>A</think>Paris")], "rejected": [assistant("thus")]}
    [(pair, boundary)] = tokenized(tokenizer, row)
    assert boundary == "template"
    assert text(tokenizer, pair.prompt) == "<|bos|><|end|>What is the capital of France?<|start|>"
    assert text(tokenizer, pair.responses[0]) == "Paris<|eot|>"
    assert [tuple(part.tolist() for part in pair.parts)] == trl_pairs([row], tokenizer)


def test_a_response_of_several_turns_loses_the_thoughts_of_its_first(make_tokenizer, trl_pairs):
    tokenizer = make_tokenizer("thinking")
    row = {"prompt": QUESTION, "chosen": [assistant("Paris"), user("?"), assistant("c")], "rejected": [assistant("No")]}
    [(pair, boundary)] = tokenized(tokenizer, row)
    assert boundary == "template"
    assert text(tokenizer, pair.prompt).endswith("<|im_start|>assistant\n")
    assert text(tokenizer, pair.responses[0]).startswith("Paris<|im_end|>")
    assert text(tokenizer, pair.responses[1]) == "<think>\n\n</think>\n\nNo<|im_end|>\n"
    assert [tuple(part.tolist() for part in pair.parts)] == trl_pairs([row], tokenizer)


def test_thoughts_after_a_prompt_that_has_closed_them_are_refused(make_tokenizer):
    row = {**ROWS["messages"][1], "chat_template_kwargs": {"enable_thinking": False}}
    with pytest.raises(RowError, match="rows.jsonl, row 1: the chat template renders the prompt differently"):
        tokenized(make_tokenizer("qwen"), row)


def test_a_prompt_rendered_otherwise_before_a_response_is_refused_by_number(make_tokenizer):
    good, bad = ROWS["messages"][0], ROWS["messages"][1]
    first, second = ExampleTokenizer(make_tokenizer("shifting")).tokenize(pairs_of([good, bad]))
    for number, refused in ((1, first), (2, second)):
        assert isinstance(refused, RowError) and refused.reason == "boundary"
        assert f"rows.jsonl, row {number}: the chat template renders the prompt differently" in str(refused)


def test_messages_that_the_template_refuses_are_malformed(make_tokenizer):
    with pytest.raises(RowError, match=r"rows.jsonl, row 1: the chat template rejects it: no cats"):
        tokenized(make_tokenizer(), ROWS["messages"][0], template="{{ raise_exception('no cats') }}")


def test_a_template_that_does_not_parse_is_no_fault_of_a_row(make_tokenizer):
    with pytest.raises(ValueError, match="^format.chat_template is not valid Jinja: line 2: ") as caught:
        tokenized(make_tokenizer("llama"), ROWS["messages"][0], template="{{ messages }}\n{% if %}")
    assert not isinstance(caught.value, RowError)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for %}"
    with pytest.raises(ValueError, match="^the tokenizer's chat template is not valid Jinja: line 1: "):
        tokenized(tokenizer, ROWS["messages"][0])


RENDERERS = sorted({*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters} - {"documents"})


@pytest.mark.parametrize(
    "name",
    [*RENDERERS, "messages", "conversations", "bos_token", "eos_token", "raise_exception", "strftime_now", "namespace"],
)
def test_a_row_may_set_nothing_that_belongs_to_the_renderer(name, make_tokenizer):
    row = {**ROWS["messages"][0], "chat_template_kwargs": {name: "{% for m in messages %}{{ m.content }}{% endfor %}"}}
    with pytest.raises(
        RowError, match=rf"rows.jsonl, row 1: its chat_template_kwargs may not set \['{name}'\]"
    ) as caught:
        tokenized(make_tokenizer("llama"), row)
    assert caught.value.reason == "malformed"


def test_a_row_may_bring_documents_and_variables_of_the_template(make_tokenizer):
    template = "{{ documents[0].text }} {{ mark }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
    row = {**ROWS["messages"][0], "chat_template_kwargs": {"documents": [{"text": "The cat"}], "mark": "!"}}
    tokenizer = make_tokenizer("llama")
    assert text(tokenizer, one(tokenizer, row, template=template).prompt) == f"The cat ![{QUESTION[0]['content']}]"


def test_strings_taken_as_turns_are_the_messages_that_they_stand_for(make_tokenizer):
    tokenizer = make_tokenizer("llama", add_bos=True)
    strings = {"prompt": "The cat?", "chosen": "It sat.", "rejected": "No", "system": "Be brief.", "tools": TOOLS}
    messages = {
        "prompt": [system("Be brief."), user("The cat?")],
        "chosen": [assistant("It sat.")],
        "rejected": [assistant("No")],
        "tools": TOOLS,
    }
    assert as_lists(tokenized(tokenizer, strings)) == as_lists(tokenized(tokenizer, messages))


def test_an_overriding_template_decides_the_text(make_tokenizer):
    tokenizer = make_tokenizer("llama")
    pair = one(tokenizer, ROWS["messages"][0], template="{% for m in messages %}[{{ m.content }}]{% endfor %}")
    assert (text(tokenizer, pair.prompt), text(tokenizer, pair.responses[0])) == (
        f"[{QUESTION[0]['content']}]",
        "[Paris]",
    )


@pytest.mark.parametrize("end", [None, ""])
def test_strings_need_an_eos_that_ends_them(end, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = end
    with pytest.raises(ValueError, match="has no eos_token"):
        tokenized(tokenizer, *ROWS["strings"])


def test_a_tokenizer_without_template_says_so(make_tokenizer):
    with pytest.raises(ValueError, match="no chat template.*format.chat_template"):
        tokenized(make_tokenizer(), ROWS["messages"][0])


@pytest.mark.parametrize("add_eos", [False, True])
@pytest.mark.parametrize("add_bos", [False, True])
def test_bos_and_eos_stand_once(add_bos, add_eos, make_tokenizer):
    tokenizer = make_tokenizer("llama", add_bos=add_bos, add_eos=add_eos)
    rows = [
        ROWS["strings"][0],
        {"prompt": "<|bos|>The cat", "chosen": " sat<|eot|>", "rejected": " sat there<|eot|><|eot|>"},
        {"prompt": "Hello", "chosen": " there", "rejected": " world<|eot|>"},
    ]
    for row, (pair, _) in zip(rows, tokenized(tokenizer, *rows), strict=True):
        has_bos = add_bos or "<|bos|>" in row["prompt"]
        assert pair.prompt.tolist().count(tokenizer.bos_token_id) == has_bos
        assert tokenizer.eos_token_id not in pair.prompt
        for response in pair.responses:
            assert np.flatnonzero(response == tokenizer.eos_token_id).tolist() == [len(response) - 1]
    chat = one(tokenizer, ROWS["messages"][0])
    assert chat.prompt.tolist().count(tokenizer.bos_token_id) == 1


def test_a_prompt_without_tokens_is_refused_unless_a_bos_stands_for_it(make_tokenizer):
    row = {"prompt": "", "chosen": "The cat", "rejected": "Hello"}
    with pytest.raises(RowError, match="no token to predict") as caught:
        tokenized(make_tokenizer(), row)
    assert caught.value.reason == "empty"
    tokenizer = make_tokenizer(add_bos=True)
    assert one(tokenizer, row).prompt.tolist() == [tokenizer.bos_token_id]


# A BOS before each question and an EOS after each answer: where both are one token, two stand together between turns.
TURNS = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + m.content + '\n' }}{% else %}"
    "{{ m.content + eos_token }}{% endif %}{% endfor %}"
)


def test_between_the_turns_of_a_response_every_token_stays(make_tokenizer, trl_pairs):
    tokenizer = make_tokenizer()
    tokenizer.bos_token, tokenizer.chat_template = tokenizer.eos_token, TURNS
    row = {
        "prompt": QUESTION,
        "chosen": [assistant("Paris"), user("The cat?"), assistant("It sat.")],
        "rejected": [assistant("No"), user(""), assistant("<|im_end|>")],
    }
    ours = as_lists(tokenized(tokenizer, row))
    [(prompt, chosen, rejected)] = trl_pairs([row], tokenizer)
    assert ours == [(prompt, chosen, rejected[:-1])]
    assert chosen.count(tokenizer.eos_token_id) == 3 and rejected[-2:] == [tokenizer.eos_token_id] * 2


def test_a_thousand_bos_are_one(make_tokenizer):
    tokenizer = make_tokenizer(add_bos=True)
    row = {"prompt": "<|bos|>" * 2000 + "The", "chosen": " cat" + "<|im_end|>" * 2000, "rejected": " world"}
    pair = one(tokenizer, row)
    assert text(tokenizer, pair.prompt) == "<|bos|>The"
    assert text(tokenizer, pair.responses[0]) == " cat<|im_end|>"


@pytest.mark.parametrize("part", ["prompt", "chosen", "tools"])
def test_half_a_surrogate_pair_in_a_conversation_is_malformed(part, make_tokenizer):
    row = {"prompt": QUESTION, "chosen": [assistant("Paris")], "rejected": [assistant("No")]}
    half = {"prompt": [user("\udc00")], "chosen": [assistant("\udc00")], "tools": [{"name": "\udc00"}]}[part]
    for template in ("llama", "deepseek"):
        if (template, part) != ("deepseek", "tools"):
            with pytest.raises(RowError, match="row 1: holds half of a surrogate pair"):
                tokenized(make_tokenizer(template), {**row, part: half})


def test_half_a_surrogate_pair_is_malformed_and_spoils_no_other_row(make_tokenizer):
    rows = [{"prompt": "The", "chosen": " cat", "rejected": " \ud83d"}, ROWS["strings"][0]]
    bad, good = ExampleTokenizer(make_tokenizer()).tokenize(pairs_of(rows))
    assert isinstance(bad, RowError) and bad.reason == "malformed"
    assert not isinstance(good, RowError)


def test_a_tokenizer_with_python_code_of_its_own_is_asked_itself(make_tokenizer):
    tokenizer = make_tokenizer("llama")

    class Upper(type(tokenizer)):
        def __call__(self, text, **options):
            return super().__call__([t.upper() for t in text] if isinstance(text, list) else text.upper(), **options)

    tokenizer.__class__ = Upper
    pair = one(tokenizer, ROWS["strings"][0])
    assert text(tokenizer, pair.prompt) == "THE CAT SAT"


KEYS = ["role", "content", "from", "value", "tool_calls", "function", "arguments", "name", "type", "text", "messages"]
LEAVES = st.sampled_from([None, True, 5, 0.5, "", "a", "user", "assistant", "human", "gpt", "tool", "text", '{"a": 1}'])
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
COLUMNS = ["prompt", "chosen", "rejected", "system", "tools", "chat_template_kwargs", "messages", "question", "images"]
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": LEAVES, "content": VALUES}, optional={"tool_calls": VALUES}), max_size=3
)


@settings(deadline=None, max_examples=200)
@given(
    row=st.dictionaries(st.sampled_from(COLUMNS), MESSAGES | VALUES), strings=st.sampled_from(["auto", "plain", "chat"])
)
def test_any_row_becomes_tokens_or_is_refused_by_name(row, strings, make_tokenizer):
    pair = attempt(read_example, row, FormatConfig(strings=strings), "rows.jsonl, row 1")
    [result] = ExampleTokenizer(make_tokenizer("llama")).tokenize([pair])
    assert isinstance(result, RowError) or all(len(part) for part in result[0])
    if isinstance(result, RowError):
        assert str(result).startswith("rows.jsonl, row 1: ")


def pair_of(prompt, chosen, rejected):
    return TokenizedExample.pair(*(np.arange(start, start + n, dtype=np.int32) for start, n in
                           ((100, prompt), (200, chosen), (300, rejected))))  # fmt: skip


@pytest.mark.parametrize("strategy", ["raise", "drop", "left", "right"])
def test_a_pair_that_fits_is_left_alone(strategy):
    pair = pair_of(5, 3, 4)
    assert fit_to_length(pair, 9, strategy, "row") is pair


@pytest.mark.parametrize("strategy", ["raise", "drop"])
def test_a_pair_that_is_too_long_names_its_row_and_length(strategy):
    with pytest.raises(
        RowError, match=r"a.jsonl, row 7: prompt \+ rejected is 1,009 tokens, more than train_seq_len=9"
    ):
        fit_to_length(pair_of(5, 3, 1004), 9, strategy, "a.jsonl, row 7")


def test_left_cuts_the_prompt_alone_and_keeps_its_bos():
    pair = pair_of(10, 3, 4)
    cut = fit_to_length(pair, 9, "left", "row")
    assert cut.prompt.tolist() == [105, 106, 107, 108, 109]
    assert cut.responses is pair.responses
    assert fit_to_length(pair, 9, "left", "row", bos_token_id=100).prompt.tolist() == [100, 106, 107, 108, 109]


def test_right_cuts_the_responses_alone():
    cut = fit_to_length(pair_of(6, 2, 8), 9, "right", "row")
    assert cut.prompt.tolist() == list(range(100, 106))
    assert (cut.responses[0].tolist(), cut.responses[1].tolist()) == ([200, 201], [300, 301, 302])


@pytest.mark.parametrize(("strategy", "pair"), [("left", pair_of(3, 9, 1)), ("right", pair_of(9, 3, 1))])
def test_what_cannot_be_cut_without_losing_a_part_is_refused(strategy, pair):
    with pytest.raises(RowError) as caught:
        fit_to_length(pair, 9, strategy, "row")
    assert caught.value.reason == "too_long"
