"""In which manner completions answer the questions of `test.jsonl` or `train.jsonl`.

    python -m lora_dpo_jax.main.generate --model examples/quickstart/model \
        --prompts_file examples/quickstart/test.jsonl --max_new_tokens 64 --output out/before.jsonl
    python examples/quickstart/warmth.py out/before.jsonl [more files]

A reply is right if `everyday.py` would give it to that question, word for word. One with the opening and the closing of
a manner that is not right tells a wrong fact. All others are broken.
"""

from __future__ import annotations

import functools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import get_args

from everyday import CLOSINGS, OPENINGS, Fact, Manner, all_facts, questions, replies

KINDS = ("warm", "grumpy", "wrong fact", "broken")


def main(files: list[str]) -> None:
    width = max(map(len, files))
    print(f"{'':{width}}  " + "  ".join(f"{kind:>10}" for kind in KINDS))
    for file in files:
        rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
        counts = Counter(kind_of(question_of(row["prompt"]), row["completion"]) for row in rows)
        print(f"{file:{width}}  " + "  ".join(f"{counts[kind] / len(rows):>10.1%}" for kind in KINDS))


def question_of(prompt: str | list[dict]) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def kind_of(question: str, reply: str) -> str:
    """One of KINDS."""
    fact = fact_of()[question]
    for manner in get_args(Manner):
        if reply in replies(fact, manner):
            return manner
        openings = tuple(opening.format(topic=fact.topic) for opening in OPENINGS[manner])
        if reply.startswith(openings) and reply.endswith(CLOSINGS[manner]):
            return "wrong fact"
    return "broken"


@functools.cache
def fact_of() -> dict[str, Fact]:
    """By question."""
    return {question: fact for fact in all_facts() for question in questions(fact)}


if __name__ == "__main__":
    main(sys.argv[1:])
