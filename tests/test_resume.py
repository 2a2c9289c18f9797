"""Runs that were killed or told to stop go on as if nothing had happened."""

import dataclasses
import json
import logging
import math
import os
import signal
import subprocess
from pathlib import Path

import draccus
import numpy as np
import preloaded
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file
from tiny_runs import instruct_folder, preference_rows, read_metrics, run_config, write_rows

from lora_dpo_jax.checkpoints.files import read_description
from lora_dpo_jax.main.train import main
from lora_dpo_jax.processes.signals import RESTART_STATUS, StoppedBySignalError
from lora_dpo_jax.runs.config import TrainConfig
from lora_dpo_jax.settings.arguments import parse
from lora_dpo_jax.tracking.metrics_file import MetricsFile

pytestmark = pytest.mark.usefixtures("two_devices")

STEPS = 8

# Runs the command line, and sends itself a signal as soon as the metrics of a step are on disk.
SIGNALLED = """
import os, runpy, sys
from lora_dpo_jax.tracking.metrics_file import MetricsFile

signum, at = int(sys.argv.pop(1)), int(sys.argv.pop(1))
log = MetricsFile.log

def log_and_signal(self, metrics, *, step):
    log(self, metrics, step=step)
    if step == at and "train/loss" in metrics:
        os.kill(os.getpid(), signum)

MetricsFile.log = log_and_signal
runpy.run_module("lora_dpo_jax.main", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def rows(folder) -> Path:
    return write_rows(folder / "train.jsonl", preference_rows(12))


def config_of(folder: Path, rows: Path, name: str, **settings) -> TrainConfig:
    """With all that could tell a run that goes on from one that never stopped."""
    return run_config(
        folder,
        rows,
        data__shuffle=True,
        lora__dropout=0.3,
        lora__trainable_token_indices={"embed_tokens": [7, 20], "lm_head": [7, 21]},
        reference_sync={"mixup_alpha": 0.5, "sync_steps": 2},
        validation_split_fraction=0.25,
        optimizer={"learning_rate": 1e-2, "warmup": 2},
        peft_save_path=str(folder / name),
        trainer__id=name,
        trainer__num_train_steps=STEPS,
        trainer__last_batch="short",  # of nine pairs, steps take 4, 4 and 1
        trainer__steps_per_eval=2,
        trainer__best={"metric": "eval/loss", "mode": "max"},  # not that of the adapters before the first step
        trainer__checkpointer={"keep": [{"every": 3}]},
        **settings,
    )


@pytest.fixture(scope="module")
def whole(folder, rows) -> TrainConfig:
    """A run that was never interrupted."""
    config = config_of(folder, rows, "whole")
    main(config)
    return config


def signalled(config: TrainConfig, signum: signal.Signals, at: int) -> subprocess.CompletedProcess:
    path = Path(config.trainer.log_dir).parent / f"{config.trainer.id}.yaml"
    path.write_text(str(draccus.dump(config)))
    return preloaded.run(["-c", SIGNALLED, str(int(signum)), str(at), "--config_path", str(path)], os.environ)


def outcome(config: TrainConfig) -> tuple[list[dict[str, float]], bytes]:
    """What is logged, but for what the clock decides, and the adapter."""
    lines = [{k: v for k, v in line.items() if "second" not in k} for line in read_metrics(config)]
    adapter = Path(config.peft_save_path or "") / "adapter_model.safetensors"
    return [line for line in lines if len(line) > 1], adapter.read_bytes()


def saved_steps(config: TrainConfig) -> list[str]:
    run_dir = config.trainer.run_dir(config.trainer.run_id())
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_a_run_that_was_killed_again_and_again_equals_one_that_never_was(folder, rows, whole, capsys, caplog):
    config = config_of(folder, rows, "killed")
    for at in (1, 4):  # before the first checkpoint, and while it is perhaps being written
        done = signalled(config, signal.SIGKILL, at)
        assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
        assert read_metrics(config)[-1]["step"] == at
    caplog.set_level(logging.INFO)
    main(dataclasses.replace(config, sample_prompts=["7: where sleeps the owl?"]))
    assert "checkpoints/step-3" in next(r.getMessage() for r in caplog.records if "resuming from" in r.getMessage())
    assert outcome(config) == outcome(whole)
    assert saved_steps(config) == saved_steps(whole) == ["step-3", "step-6", "step-8"]
    printed = capsys.readouterr().out
    assert "after:" in printed and "before:" not in printed
    header = next(line for line in printed.splitlines() if line.startswith("held-out pairs"))
    assert header.split()[2:5] == ["after", "step", "0"], "scores of before it was killed are not forgotten"
    assert header.endswith("after step 8")


def test_sigterm_saves_and_asks_to_be_started_again(folder, rows, whole):
    unnamed = config_of(folder, rows, "stopped", trainer__log_dir=str(folder / "stopped_logs"))
    unnamed = dataclasses.replace(unnamed, trainer=dataclasses.replace(unnamed.trainer, id=None))
    done = signalled(unnamed, signal.SIGTERM, 3)
    (run_dir,) = (folder / "stopped_logs").iterdir()
    config = dataclasses.replace(unnamed, trainer=dataclasses.replace(unnamed.trainer, id=run_dir.name))
    assert parse(TrainConfig, [], config_path=run_dir / "config.yaml") == config, "what it wrote resumes it too"
    assert done.returncode == RESTART_STATUS, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert "stopped by SIGTERM after 5 of 8 steps" in done.stderr
    assert saved_steps(config) == ["step-3", "step-5"]
    assert not Path(config.peft_save_path or "").exists()
    command = done.stderr.partition("To resume it:\n")[2]
    assert command.endswith(f" --trainer.id {run_dir.name}\n")
    resumed = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert outcome(config) == outcome(whole)
    assert saved_steps(config) == ["step-3", "step-6", "step-8"], "that of the signal is not needed any more"


def test_a_run_may_go_on_on_another_mesh(folder, rows, whole, monkeypatch):
    config = config_of(folder, rows, "moved", trainer__mesh={"axes": {"replica": 2, "data": 2, "model": 2}})
    log = MetricsFile.log

    def log_and_stop(self, metrics, *, step):
        log(self, metrics, step=step)
        if step == 3 and "train/loss" in metrics:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched, pytest.raises(StoppedBySignalError):
        patched.setattr(MetricsFile, "log", log_and_stop)
        main(config)
    assert saved_steps(config) == ["step-3", "step-5"]
    main(dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, mesh=whole.trainer.mesh)))

    for found, wanted in zip(read_metrics(config), read_metrics(whole), strict=True):
        # Sums in another order; a reward is a tenth of a difference of sums of some 50 nats. Accuracies are no measure:
        # in the first steps margins are rounding alone, or zero.
        for name in ("step", "train/loss", "train/rewards/margins", "eval/loss", "eval/dpo_chosen_reward"):
            assert found.get(name) == pytest.approx(wanted.get(name), abs=1e-5), (name, wanted["step"])
    files = (Path(c.peft_save_path or "") / "adapter_model.safetensors" for c in (config, whole))
    found, wanted = (load_file(file) for file in files)
    for name, tensor in wanted.items():
        assert np.linalg.norm(found[name] - tensor) < 1e-4 * np.linalg.norm(tensor), name


def test_a_finished_run_that_is_started_again_trains_no_further(whole):
    before = outcome(whole)
    main(whole)
    assert outcome(whole) == before


def test_a_checkpoint_holds_the_adapters_twice_more_for_adam_once_for_the_reference_and_no_weights(whole):
    run_dir = whole.trainer.run_dir(whole.trainer.run_id())
    description = read_description(epath.Path(run_dir / "checkpoints" / "step-8"))
    assert description["notes"]["reference_log_probs"] == "live", "as it moves"
    arrays = description["identity"]["arrays"]
    adapters = {name.replace("adapters.", "kept."): x for name, x in arrays.items() if name.startswith("adapters.")}
    assert description["kept"] == adapters, "those of the best evaluation"
    sizes = {name: math.prod(json.loads(shape[shape.index("[") :])) for name, shape in arrays.items()}
    scalars = [name for name, size in sizes.items() if size == 1]
    assert all(name in ("step", "skipped") or name.endswith("count") for name in scalars)
    adapter = load_file(Path(whole.peft_save_path or "") / "adapter_model.safetensors")
    # What the trained rows of tokens are in the base, too.
    rows = sum(tensor.size for name, tensor in adapter.items() if "trainable_tokens" in name)
    assert sum(sizes.values()) - len(scalars) == 4 * sum(tensor.size for tensor in adapter.values()) + rows


def other_model(folder: Path) -> str:
    """The same shapes, one other number."""
    folder.mkdir()
    for path in instruct_folder().iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    "change, told",
    [
        ("lora__r", "lora.r: 4 in the checkpoint, 2 in this run"),
        ("trainer__seed", "trainer.seed: 0 in the checkpoint, 1 in this run"),
        ("data", "data.components.prefs.pairs: 12 in the checkpoint, 11 in this run"),
        ("initialize_from_hf", "initialize_from_hf.files.model.safetensors: "),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_difference(folder, rows, whole, tmp_path, change, told):
    before = outcome(whole)
    settings = {"lora__r": {"lora__r": 2}, "trainer__seed": {"trainer__seed": 1}}.get(change, {})
    if change == "data":
        rows = write_rows(tmp_path / "train.jsonl", preference_rows(11))
    if change == "initialize_from_hf":
        settings = {change: other_model(tmp_path / "model")}
    with pytest.raises(ValueError, match="step-8 is a checkpoint of another run") as raised:
        main(config_of(folder, rows, "whole", **settings))
    assert told in str(raised.value)
    assert outcome(whole) == before


def test_a_run_cannot_end_before_its_checkpoint(folder, rows, whole):
    config = dataclasses.replace(whole, trainer=dataclasses.replace(whole.trainer, num_train_steps=5))
    with pytest.raises(ValueError, match="checkpoint of step 8, but the run has only 5 steps: raise trainer.num_train"):
        main(config)
