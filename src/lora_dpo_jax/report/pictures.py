"""Draws charts by matplotlib, as SVG to stand inside a page: its colours are the page's, its texts are text.

The same chart gives the same SVG, byte by byte.
"""

import io
import logging
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from lora_dpo_jax.report.charts import Bars, Chart, Histogram, Lines, number

HOW_TO_INSTALL = "pip install 'lora_dpo_jax[report]'"

SIZE = (3.9, 2.5)  # inches; a page shows 72 units of the picture for each
INK, FAINT = "#010101", "#020202"  # of texts and axes, and of lines behind the data
COLOURS = ["#0a0a01", "#0a0a02", "#0a0a03", "#0a0a04", "#0a0a05", "#0a0a06"]
# What stands in the page for each colour. No chart uses these colours themselves.
IN_THE_PAGE = {INK: "currentColor", FAINT: "var(--faint)"} | {c: f"var(--c{i})" for i, c in enumerate(COLOURS)}
DASHES: list[Any] = ["-", (0, (4, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (7, 2)), (0, (2, 2))]
MARKS = ["", "o", "", "s", "^", "D"]

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lora_dpo_jax",
    "font.family": "sans-serif",
    "font.size": 8.5,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-4, 6),
    "axes.unicode_minus": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "hatch.linewidth": 0.8,
}


def can_draw() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def picture(chart: Chart, prefix: str) -> Markup:
    """The chart as an <svg> element. `prefix` begins all ids in it. Raises ImportError without matplotlib."""
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it logs that it looks for fonts
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        DRAWN[type(chart)](axes, chart)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inside_a_page(file.getvalue(), chart, prefix)


def _lines(axes: Any, chart: Lines) -> None:
    for line in chart.lines:
        series, few = line.series, len(line.series) <= 20
        axes.plot(
            series.steps,
            series.values,
            label=line.label,
            color=COLOURS[line.colour % len(COLOURS)],
            linestyle=DASHES[line.dash % len(DASHES)],
            marker=(MARKS[line.dash % len(MARKS)] if few else "") or ("o" if len(series) == 1 else ""),
            markersize=3.5,
        )
    if chart.level is not None:
        label, value = chart.level
        axes.axhline(value, color=INK, linewidth=0.9, linestyle=(0, (1, 2)), label=label)
    axes.set(xlabel="step", ylabel=chart.y_label)
    if chart.is_share:
        _percent(axes.yaxis)
    _few_ticks(axes.xaxis, integer=True)
    if len(chart.lines) > 1 or chart.level is not None:
        _legend(axes, len(chart.lines))


def _histogram(axes: Any, chart: Histogram) -> None:
    axes.stairs(chart.after, chart.edges, fill=True, color=COLOURS[0], alpha=0.75, label="after", linewidth=1)
    if chart.before is not None:
        axes.stairs(chart.before, chart.edges, color=COLOURS[1], linestyle=DASHES[1], linewidth=1.5, label="before")
    if chart.at is not None:
        label = f"before: all {number(chart.at)}"
        axes.axvline(chart.at, color=COLOURS[1], linestyle=DASHES[1], linewidth=1.5, label=label)
    if chart.at != 0:
        axes.axvline(0, color=INK, linewidth=0.9)
    axes.set(xlabel=chart.y_label, ylabel="comparisons")
    _few_ticks(axes.xaxis)
    _legend(axes, 2)


def _bars(axes: Any, chart: Bars) -> None:
    at = np.arange(len(chart.groups))
    errors = [0.0 if math.isnan(error) else error for error in chart.errors]
    axes.bar(at, chart.after, width=0.6, color=COLOURS[0], alpha=0.75, label="after, ± standard error")
    axes.errorbar(at, chart.after, yerr=errors, fmt="none", ecolor=INK, elinewidth=1, capsize=3)
    if any(math.isfinite(value) for value in chart.before):
        axes.plot(at, chart.before, color=COLOURS[1], marker="D", markersize=4, linestyle="", label="before")
    axes.set_xticks(at, [group.replace(" to ", "\nto ") for group in chart.groups])
    axes.set(ylim=(0, 1.05), xlabel="chosen tokens less rejected tokens")
    axes.grid(axis="x", visible=False)
    _percent(axes.yaxis)
    _legend(axes, 2)


DRAWN: dict[type[Chart], Callable[[Any, Any], None]] = {Lines: _lines, Histogram: _histogram, Bars: _bars}


def _legend(axes: Any, lines: int) -> None:
    # Above the picture, where it hides no data.
    columns = 2 if lines > 1 else 1
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, handlelength=2.4)


def _percent(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=None))


def _few_ticks(axis: Any, *, integer: bool = False) -> None:
    """So few that their texts have room."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=5, integer=integer))


def _inside_a_page(svg: str, chart: Chart, prefix: str) -> Markup:
    """Without what only a file of its own needs; with ids that no other picture has, a title and a description."""
    body = svg[svg.index("<svg") :]
    view_box = re.search(r'viewBox="([\d. ]+)"', body)
    body = re.sub(r"^<svg[^>]*>|</svg>\s*$|<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]+"', "<g", body)  # nothing refers to groups
    body = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', body)
    body = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{prefix}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", body)
    body = re.sub(r"#0[0-9a-f]{5}\b", lambda found: IN_THE_PAGE.get(found[0], found[0]), body)
    body = re.sub(r"font-family: [^;\"]*; ", "", body)
    body = re.sub(r"\n\s*", "\n", body).strip()
    size = view_box[1] if view_box else f"0 0 {72 * SIZE[0]:g} {72 * SIZE[1]:g}"
    return Markup(
        f'<svg viewBox="{size}" role="img" aria-labelledby="{prefix}-title" aria-describedby="{prefix}-words">'
        f'<title id="{prefix}-title">{escape(chart.title)}</title>'
        f'<desc id="{prefix}-words">{escape(chart.words)}</desc>\n{body}\n</svg>'
    )
