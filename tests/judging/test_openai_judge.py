"""The judge behind a server, against one that errs, stalls, limits and answers nonsense."""

import time

import pytest
from judge_servers import JudgeServer, Reply, judge_of, judge_server, longer, questions

from lora_dpo_jax.judging.interface import RunModels, Usage, Verdict
from lora_dpo_jax.judging.openai_judge import OpenAIJudgeConfig
from lora_dpo_jax.redaction import HIDDEN

KEY = "sk-proj-0123456789abcdefghij"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    # The client's pauses between tries begin with half a second.
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


def verdicts_of(server: JudgeServer, count: int = 1, **settings) -> list[Verdict]:
    found = dict(judge_of(server, **settings).verdicts(questions(count)))
    return [found[index] for index in range(count)]


def test_each_question_is_asked_once_with_its_key_and_settings():
    with judge_server(longer) as server:
        found = verdicts_of(server, 5, parameters={"reasoning_effort": "low", "max_tokens": None})
    assert found == [Verdict("second", "It says more.\nVerdict: B", Usage(10, 3))] * 5
    assert sorted(server.asked) == sorted(f"Why {n}?|{'a' * (n + 1)}|{'b' * (2 * n + 3)}" for n in range(5))
    sent = {name: value for name, value in server.requests[0].items() if name != "messages"}
    assert sent == {"model": "m", "temperature": 0.0, "reasoning_effort": "low"}
    assert set(server.keys) == {f"Bearer {KEY}"}


def test_no_more_requests_run_at_once_than_are_allowed():
    def reply(text: str, number: int) -> Reply:
        return Reply(seconds=0.03)

    with judge_server(reply) as server:
        verdicts_of(server, 9, concurrency=3)
    assert server.most_active == 3


def test_verdicts_come_as_they_arrive_not_in_order():
    def reply(text: str, number: int) -> Reply:
        return Reply(seconds=0.5 if "Why 0?" in text else 0.0)

    with judge_server(reply) as server:
        arrived = [index for index, _ in judge_of(server, concurrency=2).verdicts(questions(4))]
    assert arrived[-1] == 0 and sorted(arrived) == [0, 1, 2, 3]


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_a_request_that_fails_is_sent_again(status):
    def reply(text: str, number: int) -> Reply:
        return Reply(status=status) if number < 2 else Reply("Verdict: A")

    with judge_server(reply) as server:
        assert [verdict.preferred for verdict in verdicts_of(server)] == ["first"]
    assert len(server.asked) == 3


def test_the_pause_is_the_one_that_the_server_asks_for():
    def reply(text: str, number: int) -> Reply:
        return Reply(status=429, headers={"retry-after-ms": "300"}) if number == 0 else Reply("Verdict: A")

    with judge_server(reply) as server:
        verdicts_of(server)
    # The client's own pause would be 10 ms.
    assert 0.3 <= server.times[1] - server.times[0] < 2


def test_a_request_that_stalls_is_sent_again():
    def reply(text: str, number: int) -> Reply:
        return Reply("Verdict: A", seconds=1.0 if number == 0 else 0.0)

    with judge_server(reply) as server:
        began = time.monotonic()
        assert [verdict.preferred for verdict in verdicts_of(server, timeout=0.2)] == ["first"]
    assert len(server.asked) == 2 and time.monotonic() - began < 5


def test_a_reply_without_a_verdict_is_asked_for_once_more_and_then_counted():
    def reply(text: str, number: int) -> Reply:
        if "Why 0?" in text:
            return Reply("Who knows?")
        return Reply("Hm." if number == 0 else "Verdict: B")

    with judge_server(reply) as server:
        found = verdicts_of(server, 2)
    assert found == [Verdict(None, "Who knows?", Usage(20, 6)), Verdict("second", "Verdict: B", Usage(20, 6))]
    assert len(server.asked) == 4


ERRORS = {
    "key": (Reply(status=401, message=f"Incorrect API key provided: {KEY[:8]}***{KEY[-4:]}"),
            r"judge.api_key_env=OPENAI_API_KEY: the server at http.*/v1/ rejects the key in this .* \(401\)$"),
    "model": (Reply(status=404, message="The model `m` does not exist"),
              r"judge.model='m': the server at http.* does not know it, .*\(404: The model `m` does not exist\)$"),
    "request": (Reply(status=400, message=f"temperature is not taken,\nkey {KEY}"),
                r"judge.base_url=http.*, judge.model='m': .*\(400: temperature is not taken, key \*\*\*\)$"),
    "limit": (Reply(status=429, message="quota"), r"judge.base_url=.*: the server answers 429, after 2 tries \(quota"),
    "fault": (Reply(status=500, message="x" * 999), r"answers 500, after 2 tries \(xxx.{297}\.\.\.\)$"),
    "stall": (Reply(seconds=0.6), r"judge.base_url=.*: no reply within judge.timeout=0.1 s, after 2 tries$"),
    "page": (Reply(body=b"<html>", headers={"content-type": "text/html"}), "but not with a chat completion"),
    "json": (Reply(body=b"{"), "but not with a chat completion"),
    "shape": (Reply(body=b'{"choices": []}'), "but not with a chat completion"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_one_line_that_names_the_setting_and_never_the_key(name):
    reply, says = ERRORS[name]
    with judge_server(lambda text, number: reply) as server:
        with pytest.raises((OSError, ValueError), match=says) as raised:
            verdicts_of(server, max_retries=1, timeout=0.1 if name == "stall" else 5.0)
    text = str(raised.value)
    assert KEY not in text and KEY[-4:] not in text and "\n" not in text


def test_a_server_that_is_not_there_is_an_error():
    with judge_server(longer) as server:
        judge = judge_of(server, max_retries=0)
    with pytest.raises(OSError, match=r"judge.base_url=http://127.0.0.1:\d+/v1/: cannot be reached, after 1 try"):
        list(judge.verdicts(questions(1)))


def test_after_an_error_no_new_request_is_sent_but_answers_on_their_way_count():
    def reply(text: str, number: int) -> Reply:
        return Reply(status=400, seconds=0.2) if "Why 0?" in text else Reply(seconds=0.3)

    arrived = []
    with judge_server(reply) as server:
        with pytest.raises(ValueError, match="rejects the request"):
            for index, _ in judge_of(server, concurrency=3).verdicts(questions(20)):
                arrived.append(index)
    assert sorted(arrived) == [1, 2] and len(server.asked) == 3


def test_a_question_that_the_server_declines_is_counted_and_the_others_are_asked():
    body = b'{"error": {"message": "filtered", "code": "content_filter"}}'

    def reply(text: str, number: int) -> Reply:
        return Reply(status=400, body=body) if "Why 0?" in text else Reply("Verdict: A")

    with judge_server(reply) as server:
        found = verdicts_of(server, 2)
    assert found[0] == Verdict(None, "the server declined to answer: filtered") and found[1].preferred == "first"


def test_a_key_in_a_reply_is_hidden():
    with judge_server(lambda text, number: Reply(f"You sent {KEY}. Verdict: A")) as server:
        assert verdicts_of(server)[0].reason == f"You sent {HIDDEN}. Verdict: A"
        assert KEY not in str(judge_of(server, base_url=server.url.replace("//", f"//user:{KEY}@")).identity)


def test_the_identity_holds_what_decides_a_verdict_and_nothing_else():
    with judge_server(longer) as server:
        first = judge_of(server).identity
        assert judge_of(server, concurrency=1, timeout=1.0, max_retries=0, prompt_price=1.0, completion_price=1.0
                        ).identity == first  # fmt: skip
        for other in ({"model": "n"}, {"temperature": 1.0}, {"max_tokens": 9}, {"parameters": {"seed": 1}}):
            assert judge_of(server, **other).identity != first


def test_tokens_cost_their_price():
    config = OpenAIJudgeConfig(model="m", prompt_price=2.0, completion_price=8.0)
    assert config.cost(Usage(500_000, 250_000)) == pytest.approx(3.0)
    assert OpenAIJudgeConfig(model="m").cost(Usage(1, 1)) is None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"api_key_env": KEY}, "^api_key_env must be the name of an environment variable"),
        ({"base_url": "localhost:8000"}, "base_url='localhost:8000' must begin with http"),
        ({"concurrency": 0}, "concurrency=0 must be positive"),
        ({"timeout": 0.0}, "timeout=0.0 must be positive"),
        ({"max_retries": -1}, "max_retries=-1 must be 0 or"),
        ({"prompt_price": 1.0}, "prompt_price and completion_price belong together"),
        ({"parameters": {"messages": []}}, r"parameters may not set \['messages'\]"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings, says):
    with pytest.raises(ValueError, match=says) as raised:
        OpenAIJudgeConfig(**{"model": "m", **settings})
    assert KEY not in str(raised.value)


def test_what_is_missing_is_told_before_the_work(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="judge.api_key_env=OPENAI_API_KEY: this environment variable is not set"):
        OpenAIJudgeConfig(model="m").check(RunModels())
    OpenAIJudgeConfig(model="m", base_url="http://127.0.0.1:1/v1").check(RunModels())  # which may need none
    with pytest.raises(FileNotFoundError, match="judge.template='gone.txt'"):
        OpenAIJudgeConfig(model="m", base_url="http://x", template="gone.txt").check(RunModels())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"judge.type=openai needs .*pip install 'lora_dpo_jax\[judge\]'"):
        OpenAIJudgeConfig(model="m").check(RunModels())
