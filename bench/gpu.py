"""One GPU, measured in one call: throughput beside TRL, a profile, the choices of XLA's autotuner, and attention.

    bench/gpu.sh                                       # at most eight minutes; a row is printed when its point is done
    SHAPES=tiny bench/gpu.sh                           # tries all of it out, on a CPU too
    python -m bench.gpu --shapes '[1b]' --seconds 240

The points that matter most come first. What has finished is in `--out` even if the rest never does: `table.md`, for
each point its line of JSON and its log, `profile/` of a step of the first point, and `autotuning/` with what XLA found
fastest for each product on this card. A point that fails, or has no time left, says so in its row, and the next begins.
"""

import json
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax

from bench.compare import OURS, PEERS, ROOT, environment_of, our_command, peer_command, python_of, write_inputs
from bench.profiles import SHAPES
from lora_dpo_jax.settings.arguments import parse
from lora_dpo_jax.settings.choices import check_choice

TRL = "trl"
RECOMPUTED_LIVE = {"8b": "full"}  # gradient checkpointing where `products` does not fit a card of 80 GB
MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}  # JAX takes 0.75 by itself
COLUMNS = (
    "shape",
    "system",
    "real tokens/s",
    "pairs/s",
    "s/step",
    "MFU",
    "peak MB",
    "ours / TRL",
    "compile s",
    "loss 0",
)
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"
LEAST_SECONDS = 10  # a point is not begun with less


@dataclass(frozen=True)
class Options:
    shapes: list[str] = field(default_factory=lambda: ["8b", "1b"])  # the most important one first
    data: str = "ultrafeedback"  # the profile that pairs are drawn by
    pairs: int = 64
    pairs_per_step: int = 16
    steps: int = 8  # timed ones of ours; of TRL's as many as go once through the pairs
    r: int = 64
    attention_lengths: list[int] = field(default_factory=lambda: [4096])  # of rows, 32,768 tokens together
    environments: str = "build/peers"  # what peers/environments.sh filled; without it, TRL of this environment
    seconds: int = 460  # for all points
    out: str = "build/gpu"

    def __post_init__(self):
        for shape in self.shapes:
            check_choice("shapes", shape, SHAPES)
        if self.pairs % self.pairs_per_step:
            raise ValueError(f"pairs={self.pairs} must be a multiple of pairs_per_step={self.pairs_per_step}")


@dataclass(frozen=True)
class Point:
    """One command. It writes a line of JSON to the file that `--out` names."""

    name: str  # of its files
    shape: str
    system: str  # for the table
    command: tuple[str, ...]
    environment: dict[str, str]


def main() -> None:
    options = parse(Options)
    jax.config.update("jax_platforms", "cpu")  # the card's memory is for the points
    out = Path(options.out).absolute()
    (out / "autotuning").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    print(HEAD, flush=True)
    for row in measure(options, out):
        rows.append(row)
        print(table(rows)[-1], flush=True)
        (out / "table.md").write_text("\n".join([HEAD, *table(rows), ""]), encoding="utf-8")
    print("\n".join(["", HEAD, *table(rows), f"\nin {out}: {', '.join(sorted(path.name for path in out.iterdir()))}"]))
    raise SystemExit(any("fault" in row for row in rows))


def measure(options: Options, out: Path) -> Iterator[dict[str, Any]]:
    """What each point found, as soon as it is known."""
    end = time.monotonic() + options.seconds
    for point in points(options, out):
        yield _result(point, out, end - time.monotonic()) | {"shape": point.shape, "system": point.system}


def points(options: Options, out: Path) -> Iterator[Point]:
    """From the most important one on."""
    first = options.shapes[0]
    for shape in options.shapes:
        yield _ours(options, out, shape, "cached", "products", profile=shape == first)
        yield _trl(options, out, shape)
    for shape in options.shapes:
        yield _ours(options, out, shape, "live", RECOMPUTED_LIVE.get(shape, "products"))
    for length in options.attention_lengths:
        sizes = {"rows": max(1, 32_768 // length), "length": length, "data": options.data}
        if first == "tiny":
            sizes |= {"rows": 1, "kv_heads": 1, "group": 2, "head_size": 16, "steps": 2}
        command = (sys.executable, "-m", "bench.attention", *_words(sizes))
        yield Point(f"attention-{length}", f"{length} tokens", "attention", command, environment_of(OURS))
    yield _ours(options, out, first, "cached", "full")


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each row. A system's rate is divided by TRL's for the same shape, once that is known."""
    of_trl = {row["shape"]: row["tokens_per_second"] for row in rows if row["system"] == TRL and "fault" not in row}
    return [_line(row, of_trl.get(row["shape"])) for row in rows]


def _line(row: dict[str, Any], of_trl: float | None) -> str:
    if "fault" in row:
        return f"| {row['shape']} | {row['system']} | {row['fault']}{' |' * (len(COLUMNS) - 2)}"
    if row["system"] == "attention":
        dense = f"{row['dense']}'s dense {row['dense_milliseconds']} ms"
        found = f"{row['milliseconds']} ms, {dense}, {row['seconds']} s with compiling"
        return f"| {row['shape']} | {row['system']} | {found}{' |' * (len(COLUMNS) - 2)}"
    ratio = row["tokens_per_second"] / of_trl if of_trl and row["system"] != TRL else None
    cells = [
        *(f"{row['tokens_per_second']:,.0f}", f"{row['pairs_per_second']:.1f}", f"{row['seconds_per_step']:.3f}"),
        *(_shown(row.get("mfu"), "{:.3f}"), f"{row['peak_memory_mb']:,.0f}", _shown(ratio, "{:.2f}x")),
        *(_shown(row.get("compile_seconds"), "{:.0f}"), f"{row['loss_first']:.6f}"),
    ]
    return f"| {row['shape']} | {row['system']} | {' | '.join(cells)} |"


def _shown(value: float | None, how: str) -> str:
    return "" if value is None else how.format(value)


def _ours(options: Options, out: Path, shape: str, reference: str, recompute: str, *, profile: bool = False) -> Point:
    name = f"{shape}-{reference}-{recompute}"
    more = {"model.gradient_checkpointing": recompute}
    if profile:
        more["profile"] = str(out / "profile")
    inputs = _inputs(options, shape, reference=reference, ours=" ".join(_words(more)), steps=options.steps)
    environment = MEMORY | environment_of(OURS)
    tuned = f"--xla_gpu_dump_autotune_results_to={out / 'autotuning' / name}.txt"
    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {tuned}".strip()
    command = our_command(inputs, *write_inputs(inputs, out / "inputs"))
    return Point(name, shape, f"ours, {reference}, {recompute}", tuple(command), environment)


def _trl(options: Options, out: Path, shape: str) -> Point:
    inputs = _inputs(options, shape, steps=options.pairs // options.pairs_per_step)
    command = peer_command(PEERS[TRL], inputs, *write_inputs(inputs, out / "inputs"), python=_python(options))
    return Point(f"{shape}-trl", shape, TRL, tuple(command), environment_of(TRL))


def _python(options: Options) -> Path:
    """TRL's own environment, or this one if it has TRL."""
    own = python_of(PEERS[TRL], options.environments)
    return Path(sys.executable) if not own.exists() and find_spec("trl") is not None else own


def _inputs(options: Options, shape: str, **more: Any) -> Namespace:
    """As bench.compare reads them."""
    common = dict(shape=shape, data=options.data, pairs=options.pairs, pairs_per_step=options.pairs_per_step)
    common |= dict(tokenizer=None, train_seq_len=1024, r=options.r, alpha=float(options.r), dtype="bfloat16")
    # A warm-up that meets all pairs meets all shapes of batches too.
    return Namespace(**common | dict(warmup=options.pairs // options.pairs_per_step) | more)


def _words(settings: dict[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def _result(point: Point, out: Path, seconds: float) -> dict[str, Any]:
    """The point's line of JSON, or the `fault` for which there is none."""
    if seconds < LEAST_SECONDS:
        return {"fault": "not begun: no time is left"}
    if not Path(point.command[0]).exists():
        return {"fault": f"{point.command[0]} is missing: see bench/peers/environments.sh"}
    result, log = out / f"{point.name}.json", out / f"{point.name}.log"
    result.unlink(missing_ok=True)
    with open(log, "w", encoding="utf-8") as file:
        command = [*point.command, "--out", str(result)]
        process = subprocess.Popen(command, cwd=ROOT, env=point.environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return {"fault": f"not done after {seconds:.0f} s, when the time was over"}
    if status or not result.exists():
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return {"fault": f"exit status {status}: {lines[-1][:200] if lines else 'nothing was printed'}"}
    return json.loads(result.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
