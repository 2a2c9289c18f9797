"""Which pairs share a row, and the few shapes of rows that a run compiles.

A step is computed in micro-batches, each of one of these shapes (`Layout`), as many of each as its pairs need. Shapes
differ so that what is left of a step after its long rows does not pay for another long one.
"""

import bisect
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from haliax import Axis

MICRO, ROW, POSITION, TARGET, PAIR = "micro", "row", "position", "target", "pair"

MAX_SHAPES = 3  # that a run compiles
WORTH_COMPILING = 0.02  # of all tokens computed: what another shape must save
LENGTH_MULTIPLE = 128  # tokens; blocks of attention divide rows
SHORTEST_ROW = 256  # tokens, unless all pairs are shorter
MICRO_BATCH_COST = 32  # what beginning another micro-batch costs, in tokens of a row
SAMPLED_PAIRS = 1024  # of the run, on which the shapes are chosen


@dataclass(frozen=True)
class Layout:
    """The shape of a batch. It changes no loss, no gradient and no order, only what is computed together."""

    micro_batches: int
    rows: int  # per micro-batch
    row_length: int  # tokens
    targets: int  # per row
    pairs: int  # per row

    def axes(self, *names: str) -> tuple[Axis, ...]:
        sizes = {
            MICRO: self.micro_batches,
            ROW: self.rows,
            POSITION: self.row_length,
            TARGET: self.targets,
            PAIR: self.pairs,
        }
        return tuple(Axis(name, sizes[name]) for name in (MICRO, ROW, *names))


@dataclass(frozen=True)
class RowShape:
    """Rows that are computed together."""

    rows: int
    length: int  # tokens

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True)
class PairLayout:
    """How the tokens of pairs are laid into rows; both are on unless one wants to compare."""

    packing: bool = True  # several pairs in a row
    share_prefix: bool = True  # the prompt of a pair once, for both responses

    def sizes(self, lengths: np.ndarray) -> np.ndarray:
        """Tokens of each pair, from int[n, 3] of prompt, chosen and rejected."""
        return lengths.sum(axis=1) + (0 if self.share_prefix else lengths[:, 0])

    def shortest_row(self, lengths: np.ndarray) -> int:
        """Tokens of a row that holds any of the pairs."""
        return round_up(int(self.sizes(lengths).max()), LENGTH_MULTIPLE)


@dataclass(frozen=True)
class RunLayout:
    """The layouts of the parts of a batch, from most tokens to fewest."""

    parts: tuple[Layout, ...]
    pair_layout: PairLayout = PairLayout()

    def plan(self, lengths: np.ndarray) -> list[list[list[int]]]:
        """For each part, its rows: indices of pairs, whose lengths int[n, 3] are given."""
        shapes = [RowShape(part.rows, part.row_length) for part in self.parts]
        return _plan_step(lengths, shapes, self.pair_layout)


def plan_rows(sizes: Sequence[int], row_length: int) -> list[list[int]]:
    """Lays items of these sizes (tokens) into rows: longest first, each into the fullest row that has room.

    Returns the items of each row. Deterministic. O(n log n).
    """
    if sizes and max(sizes) > row_length:
        raise ValueError(f"an item of {max(sizes)} tokens does not fit a row of {row_length}")
    return [row for row in _best_fit(sizes, [], row_length) or [] if row]


def plan_layout(
    batches: Sequence[np.ndarray],
    lengths: np.ndarray,
    *,
    row_multiple: int = 1,
    longest_row: int | None = None,
    pair_layout: PairLayout = PairLayout(),
    max_shapes: int = MAX_SHAPES,
) -> RunLayout:
    """A layout that holds each of `batches` (arrays of pair ids), so that one compiled step serves all.

    `lengths` int[n, 3] counts prompt, chosen and rejected tokens of every pair. A micro-batch has `row_multiple` rows,
    one for each group of devices that share rows. `longest_row` (tokens) bounds a row, and so the memory of a step; a
    row always holds the longest pair.
    """
    shapes = _choose_shapes(batches, lengths, row_multiple, longest_row, pair_layout, max_shapes)
    used: list[_Extent] = [_Extent() for _ in shapes]
    for ids in batches:
        for extent, shape, rows in zip(used, shapes, _plan_step(lengths[ids], shapes, pair_layout), strict=True):
            extent.include(shape, rows, lengths[ids])
    parts = [extent.layout(shape) for extent, shape in zip(used, shapes, strict=True) if extent.micro_batches]
    return RunLayout(tuple(parts), pair_layout)


@dataclass
class _Extent:
    """The most that any step has of a shape."""

    micro_batches: int = 0
    targets: int = 0  # per row
    pairs: int = 0

    def include(self, shape: RowShape, rows: list[list[int]], lengths: np.ndarray) -> None:
        self.micro_batches = max(self.micro_batches, -(-len(rows) // shape.rows))
        responses = lengths[:, 1:].sum(axis=1)
        for row in rows:
            self.targets = max(self.targets, int(responses[row].sum()))
            self.pairs = max(self.pairs, len(row))

    def layout(self, shape: RowShape) -> Layout:
        targets = round_up(self.targets, LENGTH_MULTIPLE)
        return Layout(self.micro_batches, shape.rows, shape.length, targets=targets, pairs=self.pairs)


def layout_of_rows(planned: Iterable[np.ndarray], lengths: np.ndarray, *, rows: int) -> Layout:
    """One micro-batch of rows that can be any of `planned` (arrays of pair ids)."""
    shape, extent = RowShape(rows, PairLayout().shortest_row(lengths)), _Extent(micro_batches=1)
    for row in planned:
        extent.include(shape, [list(range(len(row)))], lengths[row])
    return extent.layout(shape)


def _choose_shapes(batches, lengths, row_multiple, bound, pair_layout, max_shapes) -> Sequence[RowShape]:
    """The set of shapes, one of which holds any pair, that computes the fewest tokens on a sample of the steps."""
    sizes = pair_layout.sizes(lengths)
    totals = np.array([sizes[ids].sum() for ids in batches])
    sample = _sample(batches, lengths, totals)
    longest = pair_layout.shortest_row(lengths)
    candidates = _candidate_lengths(longest, totals / row_multiple, bound)
    candidates = [RowShape(row_multiple, length) for length in candidates]

    def cost(shapes: tuple[RowShape, ...]) -> float:
        planned = (_plan_step(step, shapes, pair_layout) for step in sample)
        return sum(
            -(-len(rows) // shape.rows) * shape.rows * (shape.length + MICRO_BATCH_COST)
            for step in planned
            for shape, rows in zip(shapes, step, strict=True)
        )

    chosen: tuple[RowShape, ...] = ()
    least = math.inf
    for count in range(1, max_shapes + 1):
        # Two are tried with each other; the third is what goes best with these.
        sets = itertools.combinations(candidates, count) if count < 3 else ((*chosen, c) for c in candidates)
        options = [_by_size(o) for o in sets if len(set(o)) == count and max(shape.length for shape in o) >= longest]
        costs = [cost(option) for option in options]
        if not costs or min(costs) > least * (1 - WORTH_COMPILING):
            break
        least = min(costs)
        chosen = options[costs.index(least)]
    return chosen


def _sample(batches: Sequence[np.ndarray], lengths: np.ndarray, totals: np.ndarray) -> list[np.ndarray]:
    """Lengths of the pairs of some steps: from the one with the fewest tokens to the one with the most."""
    count = min(len(batches), max(2, SAMPLED_PAIRS // len(batches[0])))
    order = np.argsort(totals, kind="stable")
    chosen = order[np.linspace(0, len(order) - 1, count).round().astype(int)]
    return [lengths[batches[i]] for i in chosen]


def _candidate_lengths(longest: int, totals: np.ndarray, bound: int | None) -> list[int]:
    """Tokens: the longest pair, what whole steps hold, and lengths evenly spread between a short row and these."""
    most = float(totals.max()) * 1.05 if bound is None else bound
    spread = SHORTEST_ROW * 2 ** np.arange(0, max(1.0, math.log2(max(most, longest) / SHORTEST_ROW)), 0.5)
    steps = np.quantile(totals, [0.25, 0.5, 0.75, 1.0]) * 1.03
    lengths = {round_up(math.ceil(length), LENGTH_MULTIPLE) for length in (*spread, *steps)}
    return sorted({longest} | {length for length in lengths if length <= max(most, longest)}, reverse=True)


def _by_size(shapes: tuple[RowShape, ...]) -> tuple[RowShape, ...]:
    return tuple(sorted(shapes, key=lambda shape: (-shape.tokens, -shape.length)))


def _plan_step(lengths: np.ndarray, shapes: Sequence[RowShape], pair_layout: PairLayout) -> list[list[list[int]]]:
    """The rows of each shape: of the ways tried, the first in order of tokens computed that holds all pairs."""
    sizes = pair_layout.sizes(lengths).tolist()
    if not pair_layout.packing:
        return _one_pair_a_row(sizes, shapes)
    for counts in _counts(sum(sizes), max(sizes), shapes):
        capacities = [s.length for s, count in zip(shapes, counts, strict=True) for _ in range(count * s.rows)]
        rows = _best_fit(sizes, capacities)
        if rows is not None:
            ends = np.cumsum([0, *(count * s.rows for s, count in zip(shapes, counts, strict=True))])
            return [[row for row in rows[a:b] if row] for a, b in itertools.pairwise(ends)]
    raise AssertionError("the last counts tried hold anything")


def _counts(total: int, longest: int, shapes: Sequence[RowShape]) -> Iterator[tuple[int, ...]]:
    """Numbers of micro-batches of each shape that might hold `total` tokens, fewest tokens first; then ever more."""
    main = shapes[0].tokens
    tried: list[tuple[int, ...]] = []
    for first in range(max(0, total // main - 1), total // main + 2):
        tried += [(first, *rest) for rest in _rest(total - first * main, shapes[1:])]

    def tokens(counts: tuple[int, ...]) -> int:
        return sum(count * shape.tokens for count, shape in zip(counts, shapes, strict=True))

    def holds_longest(counts: tuple[int, ...]) -> bool:
        return any(count and shape.length >= longest for count, shape in zip(counts, shapes, strict=True))

    yield from sorted({c for c in tried if tokens(c) >= total and holds_longest(c)}, key=lambda c: (tokens(c), sum(c)))
    widest = max(range(len(shapes)), key=lambda i: shapes[i].length)
    for more in itertools.count(1):
        yield tuple(total // main * (i == 0) + more * (i == widest) for i in range(len(shapes)))


def _rest(total: int, shapes: Sequence[RowShape]) -> Iterator[tuple[int, ...]]:
    if not shapes:
        yield ()
        return
    needed = max(0, -(-total // shapes[0].tokens))
    for count in range(needed + 2):
        yield from ((count, *rest) for rest in _rest(total - count * shapes[0].tokens, shapes[1:]))


def _one_pair_a_row(sizes: list[int], shapes: Sequence[RowShape]) -> list[list[list[int]]]:
    """Each pair in the shortest row that holds it."""
    rows: list[list[list[int]]] = [[] for _ in shapes]
    for item, size in enumerate(sizes):
        fitting = [i for i, shape in enumerate(shapes) if shape.length >= size]
        rows[min(fitting, key=lambda i: shapes[i].length)].append([item])
    return rows


def _best_fit(sizes: Sequence[int], capacities: Sequence[int], more: int | None = None) -> list[list[int]] | None:
    """Items, longest first, each into the row with the least room that holds it.

    Returns the items of each row of `capacities`, and of further rows of length `more` if that is given; else None if
    they do not fit.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    rows: list[list[int]] = [[] for _ in capacities]
    free = sorted((capacity, row) for row, capacity in enumerate(capacities))  # (free tokens, row)
    for item in order:
        size = sizes[item]
        place = bisect.bisect_left(free, (size, -1))
        if place < len(free):
            room, row = free.pop(place)
        elif more is not None:
            room, row = more, len(rows)
            rows.append([])
        else:
            return None
        rows[row].append(item)
        bisect.insort(free, (room - size, row))
    return rows


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
