"""Two systems compared: each prompt is judged in both orders, and what comes out is counted."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lora_dpo_jax.judging.interface import Judge, Question, Usage, Verdict
from lora_dpo_jax.judging.rates import Rates, rates_of
from lora_dpo_jax.judging.verdict_file import VerdictFile, judged
from lora_dpo_jax.runs.prompts import Prompt


@dataclass(frozen=True)
class Comparison:
    """The rates of candidate against baseline, and what they took."""

    prompts: int
    identical: int  # prompts with the same answer of both, which are ties and are not asked
    rates: Rates
    candidate_characters: float  # mean length of an answer
    baseline_characters: float
    asked: int  # verdicts that the judge gave now
    from_file: int  # verdicts that were known
    usage: Usage  # of all verdicts, those that were known included
    usage_now: Usage  # of the verdicts that the judge gave now
    seconds: float  # of judging, now

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


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
    verdicts: list[Verdict] = [Verdict(None)] * len(questions)
    asked, usage_now = 0, Usage()
    for index, verdict, is_new in progress(judged(judge, questions, file), len(questions)):
        verdicts[index] = verdict
        asked += is_new
        usage_now += verdict.usage if is_new else Usage()
    both: list[Any] = [("tie", "tie")] * len(prompts)
    for place, number in enumerate(differ):
        both[number] = verdicts[2 * place].preferred, verdicts[2 * place + 1].preferred
    lengths = [(len(one), len(other)) for one, other in zip(candidate, baseline, strict=True)]
    is_asked = [candidate[number] != baseline[number] for number in range(len(prompts))]
    return Comparison(
        prompts=len(prompts),
        identical=len(prompts) - len(differ),
        rates=rates_of(both, lengths, seed=seed, asked=is_asked),
        candidate_characters=sum(map(len, candidate)) / len(prompts),
        baseline_characters=sum(map(len, baseline)) / len(prompts),
        asked=asked,
        from_file=len(questions) - asked,
        usage=sum((verdict.usage for verdict in verdicts), Usage()),
        usage_now=usage_now,
        seconds=time.perf_counter() - began,
    )
