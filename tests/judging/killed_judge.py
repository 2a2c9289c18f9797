"""Compares two systems by a server, as a process of its own that a test kills.

python killed_judge.py URL FILE COUNT
"""

import sys
from pathlib import Path

from judge_servers import PARTS, questions

from lora_dpo_jax.judging.comparison import compare
from lora_dpo_jax.judging.openai_judge import OpenAIJudge, OpenAIJudgeConfig
from lora_dpo_jax.judging.verdict_file import VerdictFile


def main(url: str, path: str, count: str) -> None:
    asked = questions(int(count))
    judge = OpenAIJudge(OpenAIJudgeConfig(model="m", base_url=url, concurrency=4), PARTS)
    answers = [question.first for question in asked], [question.second for question in asked]
    with VerdictFile(Path(path)) as file:
        found = compare(judge, [question.prompt for question in asked], *answers, file, seed=0)
    print(found.asked, found.from_file, found.rates.win_rate.value)


if __name__ == "__main__":
    main(*sys.argv[1:])
