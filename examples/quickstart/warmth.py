"""In which manner completions answer the questions of `test.jsonl` or `train.jsonl`.

    python -m lora_dpo_jax.main.generate --model examples/quickstart/model \
        --prompts_file examples/quickstart/test.jsonl --max_new_tokens 64 --output out/before.jsonl
    python examples/quickstart/warmth.py out/before.jsonl [more files]

A reply is right if `everyday.py` would give it to that question, word for word. One with the opening and the closing of
a manner that is not right tells a wrong fact. All others are broken.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import get_args

from everyday import CLOSINGS, GREETINGS, OPENINGS, PHRASES, Fact, Manner, _lower_first, _upper_first, all_facts

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
    fact = facts_by_question()[question]
    for manner in get_args(Manner):
        openings = [opening.format(topic=fact.topic) for opening in OPENINGS[manner]]
        phrases = [phrase.format(answer=answer) for phrase in PHRASES[manner] for answer in fact.answers]
        right = itertools.product(openings, map(_upper_first, phrases), CLOSINGS[manner])
        if reply in map(" ".join, right):
            return manner
        if reply.startswith(tuple(openings)) and reply.endswith(CLOSINGS[manner]):
            return "wrong fact"
    return "broken"


@functools.cache
def facts_by_question() -> dict[str, Fact]:
    """Each way in which `everyday.ask` may ask about each fact."""
    found = {}
    for fact in all_facts():
        for question in fact.questions:
            found[question] = fact
            for greeting in GREETINGS:
                found[f"{greeting} {_lower_first(question) if greeting.endswith(',') else question}"] = fact
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
