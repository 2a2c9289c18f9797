"""Secrets do not reach what others may read; what is no secret stays."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import draccus
import fsspec
import pytest
from tiny_runs import instruct_folder, preference_rows, run_config, write_rows

from lora_dpo_jax.main.train import main
from lora_dpo_jax.redaction import RedactingFormatter, redact, redacted

TOKEN = "hf_" + "aB3" * 12
KEY = "0123456789abcdef" * 2


@pytest.mark.parametrize(
    "text, shown",
    [
        ("https://me:pa55word@host/x.jsonl", "https://***@host/x.jsonl"),
        (f"https://{TOKEN}@host/x.jsonl does not exist", "https://***@host/x.jsonl does not exist"),
        ("s3://key:secret@bucket/x", "s3://***@bucket/x"),
        ("https://host/x.jsonl?token=abc123&page=2", "https://host/x.jsonl?token=***&page=2"),
        ("https://b.s3.com/x?X-Amz-Date=1&X-Amz-Signature=ff00#a", "https://b.s3.com/x?X-Amz-Date=1&X-Amz-Signature=***#a"),
        ("https://a.blob.net/x?sv=1&sig=a%2Fb%3D: 403", "https://a.blob.net/x?sv=1&sig=*** 403"),
        (f"401 for {TOKEN}.", "401 for ***."),
        ("Authorization: Bearer abcdefgh.ijk", "Authorization: Bearer ***"),
    ],
)  # fmt: skip
def test_secrets_in_texts_are_hidden(text, shown):
    assert redact(text) == shown
    assert redact(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "gs://bucket/prefs/*.jsonl.gz",
        "abfss://container@account.dfs.core.windows.net/x",
        "meta-llama/Llama-3.1-8B",
        "https://host/x.jsonl?page=2&keywords=a",
        "the tokenizer knows 49152 tokens; key=value",
        "someone@example.org, /home/a@b/c",
    ],
)
def test_what_is_no_secret_stays(text):
    assert redact(text) == text


def test_values_of_secret_environment_variables_are_hidden_wherever_they_are(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "q" * 40)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "sometimes")
    assert (
        redact(f"api.wandb.ai refused {KEY} and {'q' * 40}, sometimes") == "api.wandb.ai refused *** and ***, sometimes"
    )


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


def test_the_name_of_a_base_in_an_export_has_no_password(tmp_path):
    """A URL of the base goes to adapter_config.json and the model card."""
    folder = tmp_path / "base?sig=abcdef"
    folder.symlink_to(instruct_folder())
    rows = write_rows(tmp_path / "rows.jsonl", preference_rows(8))
    config = run_config(tmp_path, rows, initialize_from_hf=str(folder), peft_save_path=str(tmp_path / "adapter"))
    main(config)
    assert files_with("abcdef", tmp_path / "adapter") == files_with("abcdef", tmp_path / "logs") == []
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(folder).replace("abcdef", "***")


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
