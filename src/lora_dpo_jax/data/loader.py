"""From tokenized pairs to the batches of a run: the split, the order, and packing ahead of the device."""

import functools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from lora_dpo_jax.data.chat import TokenizedPair
from lora_dpo_jax.data.packing import PreferenceBatch, pack
from lora_dpo_jax.data.planning import PairLayout, RunLayout, layout_of_rows, plan_rows

T = TypeVar("T")
BLOCK = 1024  # positions over which mixture weights hold exactly, to rounding


class PairSource(Protocol):
    """The pairs of one component: `TokenizedPairs` on disk, `MemoryPairs` in memory."""

    fingerprint: str  # hex; other pairs have another one
    lengths: np.ndarray  # int32 [n, 3]: tokens of prompt, chosen, rejected
    prompt_hashes: np.ndarray  # uint64 [n]
    checksums: dict[str, int]  # the same for the same pairs, wherever they came from

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> TokenizedPair: ...

    def origin(self, index: int, /) -> str:
        """Where the pair comes from, in words."""
        ...


class PairTable(Sequence[TokenizedPair]):
    """Chosen pairs of one or more components, numbered through."""

    def __init__(self, components: Mapping[str, tuple[PairSource, np.ndarray]]):
        """Each component comes with the indices of its pairs that belong to this table."""
        self.names = list(components)
        self._pairs = [pairs for pairs, _ in components.values()]
        self._indices = [indices for _, indices in components.values()]
        self.sizes = [len(indices) for indices in self._indices]
        self._starts = np.cumsum([0, *self.sizes])
        self.lengths = np.concatenate(
            [pairs.lengths[indices] for pairs, indices in components.values()] or [np.zeros((0, 3), np.int32)]
        )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> TokenizedPair:
        pairs, inner = self._locate(index)
        return pairs[inner]

    def origin(self, index: int) -> str:
        """Where the pair comes from: its file and row."""
        pairs, inner = self._locate(index)
        return pairs.origin(inner)

    @property
    def components(self) -> list[tuple[PairSource, np.ndarray]]:
        """In the table's order: the pairs of each component, and the indices of those that belong to this table."""
        return list(zip(self._pairs, self._indices, strict=True))

    def subset(self, ids: np.ndarray) -> "PairTable":
        """Some of the pairs, given by their numbers in ascending order, as a table of their own."""
        bounds = np.searchsorted(ids, self._starts)
        inner = [
            indices[ids[first:last] - start]
            for indices, start, first, last in zip(self._indices, self._starts, bounds, bounds[1:], strict=False)
        ]
        return PairTable(dict(zip(self.names, zip(self._pairs, inner, strict=True), strict=True)))

    def _locate(self, index: int) -> tuple[PairSource, int]:
        component = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._pairs[component], int(self._indices[component][index - self._starts[component]])


def whole_table(components: Mapping[str, PairSource]) -> PairTable:
    return PairTable({name: (pairs, np.arange(len(pairs))) for name, pairs in components.items()})


def split_by_prompt(components: Mapping[str, PairSource], fraction: float, seed: int) -> tuple[PairTable, PairTable]:
    """(train, validation), the latter holding about `fraction` of the pairs. No prompt is in both, of any component."""
    hashes = [np.asarray(pairs.prompt_hashes) for pairs in components.values()]
    prompts, prompt_of = np.unique(np.concatenate(hashes), return_inverse=True)
    counts = np.bincount(prompt_of, minlength=len(prompts))
    order = np.random.default_rng([seed, 0x5EED]).permutation(len(prompts))
    held_out = np.zeros(len(prompts), dtype=bool)
    held_out[order[np.cumsum(counts[order]) <= round(fraction * len(prompt_of))]] = True
    of_components = np.split(held_out[prompt_of], np.cumsum([len(h) for h in hashes])[:-1])
    train, validation = {}, {}
    for (name, pairs), is_held_out in zip(components.items(), of_components, strict=True):
        train[name] = (pairs, np.flatnonzero(~is_held_out))
        validation[name] = (pairs, np.flatnonzero(is_held_out))
    return PairTable(train), PairTable(validation)


@dataclass(frozen=True)
class PairOrder:
    """Which pairs the steps of a run train on: a function of the seed and the position alone.

    Without weights, every epoch holds each pair once. With weights, components are drawn in these proportions, each
    going through its own epochs.
    """

    sizes: tuple[int, ...]  # pairs of each component
    seed: int
    shuffle: bool = True
    weights: tuple[float, ...] | None = None

    def __post_init__(self):
        if sum(self.sizes) == 0:
            raise ValueError("there are no training pairs")
        for size, weight in zip(self.sizes, self.weights or self.sizes, strict=True):
            if weight > 0 and size == 0:
                raise ValueError("data.train_weights gives weight to a component without training pairs")

    def batch(self, step: int, size: int) -> np.ndarray:
        """The ids of the pairs of `step`, int64[size]."""
        positions = np.arange(step * size, (step + 1) * size)
        if self.weights is None:
            return self._in_epochs(positions, 0, sum(self.sizes))
        return np.array([self._weighted(int(position)) for position in positions])

    def _in_epochs(self, positions: np.ndarray, component: int, size: int) -> np.ndarray:
        epochs, inner = np.divmod(positions, size)
        if not self.shuffle:
            return inner
        shuffled = [
            _permutation(self.seed, component, int(epoch), size)[i] for epoch, i in zip(epochs, inner, strict=True)
        ]
        return np.array(shuffled)

    def _weighted(self, position: int) -> int:
        block, inner = divmod(position, BLOCK)
        components, nth = _mixture_block(self.seed, self.weights)
        component = int(components[inner])
        before = block * int(np.sum(components == component)) + int(nth[inner])
        within = self._in_epochs(np.array([before]), component + 1, self.sizes[component])[0]
        return int(sum(self.sizes[:component]) + within)


@functools.lru_cache(maxsize=8)
def _permutation(seed: int, component: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, component, epoch]).permutation(size)


@functools.lru_cache(maxsize=2)
def _mixture_block(seed: int, weights: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Which component each position of a block takes from, and how many of that component come before it there."""
    shares = np.array(weights) / sum(weights) * BLOCK
    counts = np.floor(shares).astype(int)
    counts[np.argsort(counts - shares)[: BLOCK - counts.sum()]] += 1
    components = np.repeat(np.arange(len(weights)), counts)
    components = np.random.default_rng([seed, 0x313]).permutation(components)
    nth = np.zeros(BLOCK, dtype=int)
    for component in range(len(weights)):
        here = components == component
        nth[here] = np.arange(here.sum())
    return components, nth


def packed_batches(
    pairs: PairTable,
    batches: Iterable[np.ndarray],
    layout: RunLayout,
    *,
    place: Callable,
    reference: np.ndarray | None = None,
    ahead: int = 2,
) -> Iterator[tuple[PreferenceBatch, ...]]:
    """Packs `batches` (arrays of pair ids) and puts them on the devices with `place`, in a thread, `ahead` of use.

    Each comes as its parts, one for each shape of `layout`. `reference`: see `pack`.
    """
    share_prefix = layout.pair_layout.share_prefix

    def make(ids: np.ndarray) -> tuple[PreferenceBatch, ...]:
        planned = zip(layout.parts, layout.plan(pairs.lengths[ids]), strict=True)
        return place(
            tuple(
                pack(pairs, [ids[row] for row in rows], part, reference, share_prefix=share_prefix)
                for part, rows in planned
            )
        )

    return prefetch((functools.partial(make, ids) for ids in batches), ahead)


def packed_rows(
    pairs: PairTable, *, rows: int, place: Callable, ahead: int = 2
) -> tuple[int, Iterator[PreferenceBatch]]:
    """All pairs once, in batches of one micro-batch of `rows` rows, packed as tightly as can be: (how many, they).

    For passes in which it does not matter which pairs share a batch.
    """
    longest = PairLayout().shortest_row(pairs.lengths)
    planned = [np.array(row) for row in plan_rows(pairs.lengths.sum(axis=1).tolist(), longest)]
    layout = layout_of_rows(planned, pairs.lengths, rows=rows)
    batches = [planned[i : i + rows] for i in range(0, len(planned), rows)]
    jobs = (functools.partial(lambda batch: place(pack(pairs, batch, layout)), batch) for batch in batches)
    return len(batches), prefetch(jobs, ahead)


def prefetch(jobs: Iterator[Callable[[], T]], ahead: int) -> Iterator[T]:
    """The results of `jobs` in order, computed in a thread up to `ahead` before they are asked for."""
    results: queue.Queue = queue.Queue(maxsize=ahead)
    stop = threading.Event()
    done = object()

    def offer(item) -> bool:
        while not stop.is_set():
            try:
                results.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for job in jobs:
                if not offer((job(), None)):
                    return
            offer((done, None))
        except BaseException as error:  # raised again where the result is asked for
            offer((done, error))

    thread = threading.Thread(target=work, daemon=True, name="packing")
    thread.start()
    try:
        while True:
            item, error = results.get()
            if error is not None:
                raise error
            if item is done:
                return
            yield item
    finally:
        stop.set()
        thread.join()
