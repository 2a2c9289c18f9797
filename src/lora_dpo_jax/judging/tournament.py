"""A judge's round robin: each two completions of a prompt are compared in both orders."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lora_dpo_jax.judging.interface import Judge, Question, Usage
from lora_dpo_jax.judging.pairing import Outcome, outcome_of, round_robin
from lora_dpo_jax.judging.verdict_file import VerdictFile, judged
from lora_dpo_jax.runs.prompts import Prompt


@dataclass(frozen=True)
class Tournament:
    """What came out of it."""

    outcomes: list[dict[tuple[int, int], Outcome]]  # of each prompt, by the numbers of two of its completions
    asked: int  # questions that the judge answered now
    known: int  # questions whose verdict was in the file
    usage: Usage  # of the verdicts that the judge gave now


def number_of_questions(completions: Sequence[Sequence[str]]) -> int:
    """How many verdicts the completions of some prompts need: n * (n - 1) for n of one prompt."""
    return sum(2 * len(round_robin(len(of_prompt))) for of_prompt in completions)


def play(
    judge: Judge,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[str]],
    file: VerdictFile,
    *,
    progress: Callable[[Iterable, int], Iterable] = lambda verdicts, total: verdicts,
) -> Tournament:
    """Compares the completions of each prompt. Verdicts that are in `file` are not asked for again.

    `progress` wraps the verdicts as they come, of which there are `total`.
    """
    places = [(number, games) for number, of_prompt in enumerate(completions) for games in round_robin(len(of_prompt))]
    questions = []
    for number, (first, second) in places:
        question = Question(prompts[number], completions[number][first], completions[number][second])
        questions += [question, question.swapped]
    preferred: list[str | None] = [None] * len(questions)
    asked, usage = 0, Usage()
    for index, verdict, is_new in progress(judged(judge, questions, file), len(questions)):
        preferred[index] = verdict.preferred
        if is_new:
            asked, usage = asked + 1, usage + verdict.usage
    outcomes: list[dict[tuple[int, int], Outcome]] = [{} for _ in completions]
    for place, (number, game) in enumerate(places):
        outcomes[number][game] = outcome_of(preferred[2 * place], preferred[2 * place + 1])
    return Tournament(outcomes, asked, len(questions) - asked, usage)
