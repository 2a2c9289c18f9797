"""Verdicts are kept as they come: whatever stops a comparison, no question that was answered is asked again."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Generator, Sequence
from pathlib import Path

import pytest
from judge_servers import Reply, judge_server, longer, questions

from lora_dpo_jax.judging.comparison import Comparison, compare
from lora_dpo_jax.judging.interface import Judge, Question, Usage, Verdict
from lora_dpo_jax.judging.verdict_file import VerdictFile, judged, key_of
from lora_dpo_jax.runs.prompts import Prompt

TESTS = Path(__file__).parents[1]
IDENTITY = {"type": "counting", "model": "m"}


class CountingJudge(Judge):
    """Prefers the longer answer, in an order of its own, and is stopped after some verdicts."""

    def __init__(self, *, order: random.Random | None = None, verdicts: int = 10**6, identity=IDENTITY):
        self.order, self.left, self.identity_ = order, verdicts, identity
        self.asked: list[Question] = []

    @property
    def identity(self):
        return self.identity_

    def verdicts(self, questions: Sequence[Question]) -> Generator[tuple[int, Verdict], None, None]:
        indices = [*range(len(questions))]
        if self.order is not None:
            self.order.shuffle(indices)
        for index in indices:
            if self.left == 0:
                raise ConnectionError("stopped")
            self.left -= 1
            question = questions[index]
            self.asked.append(question)
            preferred = "first" if len(question.first) > len(question.second) else "second"
            yield index, Verdict(preferred, f"{len(question.first)}", Usage(7, 2))


def compared(judge: Judge, path: Path, count: int = 6) -> Comparison:
    asked = questions(count)
    with VerdictFile(path) as file:
        answers = [question.first for question in asked], [question.second for question in asked]
        return compare(judge, [question.prompt for question in asked], *answers, file, seed=0)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_second_time_nothing_is_asked_and_the_result_is_the_same(tmp_path):
    first, second = CountingJudge(), CountingJudge()
    one, other = compared(first, tmp_path / "v.jsonl"), compared(second, tmp_path / "v.jsonl")
    assert (len(first.asked), len(second.asked)) == (12, 0)
    assert (one.asked, one.from_file, other.asked, other.from_file) == (12, 0, 0, 12)
    assert one.rates == other.rates and one.results == other.results
    assert one.usage == other.usage == one.usage_now == Usage(84, 24) and other.usage_now == Usage()
    assert (one.results[0].outcome, one.results[0].reasons) == ("loss", ("1", "3"))


def test_comparisons_that_are_stopped_at_random_ask_nothing_twice(tmp_path):
    rng, asked, stops = random.Random(0), [], 0
    while True:
        judge = CountingJudge(order=rng, verdicts=rng.randint(0, 7))
        try:
            found = compared(judge, tmp_path / "v.jsonl", 20)
        except ConnectionError:
            stops += 1
            if rng.random() < 0.5:  # the process had begun to write another line
                with (tmp_path / "v.jsonl").open("ab") as file:
                    file.write(b'{"key": "0123456789", "prompt": "W\xc3')
            continue
        finally:
            asked += [(question.first, question.second) for question in judge.asked]
        break
    assert stops > 8 and Counter(Counter(asked).values()) == {1: 40}
    assert found.rates.win_rate.value == 0.0 and found.asked + found.from_file == 40
    assert len({line["key"] for line in lines(tmp_path / "v.jsonl")}) == 40


def test_killed_processes_ask_nothing_again_that_was_written(tmp_path):
    """SIGKILL, which no process can see coming. Requests without a written answer are all that is sent again."""
    path, kills, rng = tmp_path / "v.jsonl", 3, random.Random(1)
    command = [sys.executable, str(TESTS / "judging" / "killed_judge.py")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}

    def reply(text: str, number: int) -> Reply:
        return Reply(longer(text, number).text, seconds=0.02)

    with judge_server(reply) as server:
        command += [server.url, str(path), "30"]
        written: set[str] = set()
        for _ in range(kills):
            before, begun = len(server.asked), time.monotonic()
            with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
                wanted = before + rng.randint(5, 14)
                while len(server.asked) < wanted and time.monotonic() < begun + 60:
                    time.sleep(0.001)
                process.send_signal(signal.SIGKILL)
            assert not set(server.asked[before:]) & written
            known = {f"{line['prompt']}|{line['first']}|{line['second']}" for line in whole_lines(path)}
            assert written <= known
            written = known
        before = len(server.asked)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
        assert not set(server.asked[before:]) & written and len(written) > 5
        asked, from_file, rate = done.stdout.split()
        assert (int(from_file), int(asked), rate) == (len(written), 60 - len(written), "0.0")
        # Four requests may have been on their way at each kill.
        assert 60 <= len(server.asked) <= 60 + 4 * kills
        assert set(Counter(line["key"] for line in lines(path)).values()) == {1} and len(lines(path)) == 60


def whole_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def test_equal_questions_are_asked_once(tmp_path):
    judge, (one, other) = CountingJudge(), questions(2)
    with VerdictFile(tmp_path / "v.jsonl") as file:
        found = sorted(judged(judge, [one, other, one, one.swapped], file), key=lambda x: x[0])
        assert [is_new for _, _, is_new in found] == [True, True, False, True] and found[0][1] == found[2][1]
    assert judge.asked == [one, other, one.swapped]


def test_identical_answers_are_a_tie_and_are_not_asked(tmp_path):
    judge, prompts = CountingJudge(), [Prompt("a", "p"), Prompt("b", "q")]
    with VerdictFile(tmp_path / "v.jsonl") as file:
        found = compare(judge, prompts, ["same", "longer"], ["same", "long"], file, seed=0)
    assert (found.identical, len(judge.asked), found.rates.counts["tie"], found.rates.counts["win"]) == (1, 2, 1, 1)
    assert found.rates.prefers_first.value == 0.5


def test_a_verdict_counts_for_its_judge_prompt_and_order_alone():
    prompt = Prompt("Why?", "p")
    question = Question(prompt, "a", "b")
    others = [
        question.swapped,
        Question(Prompt("Who?", "p"), "a", "b"),
        Question(Prompt("Why?", "p", chat=False), "a", "b"),
        Question(Prompt("Why?", "p", template_kwargs={"tools": []}), "a", "b"),
        Question(prompt, "a", "c"),
    ]
    keys = {key_of(IDENTITY, asked) for asked in [question, *others]} | {key_of({**IDENTITY, "x": 1}, question)}
    assert len(keys) == 7
    assert key_of(IDENTITY, Question(Prompt("Why?", "elsewhere"), "a", "b")) == key_of(IDENTITY, question)


def test_a_half_written_last_line_is_dropped_and_its_question_asked(tmp_path):
    path = tmp_path / "v.jsonl"
    compared(CountingJudge(), path)
    content = path.read_bytes()
    for cut in (1, 5, 40, len(content.splitlines()[-1])):
        path.write_bytes(content[:-cut])
        judge = CountingJudge()
        compared(judge, path)
        assert len(judge.asked) == 1 and sorted(path.read_bytes().splitlines()) == sorted(content.splitlines())
    path.write_bytes(content[:5])  # of the first line
    compared(CountingJudge(), path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"prompt": "x", "completion": "y"}\n', "line 1: is no verdict of this command"),
        (b"my notes\n", "line 1: is no verdict"),
        (b"my notes", "its last line is no verdict"),
        (b'{"key": "a", "preferred": "third", "reason": "", "prompt_tokens": 0, "completion_tokens": 0}\n',
         "line 1: is no verdict of this command .preferred is 'third'"),
    ],
)  # fmt: skip
def test_other_files_are_refused_and_stay(tmp_path, content, says):
    path = tmp_path / "v.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says):
        VerdictFile(path)
    assert path.read_bytes() == content


def test_one_process_at_a_time_writes_a_file(tmp_path):
    with VerdictFile(tmp_path / "v.jsonl"):
        with pytest.raises(OSError, match="is open in another process that judges"):
            VerdictFile(tmp_path / "v.jsonl")
    VerdictFile(tmp_path / "v.jsonl").__exit__()


def test_odd_characters_come_back_as_they_were(tmp_path):
    question = Question(Prompt("\u2028 \x85 \r", "p"), "a\nb", "\ud83d half")
    with VerdictFile(tmp_path / "v.jsonl") as file:
        file.add("k", question, Verdict("tie", "so\u2028so\r\n"))
    with VerdictFile(tmp_path / "v.jsonl") as file:
        assert file.get("k") == Verdict("tie", "so\u2028so\r\n") and len(file) == 1
