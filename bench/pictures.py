"""The pictures of docs/objectives.md, from what `bench.objectives` wrote:

    python -m bench.objectives --objectives '[sigmoid, apo_down, simpo, sft, dpop]' --seeds '[0]' --steps_per_eval 5 \
        --out bench/results/objective_curves.jsonl
    python bench/pictures.py bench/results/objective_curves.jsonl docs/pictures

Needs matplotlib (`pip install -e '.[docs]'`) and nothing else of this repository.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

# Name -> title, and what is drawn of a run: nats, less those of step 0.
PICTURES = {
    "chosen": ("Log-prob of the chosen response", lambda run: run["chosen"]),
    "rejected": ("Log-prob of the rejected response", lambda run: run["rejected"]),
    "margin": (
        "Chosen less rejected",
        lambda run: [c - r for c, r in zip(run["chosen"], run["rejected"], strict=True)],
    ),
}
# Of Okabe and Ito, told apart by most colour-blind readers; the marks tell the rest.
STYLES = [("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#000000", "v")]


def main(curves: Path, folder: Path) -> None:
    runs = [json.loads(line) for line in curves.read_text().splitlines()]
    folder.mkdir(parents=True, exist_ok=True)
    for name, (title, values_of) in PICTURES.items():
        draw(runs, title, values_of).savefig(
            folder / f"objectives_{name}.svg", metadata={"Date": None, "Creator": None, "Title": title}
        )


def draw(runs: list[dict[str, Any]], title: str, values_of) -> plt.Figure:
    """One line for each run."""
    # Without a date and with fixed ids, the same curves give the same file.
    plt.rcParams |= {
        "svg.hashsalt": "objectives",
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    for run, (colour, mark) in zip(runs, STYLES, strict=True):
        axes.plot(run["steps"], values_of(run), color=colour, marker=mark, markersize=4, label=run["objective"])
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.set(title=title, xlabel="step", ylabel="nats, held out, since step 0")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
