"""What judges are asked and what they answer."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lora_dpo_jax.runs.prompts import Prompt

Preferred = Literal["first", "second", "tie"]


@dataclass(frozen=True)
class Question:
    """Which of two answers to a prompt is better? The order matters: judges may prefer a place."""

    prompt: Prompt
    first: str
    second: str

    @property
    def swapped(self) -> "Question":
        return Question(self.prompt, self.second, self.first)


@dataclass(frozen=True)
class Usage:
    """Tokens that a judge has read and written. Requests that are sent again count again."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(self.prompt_tokens + other.prompt_tokens, self.completion_tokens + other.completion_tokens)


@dataclass(frozen=True)
class Verdict:
    """A judge's answer to one question."""

    preferred: Preferred | None  # None: the judge's reply names none of these
    reason: str = ""  # in the judge's words, or its numbers
    usage: Usage = Usage()


class Judge(ABC):
    """Compares two answers. The result depends on `identity` and on the question alone."""

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """Everything, but the question, that decides a verdict: plain values without secrets."""

    @abstractmethod
    def verdicts(self, questions: Sequence[Question]) -> Iterator[tuple[int, Verdict]]:
        """(index of the question, verdict) of each question as soon as it is known, in any order.

        Raises ConnectionError or ValueError if no more verdicts can come. Those that were yielded hold.
        """
