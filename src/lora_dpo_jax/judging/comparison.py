"""Two systems compared: each prompt is judged in both orders, and what comes out is counted."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lora_dpo_jax.judging.interface import Judge, Question, Usage, Verdict
from lora_dpo_jax.judging.rates import Outcome, Rates, outcome, rates_of
from lora_dpo_jax.judging.verdict_file import VerdictFile, judged
from lora_dpo_jax.runs.prompts import Prompt

SAME_ANSWER = Verdict("tie", "the answers are the same")


@dataclass(frozen=True)
class Result:
    """What came out for one prompt."""

    prompt: str
    candidate: str
    baseline: str
    outcome: Outcome
    reasons: tuple[str, str]  # with the candidate's answer as A, then as B


@dataclass(frozen=True)
class Comparison:
    """The rates of candidate against baseline, and what they took."""

    results: list[Result]  # of each prompt
    identical: int  # prompts with the same answer of both, which are ties and are not asked
    rates: Rates
    asked: int  # verdicts that the judge gave now
    from_file: int  # verdicts that were known
    usage: Usage  # of all verdicts, those that were known included
    usage_now: Usage  # of the verdicts that the judge gave now
    seconds: float  # of judging, now

    @property
    def mean_characters(self) -> dict[str, float]:
        """The mean length of the answers of both systems."""
        answers = {
            "candidate": [result.candidate for result in self.results],
            "baseline": [result.baseline for result in self.results],
        }
        return {name: sum(map(len, texts)) / len(texts) for name, texts in answers.items()}

    def as_json(self) -> dict[str, Any]:
        """All but the results, as plain values."""
        found = {name: value for name, value in asdict(self).items() if name not in ("results", "rates")}
        return {"prompts": len(self.results), "mean_characters": self.mean_characters, **asdict(self.rates), **found}


def compare(
    judge: Judge,
    prompts: Sequence[Prompt],
    candidate: Sequence[str],
    baseline: Sequence[str],
    file: VerdictFile,
    *,
    seed: int,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda verdicts, total: verdicts,
) -> Comparison:
    """Asks for each prompt which answer is better, in both orders, unless `file` has the verdicts.

    `seed` draws the samples of the intervals. `progress` wraps the verdicts as they come, of which there are `total`.
    """
    began = time.perf_counter()
    differ = [number for number in range(len(prompts)) if candidate[number] != baseline[number]]
    forward = [Question(prompts[number], candidate[number], baseline[number]) for number in differ]
    questions = [question for pair in forward for question in (pair, pair.swapped)]
    asked: dict[int, Verdict] = {}
    usage_now, new = Usage(), 0
    for index, verdict, is_new in progress(judged(judge, questions, file), len(questions)):
        asked[index] = verdict
        if is_new:
            usage_now, new = usage_now + verdict.usage, new + 1
    both = [(SAME_ANSWER, SAME_ANSWER)] * len(prompts)
    for place, number in enumerate(differ):
        both[number] = asked[2 * place], asked[2 * place + 1]
    rates = rates_of(
        [(one.preferred, other.preferred) for one, other in both],
        [(len(one), len(other)) for one, other in zip(candidate, baseline, strict=True)],
        seed=seed,
    )
    return Comparison(
        results=[
            Result(prompt.readable, mine, theirs, outcome(one.preferred, other.preferred), (one.reason, other.reason))
            for prompt, mine, theirs, (one, other) in zip(prompts, candidate, baseline, both, strict=True)
        ],
        identical=len(prompts) - len(differ),
        rates=rates,
        asked=new,
        from_file=len(questions) - new,
        usage=sum((verdict.usage for verdict in asked.values()), Usage()),
        usage_now=usage_now,
        seconds=time.perf_counter() - began,
    )
