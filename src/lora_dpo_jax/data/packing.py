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

from collections.abc import Sequence

import equinox as eqx
import haliax as hax
import numpy as np
from haliax import NamedArray

from lora_dpo_jax.data.chat import TokenizedPair
from lora_dpo_jax.data.shapes import MICRO, PAIR, POSITION, ROW, TARGET, Layout


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


def pack(
    pairs: Sequence[TokenizedPair],
    rows: Sequence[np.ndarray],
    layout: Layout,
    reference: np.ndarray | None = None,
    *,
    share_prefix: bool = True,
) -> PreferenceBatch:
    """Lays the rows (arrays of indices into `pairs`) out in NumPy arrays.

    `reference`, float32 [pair, chosen / rejected], is what the reference gives each of `pairs`, if that is known.
    Without `share_prefix` the prompt comes twice, as the beginning of either branch. Raises ValueError if there are
    more rows than the layout has.
    """
    capacity = layout.micro_batches * layout.rows
    if len(rows) > capacity:
        raise ValueError(f"{len(rows)} rows do not fit the {capacity} of {layout}")
    arrays = _EmptyRows(capacity, layout)
    for row, ids in enumerate(rows):
        arrays.fill(row, [pairs[int(i)] for i in ids], ids, share_prefix)
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

    def fill(self, row: int, pairs: Sequence[TokenizedPair], pair_ids: np.ndarray, share_prefix: bool) -> None:
        at = target_at = 0

        def lay(tokens: np.ndarray, slot: int, branch: int, first_position: int) -> None:
            nonlocal at
            span = slice(at, at + len(tokens))
            self.tokens[row, span] = tokens
            self.segment_ids[row, span] = slot + 1
            self.branch_ids[row, span] = branch
            self.position_ids[row, span] = np.arange(first_position, first_position + len(tokens))
            at = span.stop

        for slot, (pair, pair_id) in enumerate(zip(pairs, pair_ids, strict=True)):
            prompt = pair.prompt
            if share_prefix:
                lay(prompt, slot, 0, 0)
            prompt_end = at
            for branch, response in ((1, pair.chosen), (2, pair.rejected)):
                if not share_prefix:
                    lay(prompt, slot, branch, 0)
                    prompt_end = at
                start = at
                lay(response, slot, branch, len(prompt))
                targets = slice(target_at, target_at + len(response))
                self.source[row, targets] = np.arange(start - 1, at - 1)
                self.source[row, target_at] = prompt_end - 1
                self.target_ids[row, targets] = response
                self.target_slot[row, targets] = 2 * slot + branch - 1
                target_at = targets.stop
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
