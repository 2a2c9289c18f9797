"""A judge behind a server that speaks OpenAI's chat completions: OpenAI, vLLM, SGLang, Ollama, transformers serve."""

import importlib.util
import logging
import math
import os
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_dpo_jax.judging.interface import Judge, JudgeConfig, Question, RunModels, Usage, Verdict
from lora_dpo_jax.judging.requests import concurrently
from lora_dpo_jax.judging.template import REASONING, Template, read_verdict
from lora_dpo_jax.redaction import HIDDEN, SHORTEST, redact, without_secrets

logger = logging.getLogger("lora_dpo_jax")

LONGEST_MESSAGE = 300  # characters of a server's message in an error
DECLINED = ("content_filter", "content_policy_violation")  # codes of servers that refuse one question
TRIES = 2  # of one question: a reply without a verdict is asked for once more


@JudgeConfig.register_subclass("openai")
@dataclass(frozen=True)
class OpenAIJudgeConfig(JudgeConfig):
    """A model behind an OpenAI-compatible server. Needs the extra `judge`."""

    model: str  # as the server names it
    base_url: str | None = None  # such as http://127.0.0.1:8000/v1; null: $OPENAI_BASE_URL, or OpenAI's own
    api_key_env: str = "OPENAI_API_KEY"  # the environment variable with the key; a server of your own may need none
    template: str | None = None  # the path of a text with {prompt}, {first} and {second}, or of a Jinja template
    temperature: float | None = 0.0  # null: not sent, as some models take none
    max_tokens: int | None = 512  # of a reply; null: not sent
    parameters: dict[str, Any] = field(default_factory=dict)  # more of the request, such as {reasoning_effort: low}
    concurrency: int = 4  # requests at once
    timeout: float = 60.0  # seconds until a request is given up and sent again
    max_retries: int = 5  # of a request that fails or is turned away, with growing pauses or those that the server asks
    prompt_price: float | None = None  # per million tokens, in any currency; null: the cost is not known
    completion_price: float | None = None  # the same for the tokens of replies

    def __post_init__(self):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):  # may be the key itself, so it is not shown
            raise ValueError("api_key_env must be the name of an environment variable that holds the key, not the key")
        if self.base_url is not None and not re.match(r"https?://", self.base_url):
            raise ValueError(f"base_url={self.base_url!r} must begin with http:// or https://")
        for name in ("concurrency", "timeout", "max_tokens"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name}={value} must be positive")
        for name in ("max_retries", "prompt_price", "completion_price", "temperature"):
            if (value := getattr(self, name)) is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} must be 0 or a positive number")
        if (self.prompt_price is None) != (self.completion_price is None):
            raise ValueError("prompt_price and completion_price belong together: set both, or neither")
        if taken := sorted({"model", "messages", "stream", "n"} & set(self.parameters)):
            raise ValueError(f"parameters may not set {taken}")

    def check(self, run: RunModels) -> None:
        if importlib.util.find_spec("openai") is None:
            raise ImportError(
                "judge.type=openai needs the package openai, which is in the extra `judge`: "
                "pip install 'lora_dpo_jax[judge]'"
            )
        Template.read("judge.template", self.template, REASONING)
        if self._key is None and self._url is None:
            raise ValueError(
                f"judge.api_key_env={self.api_key_env}: this environment variable is not set. Set it to a key of "
                "OpenAI, or set judge.base_url to another server"
            )

    def start(self, run: RunModels) -> "OpenAIJudge":
        return OpenAIJudge(self, Template.read("judge.template", self.template, REASONING))

    def cost(self, usage: Usage) -> float | None:
        if self.prompt_price is None or self.completion_price is None:
            return None
        return (usage.prompt_tokens * self.prompt_price + usage.completion_tokens * self.completion_price) / 1e6

    @property
    def request(self) -> dict[str, Any]:
        """What each request holds, but its messages."""
        sent = {"model": self.model, "temperature": self.temperature, "max_tokens": self.max_tokens}
        return {name: value for name, value in (sent | self.parameters).items() if value is not None}

    @property
    def _key(self) -> str | None:
        return os.environ.get(self.api_key_env, "").strip() or None

    @property
    def _url(self) -> str | None:
        """None: OpenAI's own."""
        return self.base_url or os.environ.get("OPENAI_BASE_URL", "").strip() or None


class _DeclinedError(Exception):
    """The server answers other questions, but not this one."""


class OpenAIJudge(Judge):
    """Sends each question as one user message, and reads the verdict from the reply."""

    def __init__(self, config: OpenAIJudgeConfig, template: Template):
        import openai

        self.config, self.template = config, template
        self._client = openai.OpenAI(
            api_key=config._key or "none",  # the client insists on one
            base_url=config._url,
            timeout=config.timeout,
            max_retries=config.max_retries,
        )
        self.url = without_secrets(str(self._client.base_url))

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"type": "openai", "url": self.url, "template": self.template.text, **self.config.request}

    def verdicts(self, questions: Sequence[Question]) -> Generator[tuple[int, Verdict], None, None]:
        texts = [self.template.render(question) for question in questions]  # so that a template fails before it costs
        yield from concurrently(self._verdict, texts, self.config.concurrency)

    def _verdict(self, text: str) -> Verdict:
        usage, reply = Usage(), ""
        for _ in range(TRIES):
            try:
                reply, used = self._reply(text)
            except _DeclinedError as error:
                return Verdict(None, str(error), usage)
            usage += used
            if (preferred := read_verdict(reply)) is not None:
                return Verdict(preferred, self._without_key(reply), usage)
        return Verdict(None, self._without_key(reply), usage)

    def _reply(self, text: str) -> tuple[str, Usage]:
        import openai

        create: Callable[..., Any] = self._client.chat.completions.create
        sent = dict(self.config.request)
        try:
            # extra_body, because the client's own arguments do not have every server's names.
            answer = create(model=sent.pop("model"), messages=[{"role": "user", "content": text}], extra_body=sent)
            reply, used = answer.choices[0].message.content or "", answer.usage
        except openai.OpenAIError as error:
            if getattr(error, "code", None) in DECLINED:
                raise _DeclinedError(f"the server declined to answer: {self._shown(error)}") from error
            raise self._explained(error) from error
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ConnectionError(
                f"judge.base_url={self.url}: the server answers, but not with a chat completion. Does the address end "
                "as it should, for example in /v1?"
            ) from error
        return reply, Usage(getattr(used, "prompt_tokens", 0) or 0, getattr(used, "completion_tokens", 0) or 0)

    def _explained(self, error: Exception) -> Exception:
        """The error as one line that names the setting."""
        import openai

        config, status = self.config, getattr(error, "status_code", None)
        where = f"judge.base_url={self.url}"
        if status in (401, 403):  # the server's message may quote a part of the key
            return ConnectionError(
                f"judge.api_key_env={config.api_key_env}: the server at {self.url} rejects the key in this environment "
                f"variable ({status})" + ("" if config._key else ", which is not set")
            )
        if status == 404:
            return ValueError(
                f"judge.model={config.model!r}: the server at {self.url} does not know it, or the address is wrong "
                f"(404: {self._shown(error)})"
            )
        if isinstance(error, openai.APITimeoutError):
            return ConnectionError(f"{where}: no reply within judge.timeout={config.timeout:g} s, {self._tries}")
        if isinstance(error, openai.APIConnectionError):
            cause = self._shown(error.__cause__ or error)
            return ConnectionError(f"{where}: cannot be reached, {self._tries} ({cause})")
        if status == 429 or (status or 0) >= 500:
            return ConnectionError(f"{where}: the server answers {status}, {self._tries} ({self._shown(error)})")
        model = f"judge.model={config.model!r}"
        return ValueError(f"{where}, {model}: the server rejects the request ({status}: {self._shown(error)})")

    @property
    def _tries(self) -> str:
        tries = self.config.max_retries + 1
        return f"after {tries} {'try' if tries == 1 else 'tries'}"

    def _shown(self, error: BaseException) -> str:
        """What the server says in a line, without the key."""
        body = getattr(error, "body", None)
        said = [body.get(name) for name in ("message", "detail", "error")] if isinstance(body, dict) else [body]
        text = " ".join(self._without_key(next((x for x in said if x and isinstance(x, str)), str(error))).split())
        return text if len(text) <= LONGEST_MESSAGE else text[:LONGEST_MESSAGE] + "..."

    def _without_key(self, text: str) -> str:
        key = self.config._key
        return redact(text.replace(key, HIDDEN) if key and len(key) >= SHORTEST else text)
