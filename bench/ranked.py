"""Ranked answers: one example of several answers and all their comparisons, next to these as pairs, here and in TRL.

    bench/peers/environments.sh build/peers trl
    python -m bench.ranked --shape 22m --environments build/peers

Turn by turn, each time in a new process. Prints a table of comparisons per second and one line of JSON.
"""

import math
import shlex
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import models
from bench import pairs as benchmark_pairs
from bench.compare import PEERS, measure_in_turns, python_of, run_peer
from bench.measure import emit
from bench.profiles import PROFILES
from lora_dpo_jax.settings.arguments import parse

TOGETHER, APART, TRL = "lora_dpo_jax", "lora_dpo_jax, pairs", "trl"


@dataclass(frozen=True)
class Options:
    shape: str = "22m"
    data: str = "uf512"
    responses: int = 4
    lists: int = 8  # drawn
    lists_per_step: int = 2
    warmup: int = 2
    steps: int = 3
    rounds: int = 3
    reference: str = "cached"
    environments: str | None = None  # the folder that peers/environments.sh filled; null leaves TRL out
    ours: str = ""  # more for bench.throughput
    work: str = "build/bench"
    out: str | None = None


def main() -> None:
    options = parse(Options)
    results = measure_in_turns(commands(options), options.rounds, Path(options.work) / "ranked")
    rates = {system: statistics.median(run["pairs_per_second"] for run in runs) for system, runs in results.items()}
    print(markdown(rates))
    emit({"shape": options.shape, "data": options.data, "comparisons_per_second": rates, "runs": results}, options.out)


def commands(options: Options) -> dict[str, list[str]]:
    """By system. A step is of the same lists and comparisons for all."""
    work, comparisons = Path(options.work), math.comb(options.responses, 2)
    folder = str(models.write_folder(options.shape, work / "models" / options.shape, with_weights=True).resolve())
    shared = {"shape": folder, "data": options.data, "responses": options.responses}
    shared |= {"warmup": options.warmup, "steps": options.steps, "reference": options.reference}

    def ours(apart: bool) -> list[str]:
        times = comparisons if apart else 1
        settings = shared | {"pairs": times * options.lists, "trainer.train_batch_size": times * options.lists_per_step}
        words = [f"--{name}={value}" for name, value in (settings | {"apart": str(apart).lower()}).items()]
        return [sys.executable, "-m", "bench.throughput", *words, *shlex.split(options.ours)]

    systems = {TOGETHER: ours(False), APART: ours(True)}
    if options.environments is not None:
        vocab_size = models.decoder_config(folder).vocab_size
        lists = benchmark_pairs.ranked(PROFILES[options.data], options.lists, options.responses, vocab_size=vocab_size)
        file = work / "ranked.jsonl"
        benchmark_pairs.write_jsonl(benchmark_pairs.as_pairs(lists), file)
        systems[TRL] = run_peer(
            PEERS[TRL],
            {
                "model": folder,
                "pairs-file": file.resolve(),
                "pairs": comparisons * options.lists,
                "pairs-per-step": comparisons * options.lists_per_step,
                "warmup": options.warmup,
                "steps": options.steps,
                "r": 16,
                "alpha": 32.0,
                "dtype": "float32",
            },
            python=python_of(PEERS[TRL], options.environments),
        )
    return systems


def markdown(rates: dict[str, float]) -> str:
    lines: list[Any] = ["| system | comparisons/s | ratio |", "|---|---|---|"]
    for system, rate in rates.items():
        ratio = "" if system == TOGETHER else f"{rates[TOGETHER] / rate:.2f}x"
        lines.append(f"| {system} | {rate:,.2f} | {ratio} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
