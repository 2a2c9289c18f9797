"""What all peers share: their arguments, the pairs, and the line of JSON. Needs nothing but the standard library."""

import argparse
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from bench.measure import Meter, emit

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BETA, LEARNING_RATE = 0.1, 1e-4

Pair = dict[str, list[int]]  # prompt_ids, chosen_ids, rejected_ids


def parser(description: str) -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--model", required=True, help="a model's folder; without weights in it they are random")
    arguments.add_argument("--pairs-file", required=True, help="one pair a line: prompt_ids, chosen_ids, rejected_ids")
    arguments.add_argument("--pairs", type=int, required=True, help="how many of them, over and over")
    arguments.add_argument("--pairs-per-step", type=int, default=4)
    arguments.add_argument("--warmup", type=int, default=2, help="steps that do not count")
    arguments.add_argument("--steps", type=int, default=5, help="steps that count")
    arguments.add_argument("--r", type=int, default=16)
    arguments.add_argument("--alpha", type=float, default=32.0)
    arguments.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments.add_argument("--out", help="also write the line to this file")
    return arguments


class Benchmark:
    """The pairs of each step, and the figures."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        with open(arguments.pairs_file, encoding="utf-8") as file:
            self.pairs: list[Pair] = [json.loads(line) for line in file][: arguments.pairs]
        if len(self.pairs) < arguments.pairs:
            raise SystemExit(f"{arguments.pairs_file} holds {len(self.pairs)} pairs, fewer than {arguments.pairs}")
        if arguments.pairs % arguments.pairs_per_step:
            # Some systems end an epoch with a smaller batch, others do not.
            raise SystemExit(f"--pairs {arguments.pairs} must be a multiple of {arguments.pairs_per_step}")
        self.meter = Meter(arguments.warmup)

    @property
    def num_steps(self) -> int:
        return self.arguments.warmup + self.arguments.steps

    def batch(self, step: int) -> list[Pair]:
        size = self.arguments.pairs_per_step
        start = step * size % len(self.pairs)
        return self.pairs[start : start + size]

    def report(self, system: str, *, losses: list[float], device: str, packages: list[str], **more: Any) -> None:
        """`more` replaces what was measured here, where the system knows better."""
        a = self.arguments
        result = {
            "system": system,
            "shape": a.model,
            "data": a.pairs_file,
            "pairs": a.pairs,
            "pairs_per_step": a.pairs_per_step,
            **self.meter.report(
                [real_tokens(self.batch(step)) for step in range(a.warmup, self.num_steps)], a.pairs_per_step
            ),
            "loss_first": losses[0],
            "loss_last": losses[-1],
            "device": device,
            "versions": {name: importlib.metadata.version(name) for name in packages},
            "settings": {"r": a.r, "alpha": a.alpha, "dtype": a.dtype},
            **more,
        }
        emit(result, a.out)


def real_tokens(pairs: list[Pair]) -> int:
    """Prompt and response of each sequence, without padding: the same count for every system."""
    return sum(2 * len(pair["prompt_ids"]) + len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs)


def has_weights(folder: str) -> bool:
    return any(Path(folder).glob("*.safetensors"))


def model_config(folder: str) -> dict[str, Any]:
    return json.loads((Path(folder) / "config.json").read_text())
