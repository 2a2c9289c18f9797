"""The text of a question, and the verdict in a reply."""

import pytest

from lora_dpo_jax.judging.interface import Question
from lora_dpo_jax.judging.template import LETTER_ALONE, REASONING, Template, read_verdict
from lora_dpo_jax.runs.prompts import Prompt

QUESTION = Question(Prompt("Why {first}?", "prompts[0]"), "So {second}.", "Because {{ prompt }}.")
TALK = Prompt([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], "prompts[1]")


def read(tmp_path, text: str) -> Template:
    (tmp_path / "template.txt").write_text(text, encoding="utf-8")
    return Template.read("judge.template", str(tmp_path / "template.txt"), "")


@pytest.mark.parametrize("default", [REASONING, LETTER_ALONE])
def test_the_default_shows_prompt_and_answers_once(default):
    text = Template.read("judge.template", None, default).render(QUESTION)
    assert all(text.count(part) == 1 for part in ("Why {first}?", "So {second}.", "Because {{ prompt }}."))
    assert text.index("So {second}.") < text.index("Because")


def test_fields_are_filled_once_and_other_braces_are_text(tmp_path):
    template = read(tmp_path, 'Reply in {"json": {}}: {prompt} / {first} / {second} {other}')
    expected = 'Reply in {"json": {}}: Why {first}? / So {second}. / Because {{ prompt }}. {other}'
    assert template.render(QUESTION) == expected


def test_a_jinja_template_may_compute_and_read_messages(tmp_path):
    text = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ first | upper }}{{ second }}"
    template = read(tmp_path, text)
    assert template.render(Question(TALK, "a", "b")) == "<system>Be brief.<user>HiAb"
    assert template.render(Question(Prompt("Hi", "p"), "a", "b")) == "<user>HiAb"


def test_messages_are_shown_with_their_roles_but_for_a_single_one_of_the_user():
    template = Template("{prompt}|{first}|{second}")
    assert template.render(Question(TALK, "a", "b")) == "[system] Be brief.\n[user] Hi|a|b"
    assert template.render(Question(Prompt(TALK.content[1:], "p"), "a", "b")) == "Hi|a|b"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{prompt} {first}", r"lacks \{second\}; it must show"),
        ("Which is better?", r"lacks \{prompt\} and \{first\} and \{second\}"),
        ("{{ prompt }} {{ first }}", r"lacks \{\{ second \}\}"),
        ("{{ prompt }} {{ first }} {{ second }} {{ answer }}", "asks for answer; it has prompt, first, second and"),
        ("{{ prompt }} {% if %}", "is not valid Jinja: line 1"),
        ("{{ prompt }}{{ first }}{{ second }}{% include 'x' %}{{ x | nothing }}", "is not valid Jinja"),
    ],
)
def test_a_template_that_cannot_work_is_told_at_once(tmp_path, text, says):
    with pytest.raises(ValueError, match=f"^judge.template='.*template.txt' {says}"):
        read(tmp_path, text)


def test_a_template_reaches_no_files_and_an_error_in_it_names_the_prompt(tmp_path):
    with pytest.raises(FileNotFoundError, match="judge.template='gone.txt' is not a file"):
        Template.read("judge.template", "gone.txt", "")
    hostile = read(tmp_path, "{{ prompt }}{{ first }}{{ second }}{{ prompt.__class__.__mro__ }}")
    with pytest.raises(ValueError, match=r"^prompts\[0\]: judge.template cannot render the question: .*unsafe"):
        hostile.render(QUESTION)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Verdict: A", "first"),
        ("It is clearer.\n\n**Verdict:** B\n", "second"),
        ("Verdict: [[tie]]", "tie"),
        ("verdict - b.", "second"),
        ("Verdict:\n\n`A`", "first"),
        ("At first I thought Verdict: A. But no.\nVerdict: B", "second"),
        ("The final verdict is: TIE", "tie"),
        ("B", "second"),
        (" (A)\n", "first"),
        ("Some reasons.\nThe better answer is B.", "second"),
        ("A good answer is B.", None),
        ("A is the better one", None),
        ("it's a tie", "tie"),
        ("", None),
        ("Both are fine.", None),
        ("A is better than B", None),
        ("Verdict: neither", None),
        ("Verdict: Absolutely", None),
        ("Verdict: A's", None),
        ("A\nI am not sure.", None),
    ],
)
def test_the_last_verdict_of_a_reply_counts(reply, verdict):
    assert read_verdict(reply) == verdict
