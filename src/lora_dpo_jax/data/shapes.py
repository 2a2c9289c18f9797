"""Which examples share a row, and the few shapes of rows that a run compiles.

A step is computed in micro-batches. Each has one of these shapes, and a step has as many of each as its examples need.
Shapes differ so that the examples that remain after the long rows do not pay for another long row.

The predicted time of a micro-batch is that of its rows' tokens, and a fixed cost beside: weights are read once for all
of its tokens, and operations are launched. Shapes are chosen for the least predicted time, and so are the micro-batches
of each step. Few tokens of padding may cost less than another micro-batch, and all the padding of a short run less than
compiling another shape.
"""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from haliax import Axis

from lora_dpo_jax.axes import COMPARISON, EXAMPLE, MICRO, POSITION, RESPONSE, ROW, TARGET
from lora_dpo_jax.data.examples import ExampleSizes
from lora_dpo_jax.platforms import platform

MAX_SHAPES = 3  # that a run compiles
WORTH_COMPILING = 0.01  # the share of the predicted time that another shape must save, whatever compiling it takes
LENGTH_MULTIPLE = 128  # tokens; attention splits rows into blocks
SHORTEST_ROW = 256  # tokens, unless all examples are shorter
SAMPLED_EXAMPLES = 1024  # the shapes are chosen for a sample of this many examples
# The fixed cost of a micro-batch by platform: as many tokens of each row take as long. See bench/micro_batches.py.
MICRO_BATCH_TOKENS = {
    "cpu": 40,  # measured: a model of 22 million parameters on two cores
    # Predicted from a profile of one H100. Copies of weights and factors, and the gaps between kernels, took 39 of
    # 1,117 ms for each micro-batch of an 8B model (650 tokens), and 17 of 279 ms of a 1B one (1,150).
    "gpu": 768,
    # Predicted: reading weights takes a v5e as long as computing 240 tokens, gathering them from other chips 1,000.
    # Part of both overlaps with computing.
    "tpu": 512,
}
# What a device computes while another shape compiles, by platform, in FLOP.
FLOPS_OF_COMPILING = {
    # Measured: on two cores the quickstart's step takes 6.9 s to trace and compile with two shapes, and 4.3 with one.
    # The cores do up to 190 GFLOP/s of a step; 150 are counted.
    "cpu": 4e11,
    "gpu": 5e15,  # predicted: 12 s, a third of what the 8B model's first step took to compile, at 40% of an H100's peak
    "tpu": 3e15,  # predicted: 15 s at 40% of a v5p's peak
}


def tokens_while_compiling(parameters: int) -> float:
    """How many tokens a device computes while another shape compiles, with 6 FLOP for each parameter and token."""
    return FLOPS_OF_COMPILING[platform()] / (6 * parameters)


@dataclass(frozen=True)
class PartShape:
    """The shape of a part of a step. It decides what is computed together, and changes no loss, gradient or order."""

    micro_batches: int
    rows: int  # per micro-batch
    row_length: int  # tokens
    targets: int  # per row
    examples: int  # per row
    responses: int  # per row
    comparisons: int  # per row

    @classmethod
    def of_pairs(cls, micro_batches: int, rows: int, row_length: int, targets: int, pairs: int) -> "PartShape":
        """For rows of that many pairs."""
        return cls(micro_batches, rows, row_length, targets, pairs, 2 * pairs, pairs)

    def axes(self, *names: str) -> tuple[Axis, ...]:
        sizes = {
            MICRO: self.micro_batches,
            ROW: self.rows,
            POSITION: self.row_length,
            TARGET: self.targets,
            EXAMPLE: self.examples,
            RESPONSE: self.responses,
            COMPARISON: self.comparisons,
        }
        return tuple(Axis(name, sizes[name]) for name in (MICRO, ROW, *names))

    def holding(self, rows: list[list[int]], sizes: ExampleSizes) -> "PartShape":
        """This shape, or a larger one if the rows of a step need it. Sizes are then doubled, so few shapes occur."""
        shape, extent = _Rows(self.rows, self.row_length), _Extent()
        extent.include(shape, rows, sizes)
        needed = extent.shape(shape)
        names = ("micro_batches", "targets", "examples", "responses", "comparisons")
        grown = {name: _doubled(getattr(self, name), getattr(needed, name)) for name in names}
        grown["targets"] = min(grown["targets"], max(self.targets, self.row_length))
        return dataclasses.replace(self, **grown)


@dataclass(frozen=True)
class _Rows:
    """Rows that are computed together."""

    rows: int
    length: int  # tokens
    fixed: int = 0  # what they cost beside, in tokens of a row

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def cost(self) -> int:
        """The predicted time of a micro-batch, in tokens."""
        return self.rows * (self.length + self.fixed)


@dataclass(frozen=True)
class PackingConfig:
    """How the tokens of examples are laid into rows. Both settings are on, except for comparisons."""

    packing: bool = True  # several examples in a row
    share_prefix: bool = True  # the prompt of an example once, for all responses

    def tokens(self, sizes: ExampleSizes) -> np.ndarray:
        """Tokens that each example takes in its row."""
        return sizes.tokens if self.share_prefix else sizes.tokens_apart

    def shortest_row(self, sizes: ExampleSizes) -> int:
        """Tokens of the shortest row that can hold any of the examples."""
        return round_up(int(self.tokens(sizes).max()), LENGTH_MULTIPLE)


@dataclass(frozen=True)
class StepShapes:
    """The shapes of the parts of a step, from most tokens to fewest."""

    parts: tuple[PartShape, ...]
    packing: PackingConfig = PackingConfig()
    micro_batch_tokens: int = 0  # the fixed cost of a micro-batch, in tokens of a row

    def rows_of(self, sizes: ExampleSizes) -> list[list[list[int]]]:
        """For each part, its rows: indices of the examples of a step, whose sizes are given."""
        shapes = [_Rows(part.rows, part.row_length, self.micro_batch_tokens) for part in self.parts]
        return _lay_out(sizes, shapes, self.packing)

    def holding(self, rows: list[list[list[int]]], sizes: ExampleSizes) -> "StepShapes":
        """These shapes, or larger ones if the rows of a step (see `rows_of`) do not fit into them.

        They depend on this step alone, so a resumed run computes the same as one that was never stopped.
        """
        parts = (part.holding(of_part, sizes) for part, of_part in zip(self.parts, rows, strict=True))
        return dataclasses.replace(self, parts=tuple(parts))

    def laid_out(self, ids: np.ndarray, sizes: ExampleSizes) -> list[tuple[PartShape, list[np.ndarray]]]:
        """For each part of a step with the examples `ids`: its shape, and the ids in each of its rows.

        `sizes` are those of the step's examples, in the order of `ids`.
        """
        rows = self.rows_of(sizes)
        parts = zip(self.holding(rows, sizes).parts, rows, strict=True)
        return [(part, [ids[row] for row in of_part]) for part, of_part in parts]


def fill_rows(sizes: Sequence[int], row_length: int) -> list[list[int]]:
    """Lays items of these sizes (tokens) into rows: longest first, each into the fullest row that has room.

    Returns the items of each row. Deterministic. O(n log n).
    """
    if sizes and max(sizes) > row_length:
        raise ValueError(f"an item of {max(sizes)} tokens does not fit a row of {row_length}")
    return [row for row in _best_fit(sizes, [], row_length) or [] if row]


def choose_shapes(
    batches: Sequence[np.ndarray],
    sizes: ExampleSizes,
    *,
    row_multiple: int = 1,
    longest_row: int | None = None,
    packing: PackingConfig = PackingConfig(),
    max_shapes: int = MAX_SHAPES,
    micro_batch_tokens: int | None = None,
    shape_tokens: float = 0.0,
) -> StepShapes:
    """Shapes that hold each of `batches` (arrays of example ids), so that one compiled step serves all batches.

    A micro-batch has `row_multiple` rows, one for each group of devices that share rows. `longest_row` (tokens) limits
    the length of a row, and so the memory of a step. A row is always long enough for the longest example.
    `micro_batch_tokens` is the fixed cost of a micro-batch, in tokens of a row; None: that of the platform.
    `shape_tokens` is what compiling another shape costs, likewise: all batches together must save as much.
    """
    fixed = MICRO_BATCH_TOKENS[platform()] if micro_batch_tokens is None else micro_batch_tokens
    tokens = packing.tokens(sizes)
    totals = np.array([tokens[ids].sum() for ids in batches])
    longest = packing.shortest_row(sizes)
    lengths = _candidate_lengths(longest, totals / row_multiple, longest_row)
    candidates = [_Rows(row_multiple, length, fixed) for length in lengths]
    sample = _sample(batches, sizes, totals)
    price = shape_tokens * row_multiple * len(sample) / len(batches)
    chosen = _choose_rows(candidates, longest, sample, packing, max_shapes, price)
    # A loss of comparisons finds some, or none, in all parts alike.
    used = [_Extent(comparisons=int(sizes.comparisons.any())) for _ in chosen]
    for ids in batches:
        for extent, shape, rows in zip(used, chosen, _lay_out(sizes[ids], chosen, packing), strict=True):
            extent.include(shape, rows, sizes[ids])
    parts = [extent.shape(shape) for extent, shape in zip(used, chosen, strict=True) if extent.micro_batches]
    return StepShapes(tuple(parts), packing, fixed)


@dataclass
class _Extent:
    """The largest counts that any step needs of a shape."""

    micro_batches: int = 0
    targets: int = 0  # per row
    examples: int = 0
    responses: int = 0
    comparisons: int = 0

    def include(self, shape: _Rows, rows: list[list[int]], sizes: ExampleSizes) -> None:
        self.micro_batches = max(self.micro_batches, -(-len(rows) // shape.rows))
        for row in rows:
            self.targets = max(self.targets, int(sizes.targets[row].sum()))
            self.examples = max(self.examples, len(row))
            self.responses = max(self.responses, int(sizes.responses[row].sum()))
            self.comparisons = max(self.comparisons, int(sizes.comparisons[row].sum()))

    def shape(self, rows: _Rows) -> PartShape:
        targets = round_up(self.targets, LENGTH_MULTIPLE)
        counts = self.examples, self.responses, self.comparisons
        return PartShape(self.micro_batches, rows.rows, rows.length, targets, *counts)


def shape_of_rows(filled: Iterable[np.ndarray], sizes: ExampleSizes, *, rows: int) -> PartShape:
    """The shape of one micro-batch whose rows can be any of `filled` (arrays of example ids)."""
    shape, extent = _Rows(rows, PackingConfig().shortest_row(sizes)), _Extent(micro_batches=1)
    for row in filled:
        extent.include(shape, [list(range(len(row)))], sizes[row])
    return extent.shape(shape)


def _choose_rows(
    candidates: Sequence[_Rows],
    longest: int,
    sample: list[ExampleSizes],
    packing: PackingConfig,
    max_shapes: int,
    price: float,
) -> Sequence[_Rows]:
    """The shapes with the least predicted time for a sample of the steps. One of them holds any example.

    `price` is what another shape must save of that time, in tokens.
    """

    def cost(shapes: tuple[_Rows, ...]) -> int:
        steps = (_lay_out(step, shapes, packing) for step in sample)
        return sum(
            -(-len(rows) // shape.rows) * shape.cost for step in steps for shape, rows in zip(shapes, step, strict=True)
        )

    chosen: tuple[_Rows, ...] = ()
    least = math.inf
    for count in range(1, max_shapes + 1):
        # All sets of two are tried. The third shape is the best one to add to the chosen two.
        sets = itertools.combinations(candidates, count) if count < 3 else ((*chosen, c) for c in candidates)
        options = [_by_size(o) for o in sets if len(set(o)) == count and max(shape.length for shape in o) >= longest]
        costs = [cost(option) for option in options]
        if not costs or min(costs) > min(least * (1 - WORTH_COMPILING), least - price):
            break
        least = min(costs)
        chosen = options[costs.index(least)]
    return chosen


def _sample(batches: Sequence[np.ndarray], sizes: ExampleSizes, totals: np.ndarray) -> list[ExampleSizes]:
    """The sizes of some steps, spread evenly from the step with the fewest tokens to the step with the most."""
    count = min(len(batches), max(2, SAMPLED_EXAMPLES // len(batches[0])))
    order = np.argsort(totals, kind="stable")
    chosen = order[np.linspace(0, len(order) - 1, count).round().astype(int)]
    return [sizes[batches[i]] for i in chosen]


def _candidate_lengths(longest: int, totals: np.ndarray, bound: int | None) -> list[int]:
    """Row lengths in tokens: the longest example, whole steps, equal parts of these, and lengths spread from short up.

    Rows of the longest length come first: of equally good choices, the first one is taken.
    """
    most = max(longest, float(totals.max()) * 1.05 if bound is None else bound)
    spread = SHORTEST_ROW * 2 ** np.arange(0, max(1.0, math.log2(most / SHORTEST_ROW)), 0.5)
    steps = np.quantile(totals, [0.0, 0.25, 0.5, 0.75, 1.0]) * 1.03
    parts = [steps / (np.ceil(steps / most) + more) for more in (0, 1)]
    lengths = {round_up(math.ceil(length), LENGTH_MULTIPLE) for length in (*spread, *np.concatenate(parts))}
    return sorted({longest} | {length for length in lengths if length <= most}, reverse=True)


def _by_size(shapes: tuple[_Rows, ...]) -> tuple[_Rows, ...]:
    return tuple(sorted(shapes, key=lambda shape: (-shape.tokens, -shape.length)))


def _lay_out(sizes: ExampleSizes, shapes: Sequence[_Rows], packing: PackingConfig) -> list[list[list[int]]]:
    """The rows of each shape, for the first of `_counts` whose rows hold all examples."""
    tokens = packing.tokens(sizes).tolist()
    if max(tokens) > (widest := max(shape.length for shape in shapes)):
        raise ValueError(f"an example of {max(tokens)} tokens does not fit a row of {widest}")
    if not packing.packing:
        return _one_a_row(tokens, shapes)
    for counts in _counts(sum(tokens), max(tokens), shapes):
        capacities = [s.length for s, count in zip(shapes, counts, strict=True) for _ in range(count * s.rows)]
        rows = _best_fit(tokens, capacities)
        if rows is not None:
            ends = np.cumsum([0, *(count * s.rows for s, count in zip(shapes, counts, strict=True))])
            return [[row for row in rows[a:b] if row] for a, b in itertools.pairwise(ends)]
    raise AssertionError("the last counts tried hold anything")


def _counts(total: int, longest: int, shapes: Sequence[_Rows]) -> Iterator[tuple[int, ...]]:
    """Numbers of micro-batches of each shape that may hold `total` tokens: least cost first, then more and more."""
    main = shapes[0].tokens
    tried: list[tuple[int, ...]] = []
    for first in range(max(0, total // main - 1), total // main + 2):
        tried += [(first, *rest) for rest in _rest(total - first * main, shapes[1:])]

    def holding(counts: tuple[int, ...]) -> int:
        return sum(count * shape.tokens for count, shape in zip(counts, shapes, strict=True))

    def cost(counts: tuple[int, ...]) -> int:
        return sum(count * shape.cost for count, shape in zip(counts, shapes, strict=True))

    def holds_longest(counts: tuple[int, ...]) -> bool:
        return any(count and shape.length >= longest for count, shape in zip(counts, shapes, strict=True))

    enough = {counts for counts in tried if holding(counts) >= total and holds_longest(counts)}
    yield from sorted(enough, key=lambda counts: (cost(counts), sum(counts), counts))
    widest = max(range(len(shapes)), key=lambda i: shapes[i].length)
    for more in itertools.count(1):
        yield tuple(total // main * (i == 0) + more * (i == widest) for i in range(len(shapes)))


def _rest(total: int, shapes: Sequence[_Rows]) -> Iterator[tuple[int, ...]]:
    """Numbers of micro-batches of `shapes` for `total` tokens: of the last one as many as are needed, or one more."""
    if not shapes:
        yield ()
        return
    needed = max(0, -(-total // shapes[0].tokens))
    for count in range(needed if len(shapes) == 1 else 0, needed + 2):
        yield from ((count, *rest) for rest in _rest(total - count * shapes[0].tokens, shapes[1:]))


def _one_a_row(sizes: list[int], shapes: Sequence[_Rows]) -> list[list[list[int]]]:
    """Each example in the shortest row that holds it."""
    rows: list[list[list[int]]] = [[] for _ in shapes]
    for item, size in enumerate(sizes):
        fitting = [i for i, shape in enumerate(shapes) if shape.length >= size]
        rows[min(fitting, key=lambda i: shapes[i].length)].append([item])
    return rows


def _best_fit(sizes: Sequence[int], capacities: Sequence[int], more: int | None = None) -> list[list[int]] | None:
    """Puts items, longest first, each into the row with the least free room that holds it.

    Returns the items of each row of `capacities`. Items that do not fit go into further rows of length `more`; without
    `more`, None is returned.
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


def _doubled(size: int, needed: int) -> int:
    """`size`, doubled until it is at least `needed`."""
    while size < needed:
        size = max(2 * size, 1)
    return size


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
