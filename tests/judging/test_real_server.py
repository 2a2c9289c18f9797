"""The judge against `transformers serve` with the quickstart's model."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from judge_servers import PARTS, questions

from lora_dpo_jax.judging.openai_judge import OpenAIJudge, OpenAIJudgeConfig

MODEL = Path(__file__).parents[2] / "examples" / "quickstart" / "model"
START_SECONDS = 90  # of a busy machine; about five of an idle one


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The other processes of the tests start without torch.
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if Path(path).name != "without_torch"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(MODEL)]
    settings = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen([*command, *settings], env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_up(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait(timeout=10)


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1):
            return True
    except OSError:
        return False


def test_a_served_models_replies_and_tokens_are_those_of_transformers(url):
    config = OpenAIJudgeConfig(model=str(MODEL), base_url=url, max_tokens=8, concurrency=2, timeout=20.0, max_retries=1)
    asked = questions(2)
    found = dict(OpenAIJudge(config, PARTS).verdicts(asked))
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    for number, question in enumerate(asked):
        messages = [{"role": "user", "content": PARTS.render(question)}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        size = ids["input_ids"].shape[1]
        new = theirs.generate(**ids, max_new_tokens=8, do_sample=False)[0, size:]
        verdict = found[number]
        assert verdict.preferred is None  # so small a model judges nothing: each question was asked twice
        assert verdict.reason == tokenizer.decode(new, skip_special_tokens=True)
        assert (verdict.usage.prompt_tokens, verdict.usage.completion_tokens) == (2 * size, 2 * len(new))


def test_a_model_that_is_not_served_is_an_error_that_names_it(url):
    config = OpenAIJudgeConfig(model="gone", base_url=url, timeout=20.0, max_retries=0)
    with pytest.raises(
        ValueError, match=r"judge.base_url=.*, judge.model='gone': the server rejects .*\(400: Server is"
    ):
        list(OpenAIJudge(config, PARTS).verdicts(questions(1)))
