"""Charts of measured figures, narrow enough to be read on a phone: bars, lines, and dots of several seeds."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.svg import Canvas

WIDTH = 400.0
LEFT = 8.0


@dataclass(frozen=True)
class Bar:
    """One bar with its name above it, and what is said of it at the right."""

    name: str
    value: float
    words: str
    ours: bool = False


def bars(title: str, description: str, groups: Sequence[tuple[str, Sequence[Bar]]]) -> Canvas:
    """Groups of horizontal bars. Each group has a scale of its own, from zero to its largest value."""
    height = 40 + sum(34 + 38 * len(group) for _, group in groups)
    canvas = Canvas(WIDTH, height, title, description)
    canvas.text(LEFT, 22, title, size=15, weight=700)
    y = 40.0
    for heading, group in groups:
        canvas.text(LEFT, y + 14, heading, "muted", size=12.5, weight=600)
        y += 26
        largest = max(bar.value for bar in group)
        for bar in group:
            canvas.text(LEFT, y + 12, bar.name, size=12.5, weight=600 if bar.ours else 400)
            canvas.text(WIDTH - LEFT, y + 12, bar.words, size=12.5, anchor="end", weight=600 if bar.ours else 400)
            length = max(2.0, (WIDTH - 2 * LEFT) * bar.value / largest)
            canvas.rect(LEFT, y + 17, length, 12, "ours" if bar.ours else "theirs", radius=2)
            y += 38
        y += 8
    return canvas


@dataclass(frozen=True)
class Line:
    """A curve of points (x, y), named at its right end."""

    name: str
    points: Sequence[tuple[float, float]]


def lines(title: str, description: str, x_words: str, y_words: str, curves: Sequence[Line]) -> Canvas:
    """Curves over common axes. Each has a colour and its name at its end."""
    canvas = Canvas(WIDTH, 300, title, description)
    canvas.text(LEFT, 22, title, size=15, weight=700)
    canvas.text(LEFT, 42, y_words, "muted", size=12)
    scale = _Scale.over([point for curve in curves for point in curve.points])
    for value in scale.y_ticks:
        y = scale.y(value)
        canvas.line(scale.left, y, scale.right, y, "muted" if value == 0 else "rule")
        canvas.text(scale.left - 6, y + 4, f"{value:g}", "muted", size=12, anchor="end")
    for value in scale.x_ticks:
        canvas.text(scale.x(value), scale.bottom + 18, f"{value:g}", "muted", size=12, anchor="middle")
    canvas.text(scale.right, scale.bottom + 36, x_words, "muted", size=12, anchor="end")
    ends = _apart([scale.y(curve.points[-1][1]) for curve in curves], 15.0)
    for number, (curve, end) in enumerate(zip(curves, ends, strict=True), start=1):
        places = [(scale.x(x), scale.y(y)) for x, y in curve.points]
        canvas.polyline(places, f"line_{number}")
        for place in places[:: max(1, len(places) // 5)]:
            canvas.dot(*place, 2.5, f"line_{number}")
        canvas.text(scale.right + 8, end + 4, curve.name, f"line_{number}", size=12.5, weight=600)
    return canvas


def dots(title: str, description: str, x_words: str, rows: Sequence[tuple[str, Sequence[float]]]) -> Canvas:
    """A line for each name, with a dot for each of its values, in percent; from the lowest ten to 100."""
    canvas = Canvas(WIDTH, 84 + 20 * len(rows), title, description)
    canvas.text(LEFT, 22, title, size=15, weight=700)
    canvas.text(LEFT, 42, x_words, "muted", size=12)
    lowest = 10 * (min(min(values) for _, values in rows) // 10)
    left, right, top = 140.0, WIDTH - 20, 60.0
    bottom = top + 20 * len(rows)

    def x(value: float) -> float:
        return left + (right - left) * (value - lowest) / (100 - lowest)

    for tick in range(int(lowest), 101, 5):
        canvas.line(x(tick), top - 6, x(tick), bottom)
        canvas.text(x(tick), bottom + 16, f"{tick}%", "muted", size=12, anchor="middle")
    for number, (name, values) in enumerate(rows):
        y = top + 20 * number + 8
        canvas.text(left - 8, y + 4, name, size=12, anchor="end", mono=True)
        canvas.line(x(min(values)), y, x(max(values)), y, "ours", width=2)
        for value in values:
            canvas.dot(x(value), y, 3.5, "ours")
    return canvas


@dataclass(frozen=True)
class _Scale:
    """From values to places of a chart of lines."""

    x_ticks: tuple[float, ...]
    y_ticks: tuple[float, ...]
    left: float = 44.0
    right: float = WIDTH - 88
    top: float = 58.0
    bottom: float = 252.0

    @classmethod
    def over(cls, points: Sequence[tuple[float, float]]) -> "_Scale":
        xs, ys = zip(*points, strict=True)
        return cls(_ticks(min(xs), max(xs)), _ticks(min(ys), max(ys)))

    def x(self, value: float) -> float:
        first, last = self.x_ticks[0], self.x_ticks[-1]
        return self.left + (self.right - self.left) * (value - first) / (last - first)

    def y(self, value: float) -> float:
        first, last = self.y_ticks[0], self.y_ticks[-1]
        return self.bottom - (self.bottom - self.top) * (value - first) / (last - first)


def _ticks(lowest: float, highest: float) -> tuple[float, ...]:
    """Four to eight round numbers that enclose both."""
    steps = (m * 10.0**e for e in range(-3, 6) for m in (1, 2, 2.5, 5))
    step = next(step for step in steps if (highest - lowest) / step <= 6)
    first, last = int(lowest // step), -int(-highest // step)
    return tuple(round(n * step, 6) for n in range(first, last + 1))


def _apart(places: Sequence[float], least: float) -> list[float]:
    """The places, moved down where they are nearer than `least` to the one above."""
    moved = list(places)
    order = sorted(range(len(places)), key=lambda i: places[i])
    for above, below in zip(order, order[1:], strict=False):
        moved[below] = max(moved[below], moved[above] + least)
    return moved
