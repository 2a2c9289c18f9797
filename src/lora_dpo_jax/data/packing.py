"""Packed batches: pairs laid into rows as `prompt | chosen | rejected`, the prompt once.

    position      0 1 2 3 4 5 6 7 8 9 ...
    tokens        p p p c c r r r q q d e e . .      two pairs, then padding
    segment_ids   1 1 1 1 1 1 1 1 2 2 2 2 2 0 0      which pair of the row; 0 = padding
    branch_ids    0 0 0 1 1 2 2 2 0 0 1 2 2 0 0      prompt, chosen, rejected
    position_ids  0 1 2 3 4 3 4 5 0 1 2 2 3 0 0      the rejected branch restarts where the prompt ended

What must be predicted is a list beside the rows: for each response token, where its logits are found (`source`, the
token before it in its own sequence, so the last prompt token serves both responses), the token (`target_ids`) and
which log-probability it adds to (`target_slot` = 2 * pair of the row, + 1 if rejected).
"""

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import equinox as eqx
import haliax as hax
import numpy as np
from haliax import Axis, NamedArray

from lora_dpo_jax.data.chat import TokenizedPair

MICRO, ROW, POSITION, TARGET, PAIR = "micro", "row", "position", "target", "pair"


class PreferenceBatch(eqx.Module):
    """The pairs of one step, int32 but for the reference. Axes {micro, row, ...}; a micro-batch has no `micro`."""

    tokens: NamedArray  # {position}
    segment_ids: NamedArray  # {position}
    branch_ids: NamedArray  # {position}
    position_ids: NamedArray  # {position}
    source: NamedArray  # {target}
    target_ids: NamedArray  # {target}
    target_slot: NamedArray  # {target}; -1 = empty
    pair_ids: NamedArray  # {pair}: index in the data; -1 = empty
    chosen_tokens: NamedArray  # {pair}
    rejected_tokens: NamedArray  # {pair}
    # float32 {pair}: log p under the reference, in nats, if it is known beforehand
    reference_chosen: NamedArray | None = None
    reference_rejected: NamedArray | None = None

    @property
    def is_pair(self) -> NamedArray:
        return self.pair_ids >= 0

    def micro_batch(self, index) -> "PreferenceBatch":
        """The micro-batch `index` (a number, or a traced one inside a loop)."""
        return hax.tree_util.tree_map(lambda x: x[MICRO, index], self)

    @property
    def num_used_micro_batches(self):
        """Micro-batches from this one on are empty: a step need not run them."""
        used = hax.any(self.is_pair, axis=(ROW, PAIR))
        return hax.sum(used).scalar()


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


def plan_rows(sizes: Sequence[int], row_length: int) -> list[list[int]]:
    """Lays items of these sizes (tokens) into rows: longest first, each into the fullest row that has room.

    Returns the items of each row. Deterministic. O(n log n).
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for item in order:
        size = sizes[item]
        if size > row_length:
            raise ValueError(f"an item of {size} tokens does not fit a row of {row_length}")
        place = bisect.bisect_left(free, (size, -1))
        if place == len(free):
            rows.append([item])
            bisect.insort(free, (row_length - size, len(rows) - 1))
        else:
            room, row = free.pop(place)
            rows[row].append(item)
            bisect.insort(free, (room - size, row))
    return rows


def plan_layout(
    batches: Iterable[np.ndarray],
    lengths: np.ndarray,
    *,
    row_multiple: int = 1,
    rows_per_micro_batch: int | None = None,
) -> Layout:
    """The smallest layout that holds each of `batches` (arrays of pair ids), so that one compiled step serves all.

    `lengths` int[n, 3] counts prompt, chosen and rejected tokens of every pair. The number of rows is a multiple of
    `row_multiple` (groups of devices that share them); `rows_per_micro_batch` None means one micro-batch.
    """
    row_length = row_length_for(lengths)
    num_rows = 0
    every_row: list[np.ndarray] = []
    for ids in batches:
        rows = plan_rows(lengths[ids].sum(axis=1).tolist(), row_length)
        num_rows = max(num_rows, len(rows))
        every_row += [ids[row] for row in rows]
    rows_per = round_up(min(rows_per_micro_batch or num_rows, num_rows), row_multiple)
    return layout_of_rows(every_row, lengths, micro_batches=-(-num_rows // rows_per), rows=rows_per)


def layout_of_rows(planned: Iterable[np.ndarray], lengths: np.ndarray, *, micro_batches: int, rows: int) -> Layout:
    """A layout whose rows can be any of `planned` (arrays of pair ids)."""
    sizes = [(len(row), int(lengths[row, 1:].sum())) for row in planned]
    pairs, targets = (max(column) for column in zip(*sizes, strict=True))
    return Layout(micro_batches, rows, row_length_for(lengths), targets=round_up(targets, 64), pairs=pairs)


def row_length_for(lengths: np.ndarray) -> int:
    """Tokens of the shortest row that holds every pair."""
    return round_up(int(lengths.sum(axis=1).max()), 64)


def pack(
    pairs: Sequence[TokenizedPair], rows: Sequence[np.ndarray], layout: Layout, reference: np.ndarray | None = None
) -> PreferenceBatch:
    """Lays the rows (arrays of indices into `pairs`) out in NumPy arrays.

    `reference`, float32 [pair, chosen / rejected], is what the reference gives each of `pairs`, if that is known.
    Raises ValueError if there are more than the layout has.
    """
    capacity = layout.micro_batches * layout.rows
    if len(rows) > capacity:
        raise ValueError(f"{len(rows)} rows do not fit the {capacity} of {layout}")
    arrays = _EmptyRows(capacity, layout)
    for row, ids in enumerate(rows):
        arrays.fill(row, [pairs[int(i)] for i in ids], ids)
    return arrays.batch(layout, reference)


class _EmptyRows:
    """NumPy arrays [rows, ...] being filled."""

    def __init__(self, rows: int, layout: Layout):
        def empty(width: int, fill: int = 0) -> np.ndarray:
            return np.full((rows, width), fill, dtype=np.int32)

        self.tokens, self.segment_ids, self.branch_ids, self.position_ids = (empty(layout.row_length) for _ in range(4))
        self.source, self.target_ids, self.target_slot = (
            empty(layout.targets),
            empty(layout.targets),
            empty(layout.targets, -1),
        )
        self.pair_ids = empty(layout.pairs, -1)
        self.chosen_tokens, self.rejected_tokens = empty(layout.pairs), empty(layout.pairs)

    def fill(self, row: int, pairs: Sequence[TokenizedPair], pair_ids: np.ndarray) -> None:
        at = target_at = 0
        for slot, (pair, pair_id) in enumerate(zip(pairs, pair_ids, strict=True)):
            start, prompt = at, len(pair.prompt)
            for branch, tokens in enumerate(pair):
                span = slice(at, at + len(tokens))
                self.tokens[row, span] = tokens
                self.segment_ids[row, span] = slot + 1
                self.branch_ids[row, span] = branch
                first = prompt if branch else 0
                self.position_ids[row, span] = np.arange(first, first + len(tokens))
                if branch:
                    targets = slice(target_at, target_at + len(tokens))
                    self.source[row, targets] = np.arange(at - 1, at + len(tokens) - 1)
                    self.source[row, target_at] = start + prompt - 1
                    self.target_ids[row, targets] = tokens
                    self.target_slot[row, targets] = 2 * slot + branch - 1
                    target_at = targets.stop
                at = span.stop
            self.pair_ids[row, slot] = pair_id
            self.chosen_tokens[row, slot] = len(pair.chosen)
            self.rejected_tokens[row, slot] = len(pair.rejected)

    def batch(self, layout: Layout, reference: np.ndarray | None) -> PreferenceBatch:
        def named(array: np.ndarray, axis: str) -> NamedArray:
            axes = layout.axes(axis)
            return hax.named(array.reshape([a.size for a in axes]), axes)

        last_axis = dict.fromkeys(("tokens", "segment_ids", "branch_ids", "position_ids"), POSITION)
        last_axis |= dict.fromkeys(("source", "target_ids", "target_slot"), TARGET)
        last_axis |= dict.fromkeys(("pair_ids", "chosen_tokens", "rejected_tokens"), PAIR)
        arrays = {name: named(getattr(self, name), axis) for name, axis in last_axis.items()}
        if reference is not None:
            values = np.where(self.pair_ids[..., None] >= 0, reference[self.pair_ids], np.float32(0))
            arrays["reference_chosen"], arrays["reference_rejected"] = (named(values[..., i], PAIR) for i in range(2))
        return PreferenceBatch(**arrays)


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
