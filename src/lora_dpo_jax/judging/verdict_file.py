"""The file of verdicts: one JSON object a line, added as soon as a judge has answered, so that nothing is asked twice.

    {"key": "5f1c...", "prompt": "Why?", "first": "So.", "second": "Because.", "preferred": "second",
     "reason": "...", "prompt_tokens": 210, "completion_tokens": 31}

The key is a hash of everything that decides the verdict: the judge's identity, the prompt and the answers in their
order. A verdict counts for every question with its key, whenever it was given.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

from lora_dpo_jax.judging.appended_lines import AppendedLines
from lora_dpo_jax.judging.interface import Judge, Preferred, Question, Usage, Verdict

MARKS = {*get_args(Preferred), None}
# The keys of a line.
VERDICT = ("key", "prompt", "first", "second", "preferred", "reason", "prompt_tokens", "completion_tokens")


class VerdictFile:
    """Verdicts by key. No other process writes them while this one is open."""

    def __init__(self, path: Path):
        """Raises ValueError if the file holds anything else, and OSError if another process has it open."""
        self.path = path
        self._known: dict[str, Verdict] = {}
        busy = "that judges. Wait until it ends, or choose another output"
        self._file = AppendedLines(path, self._take, busy=busy, foreign=self._not_mine)

    def __enter__(self) -> "VerdictFile":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> Verdict | None:
        return self._known.get(key)

    def add(self, key: str, question: Question, verdict: Verdict) -> None:
        said = verdict.preferred, verdict.reason, verdict.usage.prompt_tokens, verdict.usage.completion_tokens
        values = key, question.prompt.readable, question.first, question.second, *said
        line = json.dumps(dict(zip(VERDICT, values, strict=True)), ensure_ascii=False)
        self._file.append((line + "\n").encode("utf-8", "backslashreplace"))
        self._known[key] = verdict

    def _take(self, number: int, line: bytes) -> None:
        try:
            row = json.loads(line)
            usage = Usage(int(row["prompt_tokens"]), int(row["completion_tokens"]))
            preferred, reason = row["preferred"], str(row["reason"])
            if preferred not in MARKS:
                raise ValueError(f"preferred is {preferred!r}")
            self._known[str(row["key"])] = Verdict(preferred, reason, usage)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{self.path}, line {number}: is no verdict of this command ({error}). Choose another output"
            ) from error

    def _not_mine(self, number: int) -> ValueError:
        del number  # it is the last one
        return ValueError(f"{self.path}: its last line is no verdict of this command. Choose another output")


def key_of(identity: Mapping[str, Any], question: Question) -> str:
    """Hex digest of the judge and the question."""
    prompt = question.prompt
    parts = [identity, prompt.content, prompt.chat, prompt.template_kwargs, question.first, question.second]
    text = json.dumps(parts, sort_keys=True, default=dict)
    return hashlib.sha256(text.encode()).hexdigest()


def judged(judge: Judge, questions: Sequence[Question], file: VerdictFile) -> Iterator[tuple[int, Verdict, bool]]:
    """(index of the question, verdict, whether the judge was asked now), first of those in the file.

    Each verdict is in the file before it is yielded. Equal questions are asked once.
    """
    keys = [key_of(judge.identity, question) for question in questions]
    places: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        if (verdict := file.get(key)) is not None:
            yield index, verdict, False
        else:
            places.setdefault(key, []).append(index)
    new = [(key, questions[indices[0]]) for key, indices in places.items()]
    with closing(judge.verdicts([question for _, question in new])) as verdicts:
        for number, verdict in verdicts:
            key, question = new[number]
            file.add(key, question, verdict)
            for place, index in enumerate(places[key]):
                yield index, verdict, place == 0
