"""One call measures what it has time for, the most important points first, and keeps what has finished."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import gpu

FOUND = {"tokens_per_second": 300.0, "pairs_per_second": 2.0, "seconds_per_step": 1.5, "peak_memory_mb": 900.0}
FOUND |= {"system": "of the process", "shape": "a folder", "loss_first": 0.693147}


def point(name: str, system: str, code: str) -> gpu.Point:
    """A process that finds its file as the last argument, in `path`."""
    command = (sys.executable, "-c", f"import sys, json, time; path = sys.argv[-1]; {code}")
    return gpu.Point(name, "tiny", system, command, dict(os.environ))


def writing(**more) -> str:
    return f"open(path, 'w').write({json.dumps(FOUND | more)!r})"


def test_what_finishes_is_kept_and_what_does_not_is_told(tmp_path, monkeypatch):
    (tmp_path / "gone.json").write_text(json.dumps(FOUND))  # of an earlier call
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 1)
    monkeypatch.setattr(gpu, "points", lambda options, out: [
        point("ours", "ours, cached, products", writing()),
        point("gone", "ours, live, full", "sys.exit('no memory is left')"),
        point("trl", gpu.TRL, writing(tokens_per_second=100.0)),
        point("slow", "ours, cached, full", "time.sleep(60)"),
        point("late", "ours, cached, full", writing()),
    ])  # fmt: skip
    rows = [*gpu.measure(gpu.Options(shapes=["tiny"], seconds=6), tmp_path)]
    ours, gone, trl, slow, late = gpu.table(rows)
    assert ours.startswith("| tiny | ours, cached, products | 300 | 2.0 | 1.500 |") and "| 3.00x |" in ours
    assert "exit status 1: no memory is left" in gone and "| 100 |" in trl and "x |" not in trl
    assert "when the time was over" in slow and "no time is left" in late
    assert {line.count("|") for line in gpu.table(rows)} == {len(gpu.COLUMNS) + 1}
    assert json.loads((tmp_path / "ours.json").read_text()) == FOUND and not (tmp_path / "gone.json").exists()


def test_the_points_are_those_of_the_table_most_important_first(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    monkeypatch.setenv("PYTHONPATH", "ours")
    monkeypatch.setattr(gpu, "write_inputs", lambda inputs, work: (inputs.shape, work / "pairs.jsonl"))
    found = [*gpu.points(gpu.Options(), tmp_path)]
    assert [each.name for each in found] == [
        *("8b-cached-products", "8b-trl", "1b-cached-products", "1b-trl"),
        *("8b-live-full", "1b-live-products", "attention-4096", "8b-cached-full"),
    ]
    ours, trl = found[:2]
    assert ours.environment["XLA_FLAGS"].split() == [
        "--xla_cpu_enable_fast_math=false",
        f"--xla_gpu_dump_autotune_results_to={tmp_path}/autotuning/8b-cached-products.txt",
    ]
    profiled = [each.name for each in found if "--profile" in each.command]
    assert profiled == ["8b-cached-products"] and "PYTHONPATH" not in trl.environment
    same = ("--pairs", "--warmup")
    assert {name: ours.command[ours.command.index(name) + 1] for name in same} == {
        name: trl.command[trl.command.index(name) + 1] for name in same
    }


def test_the_script_takes_shapes_and_seconds_from_the_environment(tmp_path):
    script = Path(gpu.__file__).with_name("gpu.sh")
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SHAPES": "tiny 1b"}
    done = subprocess.run([script, "--r", "8"], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["-m", "bench.gpu", "--shapes", "[tiny, 1b]", "--seconds", "460", "--r", "8"]


@pytest.mark.parametrize(
    "wrong, named", [({"shapes": ["9b"]}, "shapes"), ({"pairs": 10}, "pairs=10 must be a multiple")]
)
def test_mistakes_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        gpu.Options(**wrong)
