"""The page that compares several runs: their final figures, what differs in their settings, and curves over each other.

On the page a run is a letter, since ids are long.
"""

import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_dpo_jax.report.charts import CURVES, SPEED, Line, Lines, Table, lines_chart, number, percent
from lora_dpo_jax.report.judged import flat
from lora_dpo_jax.report.page import drawn, render
from lora_dpo_jax.report.record import array_of
from lora_dpo_jax.report.run_files import RunFiles
from lora_dpo_jax.report.statistics import Estimate, accuracy, comparisons_in, estimate, margin, right_by
from lora_dpo_jax.report.verdict import duration, typical

MOST_RUNS = len(string.ascii_uppercase)
# Settings of where a run writes, which always differ.
PLACES = ("trainer.id", "trainer.log_dir", "peft_save_path", "merged_hf_save_path", "gguf_save_path")


def comparison_page(runs: Sequence[RunFiles]) -> str:
    if len(runs) > MOST_RUNS:
        raise ValueError(f"{len(runs)} runs are too many for one page; give at most {MOST_RUNS}")
    lettered = dict(zip(string.ascii_uppercase, runs, strict=False))
    return render(
        "comparison.html.jinja",
        runs=lettered,
        verdict=_verdict(lettered),
        figures=_figures(lettered),
        differences=_differences(lettered),
        charts=[drawn(chart) for chart in _curves(lettered)],
    )


def _verdict(runs: dict[str, RunFiles]) -> list[str]:
    """Which run is most often right on held-out comparisons, and whether that may be chance."""
    found = {
        letter: estimate
        for letter, run in runs.items()
        if (held_out := run.record.held_out) is not None
        and (estimate := accuracy(held_out, held_out.after)) is not None
    }
    if len(found) < 2:
        return ["Fewer than two of the runs have scores of held-out comparisons, so no run is called the better one."]
    best = max(found, key=lambda letter: found[letter].mean)
    sentences = [f"Run {best} has the highest held-out accuracy, {percent(found[best].mean)}."]
    for letter in found:
        if letter != best:
            sentences.append(_told_apart(best, letter, runs, found))
    return sentences


def _told_apart(best: str, other: str, runs: dict[str, RunFiles], found: dict[str, Estimate]) -> str:
    both = [runs[letter].record.held_out for letter in (best, other)]
    gap = found[best].mean - found[other].mean
    lead = f"It leads run {other} by {100 * gap:.1f} points"
    first, second = both
    if first is None or second is None or first.after is None or second.after is None:
        return f"{lead}."
    tokens = [(part.chosen_tokens, part.rejected_tokens, part.prompts) for part in (first, second)]
    if tokens[0] != tokens[1]:
        return f"{lead}, but the two hold out other examples, so the figures cannot be compared."
    right = [right_by(array_of(part.after.margins)) for part in (first, second) if part.after is not None]
    difference = estimate(right[0] - right[1], comparisons_in(first))
    if difference is None or not gap:
        return f"Run {other} has the same accuracy."
    if difference.is_clearly(0.0) == "above":
        return f"{lead} on the same comparisons (standard error {100 * difference.error:.1f}): a clear difference."
    return f"{lead} on the same comparisons (standard error {100 * difference.error:.1f}): it may be chance."


def _figures(runs: dict[str, RunFiles]) -> Table:
    columns = ["run", "name", "held-out accuracy", "held-out margin", "held-out loss", "training loss", "steps"]
    columns += ["time", "tokens/s", "trained parameters"]
    return Table("Final figures, ± standard error", columns, [_row(letter, run) for letter, run in runs.items()])


def _row(letter: str, run: RunFiles) -> list[str]:
    held_out = run.record.held_out

    def last(name: str, shown: Any, error: Estimate | None = None) -> str:
        series = run.series(name)
        if series is None:
            return ""
        value = run.final(series) if name.startswith("eval/") else series.last
        return shown(value) + (f" ± {shown(error.error)}" if error is not None and error.error > 0 else "")

    sittings = run.record.sittings
    speed = typical(run.series("train/tokens_per_second"))
    return [
        letter,
        run.name,
        last("eval/dpo_accuracy", percent, None if held_out is None else accuracy(held_out, held_out.after)),
        last("eval/rewards/margins", number, None if held_out is None else margin(held_out, held_out.after)),
        last("eval/loss", number),
        last("train/loss", number),
        f"{run.steps_done:,}" + ("" if run.num_steps in (None, run.steps_done) else f" of {run.num_steps:,}"),
        duration(sum(sitting.seconds for sitting in sittings)) if sittings else "",
        "" if speed is None else number(speed, 3),
        last("trainable_parameter_count", lambda x: f"{int(x):,}"),
    ]


def _differences(runs: dict[str, RunFiles]) -> Table:
    """The settings in which the runs differ."""
    settings = {letter: flat(run.settings) for letter, run in runs.items()}
    paths = dict.fromkeys(path for values in settings.values() for path in values)
    rows = []
    for path in paths:
        values = [of_run.get(path, "not set") for of_run in settings.values()]
        if len(set(values)) > 1 and path not in PLACES:
            rows.append([path, *values])
    return Table("Settings that differ", ["setting", *runs], rows)


def _curves(runs: dict[str, RunFiles]) -> list[Lines]:
    """One chart for each metric that a run has, of held-out examples before those of training."""
    metrics: dict[str, tuple[str, str]] = {}
    for title, unit, lines in (*CURVES.values(), *SPEED.values()):
        for label, name, _, _ in lines:
            part = "" if label.lower() == title.lower() or len(lines) == 1 else f", {label}"
            metrics[name] = (f"{title}{part}", unit)
    ordered = sorted(metrics, key=lambda name: not name.startswith("eval/"))
    charts = []
    for at, name in enumerate(ordered):
        lines = [
            Line(letter, series, number_of_run, number_of_run)
            for number_of_run, (letter, run) in enumerate(runs.items())
            if (series := run.series(name)) is not None and np.isfinite(series.values).any()
        ]
        if lines:
            title, unit = metrics[name]
            charts.append(lines_chart(f"chart{at}", title, lines, unit))
    return charts
