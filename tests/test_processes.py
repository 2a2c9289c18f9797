"""A run on several processes is the run that it is on one: told once, kept once, and ended together."""

import dataclasses
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import draccus
import numpy as np
import pytest
from hub_server import TOKEN, Repo, hub_server
from many_processes import ended, start
from preloaded import Preloaded
from safetensors.numpy import load_file
from tiny_runs import preference_rows, run_config, write_rows

from lora_dpo_jax.main.evaluate import EvaluateConfig
from lora_dpo_jax.main.evaluate import main as evaluate
from lora_dpo_jax.main.generate import main as generate
from lora_dpo_jax.main.generate import parse
from lora_dpo_jax.main.train import main
from lora_dpo_jax.processes.run_lock import LOCK, RunLock
from lora_dpo_jax.processes.signals import RESTART_STATUS
from lora_dpo_jax.runs.config import TrainConfig

pytestmark = pytest.mark.usefixtures("two_devices")

STEPS = 6
SILENCE = 15  # seconds
MAIN = "lora_dpo_jax.main"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


def config_of(folder: Path, name: str, **settings) -> TrainConfig:
    """With its own caches, and with all that could go wrong with many processes."""
    rows = folder / "train.jsonl"
    if not rows.exists():
        write_rows(rows, preference_rows(16))
    (folder / name).mkdir(exist_ok=True)
    exports = {"peft_save_path": str(folder / name / "peft"), "merged_hf_save_path": str(folder / name / "merged")}
    settings = {"trainer__id": None, "trainer__checkpointer": {"keep": [{"every": 4}]}, **exports} | settings
    settings = {"reference_log_probs": "cached"} | settings
    return run_config(
        folder / name,
        rows,
        data__shuffle=True,
        validation_split_fraction=0.25,
        # Adam makes of a gradient that is rounding alone a step of the learning rate: at 1e-2, one of an adapter's 384
        # elements ends 1.4e-4 from that on one device (on four of one process too), and the others 2e-7.
        optimizer={"learning_rate": 3e-3, "warmup": 2},
        lora__dropout=0.1,
        trainer__num_train_steps=STEPS,
        trainer__train_batch_size=8,
        **{"trainer__distributed": {"heartbeat_timeout_seconds": 30}} | settings,
    )


def written(config: TrainConfig) -> str:
    path = Path(config.trainer.log_dir).parent / "run.yaml"
    path.write_text(str(draccus.dump(config)))
    return str(path)


def run_folder(config: TrainConfig) -> Path:
    """The only one."""
    (path,) = Path(config.trainer.log_dir).iterdir()
    return path


def metrics_of(config: TrainConfig) -> list[dict[str, float]]:
    lines = (run_folder(config) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]


def adapters_of(config: TrainConfig) -> dict[str, np.ndarray]:
    return load_file(Path(config.peft_save_path or "") / "adapter_model.safetensors")


def assert_same_run(config: TrainConfig, other: TrainConfig) -> None:
    """To the order of sums."""
    pairs = zip(metrics_of(config), metrics_of(other), strict=True)
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys()
        losses = [name for name in ours if name.endswith("loss")]
        assert [ours[k] for k in losses] == pytest.approx([theirs[k] for k in losses], abs=1e-5)
        # How full rows are depends on how many devices share them; accuracies jump where a margin is near zero.
        rest = [name for name in ours if "accurac" not in name and name != "train/padding_fraction"]
        assert [ours[k] for k in rest] == pytest.approx([theirs[k] for k in rest], rel=1e-3, abs=1e-4)
    theirs = adapters_of(other)
    for name, tensor in adapters_of(config).items():
        assert np.linalg.norm(tensor - theirs[name]) <= 1e-4 * np.linalg.norm(theirs[name]), name
    exports = [Path(c.peft_save_path or "") for c in (config, other)]
    assert sorted(path.name for path in exports[0].iterdir()) == sorted(path.name for path in exports[1].iterdir())
    if config.merged_hf_save_path is None:
        return
    merged = [load_file(Path(c.merged_hf_save_path or "") / "model.safetensors") for c in (config, other)]
    for name, tensor in merged[0].items():
        np.testing.assert_allclose(tensor, merged[1][name], rtol=0, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def alone(folder) -> TrainConfig:
    """The run on one process, of two devices."""
    config = config_of(folder, "alone")
    main(config)
    return config


def run_on(count: int, config: TrainConfig) -> list[tuple[int, str, str]]:
    outcomes = ended(start(["-m", MAIN, "--config_path", written(config)], count=count))
    assert [status for status, _, _ in outcomes] == [0] * count, [told[-2000:] for _, _, told in outcomes]
    return outcomes


# Goes to another hub than huggingface.co.
PUSHING = """
import os, runpy, sys
from huggingface_hub import constants

os.environ["HF_TOKEN"], constants.ENDPOINT = sys.argv.pop(1), sys.argv.pop(1)
constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = False, True
runpy.run_module("lora_dpo_jax.main", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def pushed() -> dict[str, Repo]:
    """What `on_two` pushed, by the name of the repository."""
    return {}


@pytest.fixture(scope="module")
def on_two(folder, pushed) -> tuple[TrainConfig, list[tuple[int, str, str]]]:
    config = config_of(folder, "two", hub={"adapter": "team/warm"})
    with hub_server() as hub, pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_TOKEN")  # not of the processes that others begin from
        outcomes = ended(start(["-c", PUSHING, TOKEN, hub.url, "--config_path", written(config)], count=2))
        pushed.update(hub.repos)
    assert [status for status, _, _ in outcomes] == [0, 0], [told[-2000:] for _, _, told in outcomes]
    return config, outcomes


def test_a_run_on_two_processes_equals_that_on_one(alone, on_two):
    assert_same_run(on_two[0], alone)


def test_a_run_on_four_processes_equals_that_on_one(folder, alone):
    """On another mesh, with the reference in the step, and without what two processes show."""
    mesh = {"axes": {"data": 2, "model": 2}}
    config = config_of(folder, "four", trainer__mesh=mesh, reference_log_probs="live", merged_hf_save_path=None)
    run_on(4, config)
    assert_same_run(config, alone)


def test_what_there_is_one_of_is_made_once(alone, on_two):
    config, ((_, printed, told), *others) = on_two
    assert "held-out pairs" in printed and "step 0/6" in told
    for _, printed, told in others:
        assert not [line for line in printed.splitlines() if "Gloo" not in line], "only the first one prints"
        assert not re.search("kept|step|held-out|saved", told), "and tells"
    cache = Path(config.data.cache_dir or "")
    assert len([*cache.glob("examples/*")]) == len([*cache.glob("reference/*")]) == 1
    records = next(cache.glob("reference/*/records.bin")).stat().st_size
    assert records == next(Path(alone.data.cache_dir or "").glob("reference/*/records.bin")).stat().st_size
    assert sorted(path.name for path in (run_folder(config) / "checkpoints").iterdir()) == ["step-4", "step-6"]


def test_the_exports_of_several_processes_are_pushed_once(on_two, pushed):
    config, _ = on_two
    (repo,), folder = pushed.values(), Path(config.peft_save_path or "")
    assert [*pushed] == ["team/warm"] and len(repo.commits) == 1
    exported = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lora_dpo_export.json"}
    assert repo.branches["main"] == exported


def test_scores_and_completions_of_two_processes_are_those_of_one(folder, on_two, capsys):
    config, _ = on_two
    kept = {"split": "train", "adapter": config.peft_save_path, "trainer": dataclasses.replace(config.trainer, id="e")}
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)} | kept
    by_one, by_two = (EvaluateConfig(**settings, output=str(folder / f"{name}.jsonl")) for name in ("one", "two"))
    evaluate(by_one)
    prompted = ["--model", config.initialize_from_hf, "--prompt", "where sleeps the owl?", "--max_new_tokens", "4"]
    capsys.readouterr()
    generate(parse(prompted))
    completed = capsys.readouterr().out

    path = folder / "two.yaml"
    path.write_text(str(draccus.dump(by_two)))
    scoring = start(["-m", "lora_dpo_jax.main.evaluate", "--config_path", str(path)], count=2)
    completing = start(["-m", "lora_dpo_jax.main.generate", *prompted], count=2)
    (scored, *_), (first, second) = ended(scoring), ended(completing)
    assert scored[0] == first[0] == second[0] == 0, scored[2] + first[2] + second[2]
    assert completed in first[1] and "completion" not in second[1]
    ours, theirs = ([json.loads(line) for line in Path(c.output).read_text().splitlines()] for c in (by_two, by_one))
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, abs=1e-3), "summed log-probs of some tens of nats"


# Sends itself a signal after a step that is no checkpoint's, if it is the process that is meant. It then waits: the
# steps that are left take less time than the processes need to agree on where to stop.
SIGNALLED = """
import os, runpy, sys, time
from lora_dpo_jax.training import loop as trainer

signum, victim, at = (int(sys.argv.pop(1)) for _ in range(3))
take = trainer._MetricsLog.take

def take_and_signal(self, step, metrics):
    take(self, step, metrics)
    if step == at and os.environ["RANK"] == str(victim):
        os.kill(os.getpid(), signum)
        time.sleep(2)

trainer._MetricsLog.take = take_and_signal
runpy.run_module("lora_dpo_jax.main", run_name="__main__", alter_sys=True)
"""


def signalled(config: TrainConfig, signum: signal.Signals, *, victim: int) -> list[Preloaded]:
    return start(["-c", SIGNALLED, str(int(signum)), str(victim), "1", "--config_path", written(config)], count=2)


def test_sigterm_to_one_process_stops_all_and_the_run_goes_on_exactly(folder, on_two, alone, caplog):
    config = config_of(folder, "stopped", trainer__id="stopped")
    outcomes = ended(signalled(config, signal.SIGTERM, victim=1))
    assert [status for status, _, _ in outcomes] == [RESTART_STATUS] * 2, [told[-2000:] for _, _, told in outcomes]
    stopped = [re.findall(r"stopped by SIGTERM after (\d) of 6 steps", told) for _, _, told in outcomes]
    assert stopped[0] == stopped[1] and len(stopped[0]) == 1
    assert (run_folder(config) / "checkpoints" / f"step-{stopped[0][0]}").is_dir()

    fewer = config_of(folder, "fewer", trainer__id="stopped")
    shutil.copytree(config.trainer.log_dir, fewer.trainer.log_dir)
    outcomes = run_on(2, config)
    assert "resuming from" in outcomes[0][2]
    assert metrics_of(config) == metrics_of(on_two[0])
    theirs = adapters_of(on_two[0])
    assert all(np.array_equal(tensor, theirs[name]) for name, tensor in adapters_of(config).items())

    with caplog.at_level("INFO", "lora_dpo_jax"):
        main(fewer)  # on one process
    assert f"step-{stopped[0][0]}" in caplog.text and "resuming from" in caplog.text
    assert_same_run(fewer, alone)


def test_a_run_that_another_process_works_on_ends_on_all_processes(folder):
    config = config_of(folder, "twice", trainer__id="twice")
    run_dir = config.trainer.run_dir("twice")
    with RunLock(run_dir, "twice"):
        outcomes = ended(start(["-m", MAIN, "--config_path", written(config)], count=2))
        assert [path.name for path in run_dir.iterdir()] == [LOCK]
    for status, _, told in outcomes:
        assert status == 1, told[-3000:]
        assert f"trainer.id='twice': process {os.getpid()} on" in told and "is at work on this run" in told
        assert "Traceback" not in told


def test_when_one_process_is_killed_the_other_ends_in_words(folder):
    config = config_of(
        folder, "killed", trainer__id="killed", trainer__distributed={"heartbeat_timeout_seconds": SILENCE}
    )
    other, victim = processes = signalled(config, signal.SIGKILL, victim=1)
    victim.wait(timeout=900)
    began = time.monotonic()
    other.wait(timeout=60)
    seconds = time.monotonic() - began
    (status, _, told), (killed, _, _) = ended(processes)
    assert killed == -signal.SIGKILL
    assert status == RESTART_STATUS, told[-3000:]
    assert re.search(rf"process 1 of 2 \(.+\) has given no sign of life for {SILENCE} s: it was killed", told)
    assert "Start the same command again on all machines" in told and "Traceback" not in told
    assert seconds < 60
