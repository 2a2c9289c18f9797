"""From tokenized pairs to the batches of a run: the tables, the split, and packing ahead of the device."""

import functools
import queue
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np

from lora_dpo_jax.data.chat import TokenizedPair
from lora_dpo_jax.data.packing import PreferenceBatch, pack
from lora_dpo_jax.data.shapes import PairLayout, RunLayout, layout_of_rows, plan_rows

T = TypeVar("T")


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
    """(train, validation), the latter holding about `fraction` of the pairs. No prompt is in both, of any component.

    Prompts are drawn, each with all of its pairs, of those that have not more pairs than are wanted.
    """
    hashes = [np.asarray(pairs.prompt_hashes) for pairs in components.values()]
    prompts, prompt_of = np.unique(np.concatenate(hashes), return_inverse=True)
    counts, wanted = np.bincount(prompt_of, minlength=len(prompts)), round(fraction * len(prompt_of))
    order = np.random.default_rng([seed, 0x5EED]).permutation(len(prompts))
    order = order[counts[order] <= wanted]
    held_out = np.zeros(len(prompts), dtype=bool)
    held_out[order[np.cumsum(counts[order]) <= wanted]] = True
    of_components = np.split(held_out[prompt_of], np.cumsum([len(h) for h in hashes])[:-1])
    train, validation = {}, {}
    for (name, pairs), is_held_out in zip(components.items(), of_components, strict=True):
        train[name] = (pairs, np.flatnonzero(~is_held_out))
        validation[name] = (pairs, np.flatnonzero(is_held_out))
    return PairTable(train), PairTable(validation)


def why_none_is_held_out(train: PairTable, fraction: float) -> str:
    """Why `split_by_prompt` left all pairs in `train`, in words."""
    if not fraction:
        return f"validation_split_fraction is {fraction}, and no component has validation data"
    if (wanted := round(fraction * len(train))) == 0:
        return f"validation_split_fraction={fraction} of {len(train):,} is less than a pair"
    prompts = np.unique(np.concatenate([pairs.prompt_hashes[indices] for pairs, indices in train.components]))
    if len(prompts) == 1:
        return "all have the same prompt, and no prompt may be in both parts"
    return (
        f"no prompt may be in both parts, and each of the {len(prompts):,} prompts has more than the {wanted:,} pairs "
        f"that validation_split_fraction={fraction} is"
    )


def packed_batches(
    pairs: PairTable,
    batches: Iterable[np.ndarray],
    layout: RunLayout,
    *,
    place: Callable,
    reference: np.ndarray | None = None,
    ahead: int = 2,
) -> Generator[tuple[PreferenceBatch, ...], None, None]:
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


def prefetch(jobs: Iterator[Callable[[], T]], ahead: int) -> Generator[T, None, None]:
    """The results of `jobs` in order, computed in a thread up to `ahead` before they are asked for.

    Closing it ends the thread.
    """
    is_finalizing = sys.is_finalizing  # at the interpreter's end, this module's own names may be gone
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
        if not is_finalizing():  # then threads stand still, and Python 3.13 would wait for this one without end
            thread.join()
