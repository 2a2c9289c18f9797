"""Pictures as SVG in two palettes, for light and for dark pages, with text that stays text.

A `Canvas` names colours by their role; `Canvas.svg(palette)` looks them up. A title and a description are for those who
hear a page read.
"""

from html import escape

# Text of either palette has a contrast of at least 4.5 on its page and on the fills that it stands on.
LIGHT = {
    "ink": "#1f2328",
    "muted": "#57606a",
    "rule": "#c9d1d9",
    "panel": "#f3f5f8",
    "prompt": "#cfe0fa",
    "prompt_edge": "#2f62ad",
    "chosen": "#c8ecd3",
    "chosen_edge": "#1f7a43",
    "rejected": "#fbd9cd",
    "rejected_edge": "#b1452a",
    "pad": "#e7eaee",
    "ours": "#3f51b5",
    "theirs": "#8b95a5",
    "line_1": "#0072b2",
    "line_2": "#c14f00",
    "line_3": "#00805d",
    "line_4": "#a8487f",
    "line_5": "#1f2328",
}
DARK = {
    "ink": "#e8ecf2",
    "muted": "#a9b2c0",
    "rule": "#454d5c",
    "panel": "#2a303c",
    "prompt": "#1f3e6e",
    "prompt_edge": "#8db8f5",
    "chosen": "#17492c",
    "chosen_edge": "#74d197",
    "rejected": "#5b2a1c",
    "rejected_edge": "#f6a58b",
    "pad": "#343b47",
    "ours": "#8c9eff",
    "theirs": "#6f7a8b",
    "line_1": "#56b4e9",
    "line_2": "#f58a3c",
    "line_3": "#3fcf9f",
    "line_4": "#e79cc6",
    "line_5": "#e8ecf2",
}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


class Canvas:
    """Shapes on a page of `width` x `height` pixels; x to the right, y down."""

    def __init__(self, width: float, height: float, title: str, description: str):
        self.size = (width, height)
        self.words = (title, description)
        self._shapes: list[tuple[str, dict[str, str], str | None]] = []

    def rect(self, x, y, width, height, fill="none", edge="none", *, radius=3.0, dashed=False) -> None:
        self._add("rect", x=x, y=y, width=width, height=height, fill=fill, stroke=edge, rx=radius, dash=dashed)

    def line(self, x1, y1, x2, y2, edge="rule", *, width=1.0, dashed=False) -> None:
        self._add("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=edge, stroke_width=width, dash=dashed)

    def polyline(self, points, edge: str, *, width=2.0) -> None:
        places = " ".join(f"{_number(x)},{_number(y)}" for x, y in points)
        self._add("polyline", points=places, fill="none", stroke=edge, stroke_width=width, stroke_linejoin="round")

    def dot(self, x, y, radius, fill: str) -> None:
        self._add("circle", cx=x, cy=y, r=radius, fill=fill)

    def arrow(self, points, edge="muted") -> None:
        """A line through `points`, horizontal or vertical at its end, where its head is."""
        self.polyline(points, edge, width=1.5)
        (x0, y0), (x, y) = points[-2:]
        step_x, step_y = (5 * _sign(x - x0), 0) if y == y0 else (0, 5 * _sign(y - y0))
        side_x, side_y = (0, 4) if y == y0 else (4, 0)
        head = [(x - step_x - side_x, y - step_y - side_y), (x, y), (x - step_x + side_x, y - step_y + side_y)]
        self.polyline(head, edge, width=1.5)

    def text(self, x, y, words: str, fill="ink", *, size=13.0, anchor="start", weight=400, mono=False) -> None:
        """`y` is that of the line that letters stand on."""
        family = {"font_family": MONO} if mono else {}
        self._add("text", words, x=x, y=y, fill=fill, font_size=size, text_anchor=anchor, font_weight=weight, **family)

    def svg(self, palette: dict[str, str]) -> str:
        width, height = self.size
        title, description = self.words
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_number(width)} {_number(height)}" '
            f'width="{_number(width)}" height="{_number(height)}" role="img" aria-labelledby="title description" '
            f'font-family="{FONT}">'
        )
        body = [_element(name, given, words, palette) for name, given, words in self._shapes]
        titles = [f'<title id="title">{escape(title)}</title>', f'<desc id="description">{escape(description)}</desc>']
        return "\n".join([head, *titles, *body, "</svg>", ""])

    def _add(self, name: str, words: str | None = None, *, dash=False, **given) -> None:
        if dash:
            given["stroke_dasharray"] = "4 3"
        self._shapes.append((name, {key.replace("_", "-"): _value(value) for key, value in given.items()}, words))


_USUAL = {"text-anchor": "start", "font-weight": "400", "fill": None, "stroke": "none"}


def _element(name: str, given: dict[str, str], words: str | None, palette: dict[str, str]) -> str:
    """Attributes that have their usual value are left out."""
    shown = {k: palette.get(v, v) if k in ("fill", "stroke") else v for k, v in given.items() if _USUAL.get(k) != v}
    attributes = "".join(f' {key}="{value}"' for key, value in shown.items())
    return f"<{name}{attributes}/>" if words is None else f"<{name}{attributes}>{escape(words)}</{name}>"


def _value(value) -> str:
    return value if isinstance(value, str) else _number(value)


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
