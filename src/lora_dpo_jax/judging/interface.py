"""What judges are asked and what they answer."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import draccus

from lora_dpo_jax.files import cache_folder
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
    def verdicts(self, questions: Sequence[Question]) -> Generator[tuple[int, Verdict], None, None]:
        """(index of the question, verdict) of each question as soon as it is known, in any order.

        Raises OSError or ValueError if no more verdicts can come. Those that were yielded hold.
        """


@dataclass(frozen=True)
class RunModels:
    """The models of a run: what the settings of a judge stand for if they are null."""

    base: str | None = None  # initialize_from_hf
    revision: str | None = None  # hf_revision
    adapter: str | None = None  # peft_save_path
    quantization: str = "none"
    beta: float = 0.1  # of the run's loss
    cache: Path = field(default_factory=cache_folder)  # digests of files are kept there


@dataclass(frozen=True)
class JudgeConfig(draccus.ChoiceRegistry, ABC):
    """Who judges."""

    def check(self, run: RunModels) -> None:
        """Raises ImportError, ValueError or OSError if `start` would, as far as it is known without work."""

    @abstractmethod
    def start(self, run: RunModels) -> Judge: ...

    def cost(self, usage: Usage) -> float | None:
        """What the tokens cost; None if it is not known."""
        return None
