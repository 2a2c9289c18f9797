"""A loss of one's own trains and evaluates from the command line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import draccus
import pytest
import yaml
from tiny_runs import preference_rows, run_config, write_rows
from xla_flags import ONE_DEVICE

PAGE = Path(__file__).parents[2] / "docs" / "library.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With a config, its rows, and the loss of the library page in a module."""
    folder = tmp_path_factory.mktemp("own_loss")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (code,) = (block for block in blocks if '"squared_hinge"' in block)
    (folder / "my_losses.py").write_text(code)
    config = run_config(folder, write_rows(folder / "train.jsonl", preference_rows(12)), validation_split_fraction=0.25)
    (folder / "run.yaml").write_text(draccus.dump(config))
    return folder


def output_of(folder: Path, *words: str) -> str:
    command = [sys.executable, *words]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"XLA_FLAGS": ONE_DEVICE}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_loss_of_ones_own_trains_and_evaluates_from_the_command_line(folder):
    given = ["--plugins", "[my_losses]", "--loss", "{type: squared_hinge, beta: 0.2}"]
    output_of(folder, "-m", "lora_dpo_jax.main", "--config_path", "run.yaml", *given)
    lines = [json.loads(line) for line in (folder / "logs" / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 2 and losses[0] == 1.0, "the squared hinge of no difference"
    settings = yaml.safe_load((folder / "logs" / "run" / "config.yaml").read_text())
    assert settings["plugins"] == ["my_losses"]
    assert settings["loss"]["type"] == "squared_hinge" and settings["loss"]["beta"] == 0.2
    # As a console script, which has not the current folder on its path.
    script = "from lora_dpo_jax.main.evaluate import run; run()"
    written = ["--config_path", "logs/run/config.yaml", "--output", "scores.jsonl"]
    printed = output_of(folder, "-P", "-c", script, *written)
    assert re.search(r"^loss +1\.0000$", printed, re.MULTILINE)
    assert len((folder / "scores.jsonl").read_text().splitlines()) == 3
