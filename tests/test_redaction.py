"""Secrets do not reach what others may read; what is no secret stays."""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

import draccus
import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import instruct_folder, preference_rows, run_config, write_rows

from lora_dpo_jax.main.train import main
from lora_dpo_jax.redaction import RedactingFormatter, redact, redacted, without_secrets

pytestmark = pytest.mark.usefixtures("two_devices")

TOKEN = "hf_" + "aB3" * 12
KEY = "0123456789abcdef" * 2
COMMIT = "0123456789abcdef0123456789abcdef01234567"

SECRETS = [
    # users and passwords in URLs, whatever the passwords hold
    ("https://me:pa55word@host/x.jsonl", "https://***@host/x.jsonl"),
    ("https://user:pa@lpha123@host/x", "https://***@host/x"),
    ("https://me@example.org:pa55word@host/x", "https://***@host/x"),
    ("'https://me:pa'55\"word@host/x' is gone", "'https://***@host/x' is gone"),
    ("https://me:pa55word@host/x?mail=a@b&page=1", "https://***@host/x?mail=a@b&page=1"),
    ("https://me:pa55word@a/x,https://b/y@v1", "https://***@a/x,https://b/y@v1"),
    (f"https://{TOKEN}@host/x.jsonl does not exist", "https://***@host/x.jsonl does not exist"),
    ("git+https://me@host/x", "git+https://***@host/x"),
    ("s3://key:secret@bucket/x", "s3://***@bucket/x"),
    ("s3://account:first/second/third@bucket/x", "s3://***@bucket/x"),
    ("redis://:pa55word@host:6379/0 is down", "redis://***@host:6379/0 is down"),
    # queries and fragments
    ("https://host/x.jsonl?token=abc123&page=2", "https://host/x.jsonl?token=***&page=2"),
    ("https://host/x?pwd=hunter2&apikey=ab&access_key=cd#a", "https://host/x?pwd=***&apikey=***&access_key=***#a"),
    ("https://host/x?key=ab&client-secret=cd&accessToken=ef", "https://host/x?key=***&client-secret=***&accessToken=***"),
    ("https://host/x?sort_key=a1b2c3d4e5", "https://host/x?sort_key=***"),
    ("https://host/x#access_token=abcdefgh", "https://host/x#access_token=***"),
    ("https://host/x?sessionid=0a1b2c3d4e5f&bearer=0a1b2c3d4e5f", "https://host/x?sessionid=***&bearer=***"),
    ("https://b.s3.com/x?X-Amz-Date=1&X-Amz-Signature=ff00#a", "https://b.s3.com/x?X-Amz-Date=1&X-Amz-Signature=***#a"),
    ("https://a.blob.net/x?sv=1&sig=a%2Fb%3D: 403", "https://a.blob.net/x?sv=1&sig=*** 403"),
    # headers
    ("Authorization: Bearer abcdefgh.ijk", "Authorization: Bearer ***"),
    ("Authorization: Basic c29tZTpvbmU6ZWxzZQ== was refused", "Authorization: Basic *** was refused"),
    ("curl -H 'Authorization: Token abcdefgh' https://x", "curl -H 'Authorization: Token ***' https://x"),
    ("{'authorization': 'Bearer abcdefgh', 'accept': '*'}", "{'authorization': 'Bearer ***', 'accept': '*'}"),
    ("Authorization: AWS4-HMAC-SHA256 Credential=a/b, Signature=c\nx", "Authorization: AWS4-HMAC-SHA256 ***\nx"),
    ("Authorization: 0a1b2c3d4e5f", "Authorization: ***"),
    ("Authorization: Bearer abcdefgh", "Authorization: Bearer ***"),
    ("authorization:basic YWJj", "authorization:basic ***"),
    ('Authorization: Digest username="me", response="6629fae4"\nx', "Authorization: Digest ***\nx"),
    ("-H 'Authorization: Digest username=\"me\", response=\"6629fae4\"' x", "-H 'Authorization: Digest ***' x"),
    ("it sent Bearer a1b2c3d4e5", "it sent Bearer ***"),
    # settings
    ('{"X-Api-Key": "correct horse", "n": 1}', '{"X-Api-Key": "***", "n": 1}'),
    ("AccountName=me;AccountKey=ab/cd+ef==;Suffix=net", "AccountName=me;AccountKey=***;Suffix=net"),
    ("main --hf_token abcdefgh --seed 1", "main --hf_token *** --seed 1"),
    ("aws_secret_access_key = ab1CD2ef3GH4", "aws_secret_access_key = ***"),
    ("password: hunter2", "password: ***"),
    ("key: api_key = ab1CD2ef3GH4", "key: api_key = ***"),
    ("api_key: abcdefgh\nseed: 1", "api_key: ***\nseed: 1"),
    ("curl -H 'X-Auth-Token: abcdefgh' https://x", "curl -H 'X-Auth-Token: ***' https://x"),
    ("Set-Cookie: session=abcdefgh; Path=/", "Set-Cookie: ***"),
    ("error: password=hunter2, retry", "error: password=***, retry"),
    ('"{\\"token\\": \\"hunter2\\", \\"n\\": 1}"', '"{\\"token\\": \\"***\\", \\"n\\": 1}"'),
    ("machine host login me password hunter2", "machine host login me password ***"),
    # shapes
    (f"401 for {TOKEN}.", "401 for ***."),
    (f"wandb login --relogin {COMMIT}", "wandb login --relogin ***"),
    (f"wandb.login(key='{COMMIT}')", "wandb.login(key='***')"),
    (f"machine api.wandb.ai login user password {COMMIT}", "machine api.wandb.ai login user password ***"),
    ("-----BEGIN RSA PRIVATE KEY-----\nab\ncd\n-----END RSA PRIVATE KEY-----\nx",
     "-----BEGIN RSA PRIVATE KEY-----***-----END RSA PRIVATE KEY-----\nx"),
    ('"-----BEGIN PRIVATE KEY-----\\nabcd', '"-----BEGIN PRIVATE KEY-----***'),
    ("https://hooks.slack.com/services/T0/B0/abcdefgh", "https://hooks.slack.com/services/***"),
    ("https://discord.com/api/webhooks/12/ab-CD_ef", "https://discord.com/api/webhooks/***"),
    ("https://api.telegram.org/bot12:ab-CD_ef/send", "https://api.telegram.org/bot***"),
    *[
        (f"{shape} was refused", "*** was refused")
        for shape in (
            "sk-" + "aB3" * 16, "sk-proj-ab_C-" + "aB3" * 16, "sk-ant-api03-" + "aB3" * 30, "gsk_" + "aB3" * 15,
            "ghp_" + "aB3" * 12, "github_pat_" + "aB3" * 20, "glpat-" + "aB3" * 7, "AKIA" + "AB34" * 4,
            "AIza" + "aB3-_" * 7, "ya29." + "aB3-_" * 7, "GOOG" + "1EAB" * 6, "xoxb-123456789012-abcdef",
            "hf_oauth_" + "aB3" * 12, "pplx-" + "aB3" * 12, "lin_api_" + "aB3" * 12, "tskey-auth-" + "aB3" * 8,
            "xoxp-1234567890", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.ab-c_d", "npm_" + "aB3" * 12, "dapi" + KEY,
        )
    ],
]  # fmt: skip


@pytest.mark.parametrize("text, shown", SECRETS)
def test_secrets_in_texts_are_hidden(text, shown):
    assert redact(text) == shown
    assert redact(shown) == shown


INNOCENT = [
    "gs://bucket/prefs/*.jsonl.gz",
    "abfss://container@account.dfs.core.windows.net/x",
    "hf://datasets/org/name@main/x.parquet, git@github.com:org/repo.git",
    "http://localhost:8080/npm/@types/node",
    "meta-llama/Llama-3.1-8B, Qwen/Qwen3-235B-A22B-Instruct-2507",
    "https://host/x.jsonl?page=2&keywords=a&monkey=1&sort_key=created_at",
    "the tokenizer knows 49152 tokens; key=value",
    "the token: that of the hub; password: the one of your account; token=None",
    "eos_token='</s>', pad_token: <|im_end|>, max_token=49152, tokenizer: a/b",
    "File x.py, line 3, in f: connect(token=self.token, password=password)",
    "def connect(token: str, password: str | None = None): unknown token: abcdefgh",
    "token=/run/secrets/hub.txt, private_key: ~/.ssh/id_rsa, s3://bucket/sort_key=a1b2c3d4e5/x.parquet",
    f"wandb run a1b2c3 of commit {COMMIT}",
    "someone@example.org, /home/a@b/c",
    "{'a':'https://host:port','b':'me@example.org'}",
    "s3://bucket/token=abc/part-0.parquet, /data/secret=santa/x",
    "first_token=hello, next_token=world, Authorization: required",
    f"commit {COMMIT}, cache key {COMMIT}, sha256:{COMMIT * 2}",
    f"logs/20260801-120000-a1b2c3/checkpoints/step-200, {KEY}, 123e4567-e89b-12d3-a456-426614174000",
    "sk-learn-extension-package-2024, basic understanding, bearer authentication",
    "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}",
]


@pytest.mark.parametrize("text", INNOCENT)
def test_what_is_no_secret_stays(text):
    assert redact(text) == text


words = st.sampled_from(
    "data model token key secret-santa v2 2026-08-01 step-200 train-00001 pass auth sig a.b".split()
)
hashes = st.text("0123456789abcdef", min_size=6, max_size=64)
paths = st.lists(words | hashes, min_size=1, max_size=5).map("/".join)
texts = st.lists(paths | st.sampled_from(INNOCENT), min_size=1, max_size=4).map(" ".join)


@settings(deadline=None, max_examples=60)
@given(texts, paths)
def test_paths_hashes_and_ids_stay_in_any_text(text, path):
    for shown in (
        text,
        f"/{path}",
        f"gs://{path}",
        f"initialize_from_hf: {path}",
        f"https://host/{path}?page={text[:3]}",
    ):
        assert redact(shown) == shown


@settings(deadline=None, max_examples=60)
@given(texts, st.sampled_from(SECRETS), st.sampled_from([" ", "\n", " (", '\t"', ": ", " x=", " key: "]))
def test_a_secret_is_found_in_any_text(text, secret, gap):
    assert redact(f"{text}{gap}{secret[0]}") == f"{text}{gap}{secret[1]}"


@pytest.mark.parametrize(
    "piece", ["a://b:", "https://a:@", "?token", "sk-a", "eyJ", "a-", "x: ", 'token="', "@", "\n "]
)
def test_a_long_line_takes_no_long(piece):
    """In proportion to its length: a pattern that goes back and forth would take minutes here, not part of a second."""
    began = time.perf_counter()
    redact(piece * (500_000 // len(piece)))
    assert time.perf_counter() - began < 10


def test_values_of_secret_environment_variables_are_hidden_wherever_they_are(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "q" * 40)
    monkeypatch.setenv("AZURE_STORAGE_KEY", "a1b2c3d4/e5+f6==")
    monkeypatch.setenv("PGPASSWORD", "correcthorse")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "sometimes")
    assert (
        redact(f"api.wandb.ai refused {KEY} and {'q' * 40}, sometimes") == "api.wandb.ai refused *** and ***, sometimes"
    )
    assert redact("a1b2c3d4/e5+f6==, a1b2c3d4%2Fe5%2Bf6%3D%3D") == "***, ***"
    assert redact("correcthorse is no correcthorses") == "*** is no correcthorses"


@pytest.mark.parametrize(
    "name, value",
    [
        ("MY_TOKEN", "a1b2c3d4e5\n"),  # as the file of a secret has it
        ("MY_TOKEN", '"a1b2c3d4e5"'),  # as a file of variables has it
        ("GITHUB_PAT", "a1b2c3d4e5"),
        ("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"),  # no part of which looks like a secret
    ],
)
def test_the_value_of_a_secret_variable_is_hidden_however_it_is_written(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    shown = value.strip().strip('"')
    assert redact(f"{shown!r} was refused: {quote(shown, safe='')}") == "'***' was refused: ***"


@pytest.mark.parametrize(
    "name, value",
    [
        ("SORT_KEY", "quickstart"),
        ("PRIMARY_KEY", "train-00001-of-00004"),
        ("MODEL_KEY", "Qwen/Qwen3-235B-A22B-Instruct-2507"),
        ("BASE_AUTH", "examples/quickstart/model"),
        ("LICENSE_KEY", "/opt/licenses/a1b2c3d4e5f6a7b8c9d0.txt"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/home/me/project-a1b2c3d4e5f6.json"),
        ("PAD_TOKEN", "<|endoftext|>"),
        ("CI_JOB_TOKEN", "quickstart"),
        ("PWD", "/home/ada/quickstart"),
    ],
)
def test_the_value_of_a_variable_that_looks_like_no_secret_stays(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert redact(f"examples/{value}/model") == f"examples/{value}/model"


def test_paths_and_ids_of_a_config_lose_nothing_to_the_environment(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "a1b2c3d4e5f6")
    tree = {"peft_save_path": "out/a1b2c3d4e5f6", "base": "org/a1b2c3d4e5f6-7B", "url": "gs://b/a1b2c3d4e5f6?sig=x"}
    assert redacted(tree) == tree | {"url": "gs://b/***?sig=***"}
    assert redacted(["a1b2c3d4e5f6", "it is a1b2c3d4e5f6"]) == ["***", "it is ***"]


@pytest.mark.parametrize(
    "url, shown",
    [
        ("gs://bucket/base", "gs://bucket/base"),
        ("abfss://container@account/base", "abfss://container@account/base"),
        ("https://me:pa55word@host/base?page=1", "https://host/base?page=1"),
        ("https://host/base?sig=abc&page=1", "https://host/base"),
    ],
)
def test_a_url_without_its_secrets_is_still_a_url(url, shown):
    assert without_secrets(url) == shown


def test_settings_with_the_names_of_secrets_are_hidden():
    tree = {"tokenizer": "a/b", "tracker": [{"type": "mine", "api_key": "x", "token": "y", "keep": [1]}], "token": None}
    assert redacted(tree) == tree | {
        "tracker": [{"type": "mine", "api_key": "***", "token": "***", "keep": [1]}],
    }


def test_traces_in_the_log_are_redacted():
    try:
        raise OSError(f"https://me:{KEY}@host")
    except OSError:
        record = logging.LogRecord("x", logging.ERROR, "x.py", 1, "cannot read %s", (f"?token={KEY}",), sys.exc_info())
    shown = RedactingFormatter("%(message)s").format(record)
    assert KEY not in shown and "Traceback" in shown


def files_with(secret: str, folder: Path) -> list[str]:
    found = (path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes())
    return [str(path.relative_to(folder)) for path in found]


def test_a_run_writes_no_secret_of_its_config_anywhere(tmp_path, monkeypatch, caplog):
    """Rows at a signed URL, as a store gives it; memory:// takes the query for a part of the name."""
    monkeypatch.setenv("SOME_API_KEY", KEY)
    files = fsspec.filesystem("memory")
    rows = write_rows(tmp_path / "rows.jsonl", preference_rows(8))
    files.pipe(f"/rows/x?token={KEY}.jsonl", rows.read_bytes())
    config = run_config(
        tmp_path,
        rows,
        data__components__prefs__source={"type": "url", "train_urls": [f"memory://rows/x?token={KEY}.jsonl"]},
        trainer__tracker=[{"type": "wandb", "mode": "offline"}, {"type": "tensorboard"}],
        peft_save_path=str(tmp_path / "adapter"),
        merged_hf_save_path=str(tmp_path / "merged"),
        trainer__steps_per_eval=1,
        validation_split_fraction=0.25,
    )
    monkeypatch.setattr(sys, "argv", ["main", "--data.components.prefs.source.train_urls", f"memory://x?token={KEY}"])
    main(config)
    assert files_with(KEY, tmp_path) == []
    run_dir = config.trainer.run_dir("run")
    assert "?token=***" in (run_dir / "config.yaml").read_text()
    written = {path.name for path in run_dir.rglob("*")}
    assert {"checkpoint.json", "config.yaml", "metrics.jsonl", "tensorboard", "wandb"} <= written


def test_the_url_of_a_base_loses_its_secrets_in_an_export_and_nothing_else(tmp_path, monkeypatch):
    """It goes to adapter_config.json and the model card. memory:// takes the query for a part of the name."""
    monkeypatch.setenv("LORA_DPO_JAX_CACHE", str(tmp_path / "downloads"))
    monkeypatch.setenv("SORT_KEY", "the-base")
    files = fsspec.filesystem("memory")
    for path in instruct_folder().iterdir():
        files.pipe(f"/the-base?sig=abcdef/{path.name}", path.read_bytes())
    rows = write_rows(tmp_path / "rows.jsonl", preference_rows(8))
    base = "memory://the-base?sig=abcdef"
    config = run_config(tmp_path, rows, initialize_from_hf=base, peft_save_path=str(tmp_path / "adapter"))
    main(config)
    assert files_with("abcdef", tmp_path / "adapter") == files_with("abcdef", tmp_path / "logs") == []
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == "memory://the-base"


@pytest.mark.parametrize("traced", [False, True])
def test_the_command_line_tells_no_secret(tmp_path, traced):
    config = run_config(tmp_path, tmp_path / "gone.jsonl")
    text = str(draccus.dump(config)).replace(str(tmp_path / "gone.jsonl"), f"memory://gone?token={KEY}.jsonl")
    (tmp_path / "config.yaml").write_text(text)
    command = [sys.executable, "-m", "lora_dpo_jax.main", "--config_path", str(tmp_path / "config.yaml")]
    env = os.environ | ({"LORA_DPO_JAX_TRACEBACK": "1"} if traced else {})
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "source: no file matches memory://gone?token=***" in done.stderr
    assert ("Traceback" in done.stderr) == traced
    assert KEY not in done.stderr + done.stdout
