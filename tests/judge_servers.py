"""A server that speaks OpenAI's chat completions as far as a judge needs it, and misbehaves as it is told."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from lora_dpo_jax.judging.interface import Question
from lora_dpo_jax.judging.openai_judge import OpenAIJudge, OpenAIJudgeConfig
from lora_dpo_jax.judging.template import Template
from lora_dpo_jax.runs.prompts import Prompt

# The text of a question, so that a server of the tests can take it apart.
PARTS = Template("{prompt}|{first}|{second}")


@dataclass(frozen=True)
class Reply:
    """What the server sends to one request."""

    text: str = "Verdict: tie"  # of the model
    status: int = 200
    message: str = ""  # of an error
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0  # before it is sent
    body: bytes | None = None  # instead of all that


def longer(question: str, number: int) -> Reply:
    """A judge that prefers the longer answer."""
    _, first, second = question.split("|")
    return Reply(f"It says more.\nVerdict: {'A' if len(first) > len(second) else 'B'}")


class JudgeServer(ThreadingHTTPServer):
    """Answers the n-th request for a text with `reply(text, n)`, n from 0. Remembers what it was asked."""

    daemon_threads = True

    def __init__(self, reply: Callable[[str, int], Reply]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply = reply
        self.asked: list[str] = []  # the texts, in the order of arrival
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.times: list[float] = []
        self.active = self.most_active = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: JudgeServer

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text, server = request["messages"][-1]["content"], self.server
        with server.lock:
            number = server.asked.count(text)
            server.asked.append(text)
            server.requests.append(request)
            server.keys.append(self.headers.get("authorization", ""))
            server.times.append(time.monotonic())
            server.active += 1
            server.most_active = max(server.most_active, server.active)
        try:
            reply = server.reply(text, number)
            time.sleep(reply.seconds)
        finally:
            with server.lock:
                server.active -= 1
        self._send(reply)

    def _send(self, reply: Reply) -> None:
        if reply.status == 200:
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply.text}}
            usage = {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}
            body: Any = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
            body |= {"usage": usage}
        else:
            body = {"error": {"message": reply.message, "type": "error", "code": None}}
        content = json.dumps(body).encode() if reply.body is None else reply.body
        try:
            self.send_response(reply.status)
            for name, value in {"content-type": "application/json", **reply.headers}.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except OSError:  # the other side has given up, or was killed
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def judge_server(reply: Callable[[str, int], Reply]) -> Iterator[JudgeServer]:
    with JudgeServer(reply) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def judge_of(server: JudgeServer, **settings: Any) -> OpenAIJudge:
    """The client of such a server."""
    return OpenAIJudge(OpenAIJudgeConfig(**{"model": "m", "base_url": server.url, **settings}), PARTS)


def questions(count: int) -> list[Question]:
    """Different ones, with answers of different lengths."""
    return [
        Question(Prompt(f"Why {number}?", f"prompts[{number}]"), "a" * (number + 1), "b" * (2 * number + 3))
        for number in range(count)
    ]
