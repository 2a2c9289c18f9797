"""This library and others on the same pairs, weights and settings, turn by turn, each time in a new process:

    bench/peers/environments.sh build/peers trl tunix levanter
    python -m bench.compare --environments build/peers --peer trl trl-precomputed --rounds 3

Prints a table of medians and ratios, and one line of JSON.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import models
from bench import pairs as benchmark_pairs
from bench.measure import ALLOCATOR, emit
from bench.profiles import LARGE_SHAPES, SHAPES

ROOT = Path(__file__).parents[1]
OURS = "lora_dpo_jax"


@dataclass(frozen=True)
class Peer:
    environment: str  # a folder that peers/environments.sh makes
    command: tuple[str, ...]  # a module, and what it is told beside pairs and model


PEERS: dict[str, Peer] = {
    "trl": Peer("trl", ("bench.peers.run_trl",)),
    "trl-nogc": Peer("trl", ("bench.peers.run_trl", "--no-gradient-checkpointing")),
    "trl-precomputed": Peer("trl", ("bench.peers.run_trl", "--no-gradient-checkpointing", "--precompute")),
    "tunix": Peer("tunix", ("bench.peers.run_tunix",)),
    "levanter-512": Peer("levanter", ("bench.peers.run_levanter", "--seq-len", "512")),
    "levanter-4096": Peer("levanter", ("bench.peers.run_levanter", "--seq-len", "4096")),
}
# Figure -> whether more of it is better.
FIGURES = {"tokens_per_second": True, "cpu_seconds_per_step": False, "peak_memory_mb": False}


def main() -> None:
    a = _arguments()
    work = Path(a.work)
    shape, pairs_file = write_inputs(a, work)
    commands = {OURS: our_command(a, shape, pairs_file)}
    for name in a.peer:
        peer = PEERS[name]
        if not (python := python_of(peer, a.environments)).exists():
            raise SystemExit(f"{python} is missing: bench/peers/environments.sh {a.environments} {peer.environment}")
        commands[name] = peer_command(peer, a, shape, pairs_file, python=python)
    results = measure_in_turns(commands, a.rounds, work / "results")
    comparison = compare(results)
    print(markdown(comparison))
    emit({"shape": a.shape, "data": a.data, "rounds": a.rounds, **comparison}, a.out)


def compare(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the rounds of each system, and ratios to ours: above 1 where ours is better, in every figure."""
    medians = {
        system: {figure: statistics.median(run[figure] for run in runs) for figure in FIGURES}
        for system, runs in results.items()
    }
    ours = medians[OURS]

    def ratio(figure: str, theirs: float) -> float:
        return round(ours[figure] / theirs if FIGURES[figure] else theirs / ours[figure], 3)

    ratios = {
        system: {figure: ratio(figure, value) for figure, value in figures.items()}
        for system, figures in medians.items()
        if system != OURS
    }
    return {
        "medians": medians,
        "ratios": ratios,
        "versions": {system: runs[0]["versions"] for system, runs in results.items()},
        "device": {system: runs[0]["device"] for system, runs in results.items()},
        "runs": results,
    }


def markdown(comparison: dict[str, Any]) -> str:
    """One row a system; the ratios say how many times better ours is."""
    lines = [
        "| system | real tokens/s | ratio | CPU s/step | ratio | peak MB | ratio | versions |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for system, medians in comparison["medians"].items():
        ratios = comparison["ratios"].get(system)
        cells = [system]
        for figure in FIGURES:
            cells += [f"{medians[figure]:,.1f}", f"{ratios[figure]:.2f}x" if ratios else ""]
        cells.append(", ".join(f"{name} {version}" for name, version in comparison["versions"][system].items()))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def measure_in_turns(
    commands: Mapping[str, Sequence[str]], rounds: int, folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """A B A B ...: what slows the machine for a while then slows them all."""
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, Any]]] = {system: [] for system in commands}
    for number in range(rounds):
        for system, command in commands.items():
            print(f"round {number + 1} of {rounds}: {system}", file=sys.stderr, flush=True)
            out = folder / f"{system}-{number}.json"
            out.unlink(missing_ok=True)
            log = out.with_suffix(".log")
            with open(log, "w", encoding="utf-8") as file:
                command, environment = [*command, "--out", str(out)], environment_of(system)
                code = subprocess.run(
                    command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
                ).returncode
            if code or not out.exists():
                raise SystemExit(f"{system} failed with exit code {code}; {log} ends:\n{log.read_text()[-2000:]}")
            results[system].append(json.loads(out.read_text()))
    return results


def environment_of(system: str) -> dict[str, str]:
    """The environment variables of a process that measures a system."""
    # A module of a peer's environment must not find this one's packages.
    found = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" or system == OURS}
    return found | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **ALLOCATOR}


def write_inputs(a: argparse.Namespace, work: Path) -> tuple[str, Path]:
    """The model's folder and the file of pairs that every system reads."""
    if a.shape in SHAPES:
        large = a.shape in LARGE_SHAPES
        folder = models.write_folder(a.shape, work / "models" / a.shape, with_weights=not large)
    else:
        folder = Path(a.shape)
    pairs = benchmark_pairs.load(
        a.data,
        a.pairs,
        vocab_size=models.decoder_config(str(folder)).vocab_size,
        tokenizer=a.tokenizer,
        cap=a.train_seq_len,
    )
    pairs_file = work / "pairs.jsonl"
    benchmark_pairs.write_jsonl(pairs, pairs_file)
    return str(folder.resolve()), pairs_file.resolve()


def our_command(a: argparse.Namespace, shape: str, pairs_file: Path) -> list[str]:
    settings = {
        "shape": shape,
        "pairs_file": pairs_file,
        "pairs": a.pairs,
        "warmup": a.warmup,
        "steps": a.steps,
        "reference": a.reference,
        "trainer.train_batch_size": a.pairs_per_step,
        "trainer.mp": "f32" if a.dtype == "float32" else "p=f32,c=bfloat16",
        "lora.r": a.r,
        "lora.alpha": a.alpha,
    }
    options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "bench.throughput", *options, *shlex.split(a.ours)]


def peer_command(peer: Peer, a: argparse.Namespace, shape: str, pairs_file: Path, *, python: Path) -> list[str]:
    settings = {
        "model": shape,
        "pairs-file": pairs_file,
        "pairs": a.pairs,
        "pairs-per-step": a.pairs_per_step,
        "warmup": a.warmup,
        "steps": a.steps,
        "r": a.r,
        "alpha": a.alpha,
        "dtype": a.dtype,
    }
    return run_peer(peer, settings, python=python)


def run_peer(peer: Peer, settings: Mapping[str, Any], *, python: Path) -> list[str]:
    """The command of a peer with what it is told of model, pairs and training."""
    options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    module, *more = peer.command
    return [str(python), "-m", module, *options, *more]


def python_of(peer: Peer, environments: str) -> Path:
    # Not resolved: the environment's python is a link, and what it is called tells it where it belongs.
    return Path(environments).absolute() / peer.environment / "bin" / "python"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", nargs="+", choices=[*PEERS], required=True)
    parser.add_argument("--environments", required=True, help="the folder that peers/environments.sh filled")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", default="22m", help=f"one of {[*SHAPES]}, or the folder of a model")
    parser.add_argument("--data", default="uf512", help="a profile, or a file of preferences")
    parser.add_argument("--tokenizer", help="the folder of one, for a file")
    parser.add_argument("--train-seq-len", type=int, default=1024, help="longer rows of a file are left out")
    parser.add_argument("--pairs", type=int, default=16, help="a multiple of --pairs-per-step")
    parser.add_argument("--pairs-per-step", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=2, help="steps that do not count")
    parser.add_argument("--steps", type=int, default=5, help="steps that count")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=32.0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--reference", choices=["cached", "live"], default="cached", help="this library's")
    parser.add_argument("--ours", default="", help="more for bench.throughput: '--model.gradient_checkpointing full'")
    parser.add_argument("--work", default="build/bench", help="where models, pairs and results are written")
    parser.add_argument("--out", help="also write the JSON line to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
