"""Values that nobody means, for the keys of files and for settings; and how whoever meets them must end."""

import contextlib
import io
import random
from collections.abc import Callable, Iterator
from typing import Any

from lora_dpo_jax.main.errors import TRACEBACK, told_in_a_line

NAN, INFINITY = float("nan"), float("inf")
# One of every kind that JSON and YAML have, and the edges of each.
OF_ANY_KIND: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, -(2**63), 10**30, 0.0, 0.5, -0.5, 1e-300, 1e308, NAN, INFINITY, -INFINITY),
    *("", " ", "x", "1", "1e-3", "nan", "null", "../..", "\x00\x1b[31m", "a\nb", "é" * 300),
    *([], [None], [1, "x"], [[[]]], {}, {"x": None}, {"": {"": []}}),
)


def hostile_values(right: Any, *, seed: int = 0, more: int = 4) -> list[Any]:
    """Of every kind, near to `right`, within it, and `more` that chance has made; the same for the same seed."""
    rng = random.Random(f"{seed} {right!r}")
    return [*OF_ANY_KIND, *_near(right), *_within(right, rng), *(_any(rng, depth=3) for _ in range(more))]


def how_it_ends(function: Callable[[], Any]) -> str | None:
    """The line that a user reads, or None if all went well. A trace, that is any other error, goes on to the test."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), told_in_a_line():
            function()
    except SystemExit as ended:
        line, hint = said.getvalue().splitlines()
        assert ended.code == 1 and line.startswith("error: ") and TRACEBACK in hint
        return line
    return None


def _near(right: Any) -> Iterator[Any]:
    """Of `right`'s own kind, or the same thing spelled in another."""
    yield from (str(right), [right], {"value": right})
    if isinstance(right, bool):
        yield from (not right, int(right))
    elif isinstance(right, int | float):
        yield from (-right, right + 1, right * 1000, float(right), int(right))
    elif isinstance(right, str):
        yield from (right.upper(), right + " ", right + "\x00", right * 100)
    elif isinstance(right, list):
        yield from (right + right, right[:-1], dict.fromkeys(map(str, right)))
    elif isinstance(right, dict):
        yield from ([*right.items()], {**right, "unknown": 1})


def _within(right: Any, rng: random.Random) -> Iterator[Any]:
    """`right` with one of its parts taken out, or replaced."""
    parts = range(len(right)) if isinstance(right, list) else [*right] if isinstance(right, dict) else []
    for part in parts:
        for value in (None, NAN, -1, 0, "x", [], {}, rng.choice(OF_ANY_KIND)):
            changed = right.copy()
            changed[part] = value
            yield changed
        yield [item for i, item in enumerate(right) if i != part] if isinstance(right, list) else _without(right, part)


def _without(right: dict, part: Any) -> dict:
    return {key: value for key, value in right.items() if key != part}


def _any(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(6 if depth else 4)
    if kind == 0:
        return rng.choice(OF_ANY_KIND)
    if kind == 1:
        return rng.randint(-(10 ** rng.randint(1, 20)), 10 ** rng.randint(1, 20))
    if kind == 2:
        return rng.gauss(0, 10.0 ** rng.randint(-5, 5))
    if kind == 3:
        return "".join(
            chr(rng.choice((rng.randrange(32), rng.randrange(32, 127), rng.randrange(160, 55000)))) for _ in "four"
        )
    items = [_any(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    return items if kind == 4 else {str(_any(rng, 0))[:20]: item for item in items}
