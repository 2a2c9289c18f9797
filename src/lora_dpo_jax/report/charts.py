"""Charts as data, with what they show in words and as a table. pictures.py draws them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lora_dpo_jax.accuracy import ERROR, GROUPS, LONGER, REFERENCE
from lora_dpo_jax.report.record import HeldOut, array_of
from lora_dpo_jax.report.run_files import RunFiles, Series
from lora_dpo_jax.report.statistics import comparisons_in, estimate, right_by

MOST_POINTS = 240  # of a line
MOST_ROWS = 12  # of a table of numbers
BINS = 24  # of a histogram
LENGTH_BINS = 5


@dataclass(frozen=True)
class Line:
    """`colour` and `dash` are numbers of styles; lines that differ in both are told apart without colours too."""

    label: str
    series: Series
    colour: int = 0
    dash: int = 0


@dataclass(frozen=True)
class Table:
    """A table of texts. The first text of a row is its heading."""

    caption: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Chart:
    """A picture, its title, what it shows in words, and its numbers."""

    key: str  # for ids of the page
    title: str
    words: str
    table: Table
    y_label: str = ""


@dataclass(frozen=True)
class Lines(Chart):
    """Metrics over steps."""

    lines: list[Line] = field(default_factory=list)
    level: tuple[str, float] | None = None  # a line across the picture, with its label
    is_share: bool = False


@dataclass(frozen=True)
class Histogram(Chart):
    """How many values lie in each bin, before (may be None) and after training. `at`: where all are before it."""

    edges: np.ndarray = field(default_factory=lambda: np.zeros(0))
    before: np.ndarray | None = None
    at: float | None = None
    after: np.ndarray = field(default_factory=lambda: np.zeros(0))


@dataclass(frozen=True)
class Bars(Chart):
    """Shares by group, with standard errors, before (may be NaN) and after training."""

    groups: list[str] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)


def number(value: float | None, digits: int = 4) -> str:
    """A number for people: as many significant digits, or four places after the point."""
    if value is None or not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e7:
        return f"{value:.{digits - 1}g}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{min(places, digits)}f}"
    return text


def percent(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.1%}"


# Title, what its unit is, and its lines: (label, metric, colour, dash).
CURVES: dict[str, tuple[str, str, list[tuple[str, str, int, int]]]] = {
    "loss": ("Loss", "", [("training", "train/loss", 0, 0), ("held out", "eval/loss", 1, 1)]),
    "accuracy": (
        "Accuracy",
        "share",
        [("training", "train/dpo_accuracy", 0, 0), ("held out", "eval/dpo_accuracy", 1, 1)],
    ),
    "margin": (
        "Reward margin",
        "reward",
        [("training", "train/rewards/margins", 0, 0), ("held out", "eval/rewards/margins", 1, 1)],
    ),
    "rewards": (
        "Rewards",
        "reward",
        [
            ("chosen, training", "train/rewards/chosen", 0, 0),
            ("chosen, held out", "eval/rewards/chosen", 0, 1),
            ("rejected, training", "train/rewards/rejected", 1, 2),
            ("rejected, held out", "eval/rewards/rejected", 1, 3),
        ],
    ),
    "logps": (
        "Log-probabilities of responses",
        "nats",
        [
            ("chosen, training", "train/logps/chosen", 0, 0),
            ("chosen, held out", "eval/logps/chosen", 0, 1),
            ("rejected, training", "train/logps/rejected", 1, 2),
            ("rejected, held out", "eval/logps/rejected", 1, 3),
        ],
    ),
    "learning_rate": ("Learning rate", "", [("learning rate", "train/learning_rate", 0, 0)]),
    "grad_norm": ("Gradient norm", "", [("gradient norm", "train/grad_norm", 0, 0)]),
}
SPEED: dict[str, tuple[str, str, list[tuple[str, str, int, int]]]] = {
    "tokens_per_second": ("Tokens per second", "", [("tokens per second", "train/tokens_per_second", 0, 0)]),
    "padding": ("Padding", "share", [("padding", "train/padding_fraction", 0, 0)]),
    "mfu": ("Use of the devices' peak (MFU)", "share", [("MFU", "train/mfu", 0, 0)]),
}
BY_LENGTH: dict[str, tuple[str, str, list[tuple[str, str, int, int]]]] = {
    "by_length": (
        "Held-out accuracy by which response is longer",
        "share",
        [
            (group.replace("_", " "), f"eval/{group}/dpo_accuracy", style, style + 1)
            for style, group in enumerate(GROUPS)
        ],
    ),
}
# Metrics that stand in other charts, or in none because another one has the same numbers.
TAKEN = {metric for kind in (CURVES, SPEED, BY_LENGTH) for _, _, lines in kind.values() for _, metric, _, _ in lines}
SAME = ("dpo_chosen_reward", "dpo_rejected_reward", "rewards/accuracies", "skipped_steps", "pairs_per_second")
SAME += ("answers_per_second", "examples_per_second")


def curves(run: RunFiles, kind: Mapping[str, tuple[str, str, list[tuple[str, str, int, int]]]]) -> list[Lines]:
    """The charts of `kind` (CURVES or SPEED) for which the run has metrics."""
    found = []
    for key, (title, unit, metrics) in kind.items():
        lines = [
            Line(label, series, colour, dash)
            for label, name, colour, dash in metrics
            if (series := run.series(name)) is not None
        ]
        if lines:
            found.append(lines_chart(key, title, lines, unit))
    longer = run.series(f"eval/{LONGER}")
    if longer is None:
        return found
    level = ("choosing the longer response", longer.last)
    return [dataclasses.replace(chart, level=level) if chart.key == "accuracy" else chart for chart in found]


def other_curves(run: RunFiles) -> list[Lines]:
    """The charts of all other metrics: those of training and of held-out examples together."""
    loss_of_type = f"{run.setting('loss.type')}_loss", "dpo_loss"
    names = dict.fromkeys(
        name.partition("/")[2]
        for name in run.names
        if name.startswith(("train/", "eval/")) and name not in TAKEN and not _is_in_a_table(name)
    )
    found = []
    for at, name in enumerate(name for name in names if name not in (*SAME, *loss_of_type)):
        lines = [
            Line(label, series, at_style, at_style)
            for at_style, (label, part) in enumerate((("training", "train"), ("held out", "eval")))
            if (series := run.series(f"{part}/{name}")) is not None
        ]
        found.append(lines_chart(f"other{at}", name, lines))
    return found


def _is_in_a_table(name: str) -> bool:
    """Whether a metric is a standard error, that of a group by length, or a baseline."""
    parts = name.split("/")
    return name.endswith(ERROR) or parts[1] in GROUPS or f"{parts[1]}/{parts[-1]}" in (LONGER, REFERENCE)


def lines_chart(key: str, title: str, lines: list[Line], unit: str = "") -> Lines:
    binned = [Line(line.label, line.series.binned(MOST_POINTS), line.colour, line.dash) for line in lines]
    is_share = unit == "share"
    words = " ".join(_in_words(line, is_share) for line in lines)
    return Lines(
        key, title, words, _table_of(title, lines, is_share), "" if is_share else unit, binned, is_share=is_share
    )


def _in_words(line: Line, is_share: bool) -> str:
    shown = percent if is_share else number
    series = line.series
    label = line.label[:1].upper() + line.label[1:]
    if len(series) == 1:
        return f"{label}: {shown(series.last)} at step {series.steps[0]:,}."
    text = f"{label}: from {shown(series.values[0])} at step {series.steps[0]:,} to {shown(series.last)} at step "
    text += f"{series.steps[-1]:,}"
    if np.isfinite(series.values).any():
        low, high = np.nanargmin(series.values), np.nanargmax(series.values)
        text += f"; lowest {shown(series.values[low])} at step {series.steps[low]:,}"
        text += f", highest {shown(series.values[high])} at step {series.steps[high]:,}"
    return f"{text}."


def _table_of(title: str, lines: Sequence[Line], is_share: bool) -> Table:
    """The numbers at up to MOST_ROWS steps; of the line with the most points if the lines differ, and all its ends."""
    shown = percent if is_share else number
    at = [dict(zip(line.series.steps.tolist(), line.series.values.tolist(), strict=True)) for line in lines]
    few = min(at, key=len)
    steps = sorted({step for values in at for step in values})
    if len(steps) > MOST_ROWS:  # all of the line with few points, if they are few, and an even choice of the others
        even = {steps[round(i)] for i in np.linspace(0, len(steps) - 1, MOST_ROWS)}
        steps = sorted(even | (set(few) if len(few) <= MOST_ROWS else set()))
    rows = [[f"{step:,}", *(shown(values[step]) if step in values else "" for values in at)] for step in steps]
    return Table(f"{title} by step", ["step", *(line.label for line in lines)], rows)


def held_out_charts(held_out: HeldOut) -> list[Chart]:
    """Margins and accuracy by length, as far as they are known."""
    found = [margin_histogram(held_out), difference_histogram(held_out), by_length(held_out)]
    return [chart for chart in found if chart is not None]


def margin_histogram(held_out: HeldOut) -> Histogram | None:
    """Of the reward margins."""
    if held_out.after is None and held_out.before is None:
        return None
    before = None if held_out.before is None else array_of(held_out.before.margins)
    after = before if held_out.after is None else array_of(held_out.after.margins)
    assert after is not None
    before = None if held_out.after is None else before
    return _histogram("margins", "Reward margins", "reward margin", before, after)


def difference_histogram(held_out: HeldOut) -> Histogram | None:
    """Of log p(chosen) - log p(rejected) of the policy."""
    if held_out.after is None:
        return None
    before = held_out.reference or (held_out.before.differences if held_out.before else None)
    before = None if before is None else array_of(before)
    title = "Log-probability of the chosen response less that of the rejected one"
    return _histogram("differences", title, "nats", before, array_of(held_out.after.differences))


def _histogram(key: str, title: str, unit: str, before: np.ndarray | None, after: np.ndarray) -> Histogram:
    parts = [x[np.isfinite(x)] for x in (after, before) if x is not None]
    at = None
    if before is not None and len(parts[1]) and (parts[1] == parts[1][0]).all():
        at, before = float(parts[1][0]), None
    values = np.concatenate(parts)
    low, high = (float(np.quantile(values, q)) for q in (0.005, 0.995)) if len(values) else (0.0, 0.0)
    if high - low < 1e-6:
        low, high = low - 0.5, high + 0.5
    width = (high - low) / BINS
    first = math.floor(low / width)  # so that 0 is an edge
    edges = width * np.arange(first, math.ceil(high / width) + 1)
    # What lies beyond the edges counts in the outermost bins.
    counts = [np.histogram(np.clip(x, edges[0], edges[-1]), edges)[0] for x in parts]
    of_before = counts[1] if before is not None else None
    words = f"After training: {_spread(parts[0])}"
    words += f" Before training: {_spread(parts[1])}" if len(parts) > 1 else ""
    rows = [[name, *_quantiles(x)] for name, x in zip(("after training", "before training"), parts, strict=False)]
    columns = ["", "comparisons", "lowest", "quarter below", "middle", "quarter above", "highest", "mean", "below 0"]
    return Histogram(key, title, words, Table(title, columns, rows), unit, edges, of_before, at, counts[0])


def _spread(values: np.ndarray) -> str:
    if not len(values):
        return "no finite value."
    if (values == values[0]).all():
        return f"all {len(values):,} are {number(values[0])}."
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return (
        f"half of {len(values):,} values lie between {number(low, 3)} and {number(high, 3)}, the middle one is "
        f"{number(middle, 3)}, and {(values < 0).sum():,} are below 0."
    )


def _quantiles(values: np.ndarray) -> list[str]:
    if not len(values):
        return ["0", *[""] * 7]
    quantiles = [number(x, 3) for x in np.quantile(values, (0, 0.25, 0.5, 0.75, 1))]
    return [f"{len(values):,}", *quantiles, number(values.mean()), f"{(values < 0).sum():,}"]


def _signed(tokens: int) -> str:
    return f"{tokens:+,}" if tokens else "0"


def by_length(held_out: HeldOut) -> Bars | None:
    """Accuracy in groups of the chosen response's tokens less those of the rejected one."""
    if held_out.after is None:
        return None
    comparisons = comparisons_in(held_out)
    longer = comparisons.excess
    after = right_by(array_of(held_out.after.margins))
    before = None if held_out.before is None else right_by(array_of(held_out.before.margins))
    bounds = np.unique(np.quantile(longer, np.linspace(0, 1, LENGTH_BINS + 1)).round().astype(int))
    if len(bounds) == 1:
        bounds = np.array([bounds[0], bounds[0]])
    groups, rows, of_before, of_after, errors = [], [], [], [], []
    for at, (low, high) in enumerate(zip(bounds, bounds[1:], strict=False)):
        first = low if at == 0 else low + 1
        where = (longer >= first) & (longer <= high)
        found = estimate(after, comparisons, where)
        if found is None:
            continue
        earlier = None if before is None else estimate(before, comparisons, where)
        groups.append(_signed(first) if first == high else f"{_signed(first)} to {_signed(high)}")
        of_after.append(found.mean)
        errors.append(found.error)
        of_before.append(math.nan if earlier is None else earlier.mean)
        shown = "unknown" if earlier is None else percent(earlier.mean)
        error = f" ±\u00a0{percent(found.error)}" if found.error > 0 else ""
        rows.append([groups[-1], f"{found.count:,}", shown, f"{percent(found.mean)}{error}"])
    title = "Accuracy by how much longer the chosen response is"
    columns = ["tokens longer", "count", "before", "after ±\u00a0standard error"]
    words = "; ".join(f"{row[0]} tokens: {row[3]} of {row[1]}" for row in rows) + "."
    table = Table(title, columns, rows)
    return Bars("lengths", title, words, table, "", groups, of_before, of_after, errors)
