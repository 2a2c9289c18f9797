"""The pictures of docs/, drawn again from what is stored in bench/results:

    python -m bench.pictures

Each is written twice, as NAME.svg for light pages and NAME-dark.svg for dark ones. Needs nothing but Python. The curves
of the objectives are those that `bench.objectives` wrote:

    python -m bench.objectives --objectives '[sigmoid, apo_down, simpo, sft, dpop]' --seeds '[0]' --steps_per_eval 5 \\
        --out bench/results/objective_curves.jsonl
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.charts import Bar, Line, bars, dots, lines
from bench.drawings import adapters, flow, packed_row
from bench.svg import DARK, LIGHT, Canvas

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "pictures"
SHAPES = {
    "22m": "A Llama of 22M parameters",
    "135m": "SmolLM2-135M's shape",
    "1b": "Llama-3.2-1B's shape",
    "8b": "Llama-3.1-8B's shape",
}
Row = dict[str, Any]


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


def files() -> dict[str, str]:
    """What docs/pictures holds: names of files and their text."""
    canvases = {name: draw() for name, draw in PICTURES.items()}
    light = {f"{name}.svg": canvas.svg(LIGHT) for name, canvas in canvases.items()}
    return light | {f"{name}-dark.svg": canvas.svg(DARK) for name, canvas in canvases.items()}


def results(name: str) -> list[Row]:
    lines = (ROOT / "bench" / "results" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def by_shape(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["shape"], []).append(row)
    return found


def compared(of: str, field: str, title: str, unit: str) -> Canvas:
    """What each system reaches, by shape. Ours comes first; behind a speed of others stands how many times ours is."""
    rows = [row for row in results(of) if row[field] is not None]

    def bar(row: Row, ours: Row) -> Bar:
        own = row["system"].startswith("lora_dpo_jax")
        ratio = "" if own or "memory" in field else f", ours {ours[field] / row[field]:.1f}x"
        return Bar(name_of(row), row[field], f"{row[field]:,}{ratio}", own)

    groups = {shape: [bar(row, group[0]) for row in group] for shape, group in by_shape(rows).items()}
    return grouped(title, rows[0]["machine"], unit, groups)


def name_of(row: Row) -> str:
    kept = row.get("gradient_checkpointing")
    return row["system"].replace("`", "").replace("no checkpointing, ", "") + (f", {kept}" if kept else "")


def savings() -> Canvas:
    """Seconds of a step, each saving on top of those before it."""

    def bar(row: Row, first: Row) -> Bar:
        seconds = row["seconds_per_step"]
        return Bar(row["rung"], seconds, f"{seconds:.2f} s, {first['seconds_per_step'] / seconds:.2f}x", True)

    rows = results("ladder")
    groups = {shape: [bar(row, group[0]) for row in group] for shape, group in by_shape(rows).items()}
    return grouped("What each saving is worth", rows[0]["machine"], "seconds a step", groups)


def grouped(title: str, machine: str, unit: str, groups: dict[str, list[Bar]]) -> Canvas:
    """Bars by shape; their description reads all of them out."""
    named = [(f"{SHAPES[shape]}, {unit}", found) for shape, found in groups.items()]
    spoken = ". ".join(f"{name}: " + "; ".join(f"{bar.name}: {bar.words}" for bar in found) for name, found in named)
    return bars(title, f"{machine}. {spoken}.", named)


def objective_curves(title: str, values_of: Callable[[Row], list[float]]) -> Canvas:
    """One line for each run: nats of held-out pairs, less those of step 0."""
    curves = [
        Line(run["objective"], list(zip(run["steps"], values_of(run), strict=True)))
        for run in results("objective_curves")
    ]
    ends = ", ".join(f"{curve.name} {curve.points[-1][1]:+.2f}" for curve in curves)
    description = f"Nats on held-out pairs since step 0, over {curves[0].points[-1][0]} steps. At the end: {ends}."
    return lines(title, description, "step", "nats, held out, since step 0", curves)


def objective_accuracy() -> Canvas:
    """A line for each objective, with a dot for each seed."""
    found: dict[str, list[float]] = {}
    for run in results("objectives"):
        found.setdefault(run["objective"], []).append(100 * run["accuracy"][-1])
    spoken = "; ".join(f"{name} " + ", ".join(f"{value:.1f}" for value in values) for name, values in found.items())
    return dots(
        "Held-out accuracy of each objective",
        f"The quickstart's data, after 75 steps, percent for seeds 0, 1 and 2: {spoken}.",
        "quickstart's data, after 75 steps; a dot is a seed",
        list(found.items()),
    )


PICTURES: dict[str, Callable[[], Canvas]] = {
    "packed_row": packed_row,
    "adapters": adapters,
    "flow": flow,
    "speed_gpu": lambda: compared("compare_gpu", "tokens_per_second", "Speed on one H100", "real tokens a second"),
    "speed_cpu": lambda: compared("compare_cpu", "tokens_per_second", "Speed on two CPU cores", "real tokens a second"),
    "memory_gpu": lambda: compared("compare_gpu", "peak_memory_mb", "Peak memory on one H100", "MB"),
    "memory_cpu": lambda: compared("compare_cpu", "peak_memory_mb", "Peak memory on two CPU cores", "MB"),
    "savings": savings,
    "objectives_accuracy": objective_accuracy,
    "objectives_chosen": lambda: objective_curves("Log-prob of the chosen response", lambda run: run["chosen"]),
    "objectives_rejected": lambda: objective_curves("Log-prob of the rejected response", lambda run: run["rejected"]),
    "objectives_margin": lambda: objective_curves(
        "Chosen less rejected", lambda run: [c - r for c, r in zip(run["chosen"], run["rejected"], strict=True)]
    ),
}

if __name__ == "__main__":
    main()
