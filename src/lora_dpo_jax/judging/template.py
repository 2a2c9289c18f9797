"""The text that asks a language model which answer is better, and how its reply is read."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lora_dpo_jax.judging.interface import Preferred, Question
from lora_dpo_jax.places import spelled_alike

FIELDS = ("prompt", "first", "second")

_TASK = """Two assistants, A and B, answered the same request. Which answer serves the person who asked better? Weigh \
whether it is right, whether it does what was asked, and whether it is clear and kind. Neither the order of the \
answers nor their length is a reason.

[Request]
{prompt}

[Answer of A]
{first}

[Answer of B]
{second}

"""
# For judges that write a reply.
REASONING = (
    _TASK
    + "Give your reason in one or two sentences. Then write the verdict on a line of its own, exactly in this form: "
    "Verdict: A, Verdict: B or Verdict: tie.\n"
)
# For judges whose first token is the verdict.
LETTER_ALONE = _TASK + "Reply with the letter of the better answer alone: A or B.\n"

_VERDICTS: dict[str, Preferred] = {"a": "first", "b": "second", "tie": "tie"}
# Of "**Verdict:** A", "Verdict: [[B]]", "verdict - tie" and the like.
_STATED = re.compile(r"verdict[\s*_:\"'\-=>]{1,20}[(\[{*_\"'`]{0,4}(a|b|tie)(?![\w'])", re.IGNORECASE)
# Standing alone in the last line.
_ALONE = re.compile(r"(?<![\w'])(A|B|[Tt]ie|TIE)(?![\w'])")
_MAY_BE_ARTICLE = re.compile(r"(?<![\w'])A\s+[a-z]")  # as in "A good answer"


@dataclass(frozen=True)
class Template:
    """A text with the fields {prompt}, {first} and {second}, or a Jinja template with these variables."""

    text: str

    @classmethod
    def read(cls, setting: str, path: str | None, default: str) -> "Template":
        """The text of a file, or the default. Raises FileNotFoundError or ValueError that names the setting."""
        if path is None:
            return cls(default)
        place = os.path.expanduser(path)
        if not os.path.isfile(place):
            raise FileNotFoundError(f"{setting}={path!r} is not a file{spelled_alike(place)}")
        try:
            template = cls(Path(place).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{setting}={path!r} cannot be read as UTF-8 text: {error}") from error
        template._check(f"{setting}={path!r}")
        return template

    @property
    def is_jinja(self) -> bool:
        return "{{" in self.text or "{%" in self.text

    def render(self, question: Question) -> str:
        """The text for one question. Raises ValueError if the template cannot render it."""
        values = {"prompt": question.prompt.readable, "first": question.first, "second": question.second}
        if not self.is_jinja:
            # In one pass, so that fields in an answer stay as they are. Other braces are text.
            return re.sub(r"\{(prompt|first|second)\}", lambda found: values[found[1]], self.text)
        messages = question.prompt.content
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        try:
            return _environment().from_string(self.text).render(values, messages=messages)
        except Exception as error:  # a template is a program, and may raise any type
            raise ValueError(f"{question.prompt.origin}: judge.template cannot render the question: {error}") from error

    def _check(self, name: str) -> None:
        try:
            used = self._used()
        except TemplateSyntaxError as error:
            raise ValueError(f"{name} is not valid Jinja: line {error.lineno}: {error.message}") from error
        except TemplateError as error:
            raise ValueError(f"{name} is not valid Jinja: {error}") from error
        # `messages` may stand for the prompt.
        missing = [field for field in FIELDS if field not in used and not (field == "prompt" and "messages" in used)]
        if missing:
            signs = ("{{ ", " }}") if self.is_jinja else ("{", "}")
            fields = " and ".join(field.join(signs) for field in missing)
            raise ValueError(f"{name} lacks {fields}; it must show the prompt and both answers")
        if unknown := sorted(used - {*FIELDS, "messages"}):
            raise ValueError(f"{name} asks for {', '.join(unknown)}; it has {', '.join(FIELDS)} and messages")

    def _used(self) -> set[str]:
        if self.is_jinja:
            return meta.find_undeclared_variables(_environment().parse(self.text))
        return set(re.findall(r"\{(prompt|first|second)\}", self.text))


def read_verdict(reply: str) -> Preferred | None:
    """The verdict that a reply states last; None if it states none.

    That is `Verdict: A`, in any case and with any marks around it. Without it, the last line may name one of A, B and
    tie, and no other. What may be read in two ways is no verdict.
    """
    if stated := _STATED.findall(reply):
        return _VERDICTS[stated[-1].lower()]
    lines = [line for line in reply.splitlines() if line.strip()]
    if not lines or _MAY_BE_ARTICLE.search(lines[-1]):
        return None
    named = {found.lower() for found in _ALONE.findall(lines[-1])}
    return _VERDICTS[named.pop()] if len(named) == 1 else None


def _environment() -> ImmutableSandboxedEnvironment:
    """As transformers renders chat templates: a template may compute, but not reach files or change what it gets."""
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)


def messages_of(text: str) -> list[Mapping[str, Any]]:
    """The text as a conversation."""
    return [{"role": "user", "content": text}]
