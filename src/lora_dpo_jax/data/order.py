"""Which pairs the steps of a run train on, and how components are mixed: functions of the seed and the step alone."""

import functools
import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import overload

import numpy as np

MIXING = 2  # a version: increase it when the same train_weights would draw other pairs
SHUFFLE_ROUNDS = 16
BLOCK = 8192  # positions of a mixture that are computed at once: NumPy takes hardly longer for a hundred than for one
GOLDEN = 0x9E3779B97F4A7C15  # the step of splitmix64


@dataclass(frozen=True)
class ExampleOrder:
    """Which pairs the steps of a run train on.

    Without `weights`, epochs over all pairs follow each other. With them, components are interleaved in exactly these
    proportions, as evenly as possible, and each component has its own epochs.
    """

    sizes: tuple[int, ...]  # pairs of each component
    seed: int
    shuffle: bool = True
    weights: tuple[float, ...] | None = None  # one for each component, finite, not negative

    def __post_init__(self):
        if sum(self.sizes) == 0:
            raise ValueError("there are no training pairs")
        for size, weight in zip(self.sizes, self.weights or self.sizes, strict=True):
            if weight > 0 and size == 0:
                raise ValueError("data.train_weights gives weight to a component without training pairs")

    @functools.cached_property
    def epoch(self) -> int:
        """Pairs of an epoch: the number of pairs in all components with a positive weight."""
        return sum(size for size, weight in zip(self.sizes, self.weights or self.sizes, strict=True) if weight > 0)

    def batch(self, step: int, size: int, *, short_ends: bool = False) -> np.ndarray:
        """The ids of the pairs of `step`, int64[size].

        With `short_ends`, the last batch of an epoch has only the remaining pairs, and the next epoch begins with a new
        batch. Otherwise pairs of the next epoch fill the last batch.
        """
        start, stop = step * size, (step + 1) * size
        if short_ends:
            epoch, step_of_epoch = divmod(step, -(-self.epoch // size))
            start = epoch * self.epoch + step_of_epoch * size
            stop = min(start + size, (epoch + 1) * self.epoch)
        positions = np.arange(start, stop)
        return self._in_epochs(positions) if self.weights is None else self._mixed(positions)

    def visited(self, count: int) -> np.ndarray:
        """The ids of the pairs at the first `count` positions, each once, int64. Takes no time for later epochs."""
        if self.weights is None:
            return np.sort(self._in_epochs(np.arange(min(count, self.epoch))))
        found, starts = [], np.cumsum([0, *self.sizes[:-1]])
        for component, number in enumerate(self._mixture.counts(count)):
            first = np.arange(min(int(number), self.sizes[component]))
            found.append(starts[component] + self._within(np.full(len(first), component), first))
        return np.sort(np.concatenate(found))

    def _in_epochs(self, positions: np.ndarray) -> np.ndarray:
        epochs, inner = np.divmod(positions, self.epoch)
        if not self.shuffle:
            return inner
        ids = np.empty_like(inner)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = _permutation(self.seed, int(epoch), self.epoch)[inner[here]]
        return ids

    def _mixed(self, positions: np.ndarray) -> np.ndarray:
        blocks, inner = np.divmod(positions, BLOCK)
        return np.concatenate([self._ids_of_block(int(block))[inner[blocks == block]] for block in np.unique(blocks)])

    @functools.cached_property
    def _ids_of_block(self) -> Callable[[int], np.ndarray]:
        """The ids at the positions of a block, int64[BLOCK]."""
        starts = np.cumsum([0, *self.sizes[:-1]])

        @functools.lru_cache(maxsize=4)
        def ids(block: int) -> np.ndarray:
            component, nth = self._mixture.draw(np.arange(block * BLOCK, (block + 1) * BLOCK))
            return starts[component] + self._within(component, nth)

        return ids

    @functools.cached_property
    def _mixture(self) -> "_Mixture":
        return _Mixture(self.weights or ())

    @functools.cached_property
    def _keys(self) -> np.ndarray:
        """Of each component, for its shuffles: uint64."""
        return np.random.SeedSequence([self.seed, 0x313]).generate_state(len(self.sizes), np.uint64)

    def _within(self, component: np.ndarray, nth: np.ndarray) -> np.ndarray:
        """Which pair of its component is the `nth` one that a mixture draws from it, all int64."""
        sizes = np.array(self.sizes)[component]
        epoch, inner = np.divmod(nth, sizes)
        if not self.shuffle:
            return inner
        return _shuffled(inner, sizes, _hash(self._keys[component], 0, epoch.astype(np.uint64)))


@dataclass(frozen=True)
class StepIds(Sequence[np.ndarray]):
    """The ids of the pairs of each step of a run, int64. They are computed when they are asked for."""

    order: ExampleOrder
    size: int  # pairs of a step
    num_steps: int
    short_ends: bool = False  # see ExampleOrder.batch

    def __len__(self) -> int:
        return self.num_steps

    @overload
    def __getitem__(self, step: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, step: slice) -> list[np.ndarray]: ...

    def __getitem__(self, step):
        if isinstance(step, slice):
            return [self[index] for index in range(self.num_steps)[step]]
        return self.order.batch(range(self.num_steps)[step], self.size, short_ends=self.short_ends)

    @property
    def num_visits(self) -> int:
        """Pairs of all steps together. A pair counts each time that it is visited."""
        if not self.short_ends:
            return self.num_steps * self.size
        epochs, rest = divmod(self.num_steps, -(-self.order.epoch // self.size))
        return epochs * self.order.epoch + min(rest * self.size, self.order.epoch)

    def spread(self, count: int) -> Sequence[np.ndarray]:
        """At most `count` of the steps: all, or some that are spread over the first two epochs."""
        last = min(self.num_steps, 2 * -(-self.order.epoch // self.size)) - 1
        return self if self.num_steps <= count else [self[int(step)] for step in np.linspace(0, last, count)]

    def visited(self) -> np.ndarray:
        """The ids of the pairs of all steps, each once, int64."""
        return self.order.visited(self.num_visits)


@functools.lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, 0, epoch]).permutation(size)


class _Mixture:
    """Which component each position of an endless sequence draws from, in the exact proportions of `weights`.

    Positions go down a Huffman tree of the components. Of the first n positions that reach a node, round(n * share) go
    to its lighter side. So the path of a position, and how many earlier positions took it, depend only on its number.
    The product of two consecutive shares on a path is at most 1/2. So among the first n positions, each component is
    within 2 of its share, for any weights and any number of components.
    """

    def __init__(self, weights: Sequence[float]):
        nodes, self.components = _huffman_tree(weights), len(weights)
        self.sides = np.array([node[1:] for node in nodes], np.int64).ravel()  # heavy, light, heavy, light, ...
        self.share = np.array([node[0] for node in nodes])  # of the lighter side, at most 1/2

    def counts(self, number: int) -> np.ndarray:
        """How many of the first `number` positions have each component, int64."""
        counts, node = np.zeros(self.components, np.int64), len(self.share) - 1
        waiting = [(node, float(number))]
        while waiting:
            node, nth = waiting.pop()
            if node < self.components:
                counts[node] += int(nth)
                continue
            light = math.floor(nth * self.share[node] + 0.5)
            heavier, lighter = self.sides[2 * node], self.sides[2 * node + 1]
            waiting += [(heavier, nth - light), (lighter, light)]
        return counts

    def draw(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(the component of each position, the number of earlier positions with this component), both int64."""
        # float64 holds whole numbers up to 2^53: after 10^9 positions the error of a product is 10^-7.
        nth, node = positions.astype(np.float64), np.full(len(positions), len(self.share) - 1)
        while (node >= self.components).any():
            share = self.share[node]
            light = np.floor(nth * share + 0.5)
            is_light = np.floor((nth + 1) * share + 0.5) > light
            nth = np.where(is_light, light, nth - light)
            node = self.sides[2 * node + is_light]
        return node, nth.astype(np.int64)


def _huffman_tree(weights: Sequence[float]) -> list[tuple[float, int, int]]:
    """For each node: (share of its lighter side, index of its heavier side, index of its lighter side).

    The components come first, in their order. They are leaves: share 0, and both sides are the leaf. The root is last.
    """
    exact = [Fraction(weight) for weight in weights]
    unit = max(weight.denominator for weight in exact)  # denominators of floats are powers of two
    waiting = [(int(weight * unit), component) for component, weight in enumerate(exact) if weight > 0]
    heapq.heapify(waiting)
    nodes = [(0.0, component, component) for component in range(len(exact))]
    while len(waiting) > 1:
        (light, lighter), (heavy, heavier) = heapq.heappop(waiting), heapq.heappop(waiting)
        heapq.heappush(waiting, (light + heavy, len(nodes)))
        nodes.append((light / (light + heavy), heavier, lighter))
    (_, root) = waiting[0]
    return [*nodes, nodes[root]]


def _shuffled(index: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """The place of each `index` in a random order of `size` elements. Each `key` (uint64) gives another order.

    A Feistel network: the cost of an element does not depend on the size, and nothing is stored. Its halves are row and
    column in a table of about sqrt(size) rows. A place of `size` or more goes through the network again.
    """
    rows = np.ceil(np.sqrt(size)).astype(np.int64)
    columns = -(-size // rows)
    index, todo = index.copy(), np.arange(len(index))
    while todo.size:
        key_here, rows_here, columns_here = key[todo], rows[todo].astype(np.uint64), columns[todo].astype(np.uint64)
        row, column = np.divmod(index[todo].astype(np.uint64), columns_here)
        for number in range(0, SHUFFLE_ROUNDS, 2):
            row = (row + _hash(key_here, number, column)) % rows_here
            column = (column + _hash(key_here, number + 1, row)) % columns_here
        index[todo] = row * columns_here + column
        todo = todo[index[todo] >= size[todo]]
    return index


def _hash(key: np.ndarray, number: int, half: np.ndarray) -> np.ndarray:
    """splitmix64 (https://doi.org/10.1145/2714064.2660195) of a weighted sum of the three arguments, uint64."""
    x = key + half * GOLDEN + number * 0xD1B54A32D192ED03 % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)
