"""The pairs of a step laid out with each saving on or off, for comparing them with one another.

Whatever the layout, log-probs, loss and gradients are those of the same pairs:

- without a shared prefix a pair is two segments of one branch each, so its prompt is computed twice;
- padded means a pair a row, both sequences filled up to the longest of the batch with tokens that belong to them:
  later than all others, they are seen by none of these;
- with a head at every position, what predicts nothing has a target too, which adds to the log-prob of a slot that does
  not exist.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import haliax as hax
import numpy as np

from lora_dpo_jax.axes import COMPARISON, EXAMPLE, POSITION, RESPONSE, TARGET
from lora_dpo_jax.data import PartShape, PreferenceBatch, TokenizedExample, fill_rows
from lora_dpo_jax.data.shapes import round_up
from lora_dpo_jax.losses import Examples

PADDING_ID = 0


@dataclass(frozen=True)
class Savings:
    """What is not computed."""

    packing: bool = True  # tokens of padding
    shared_prefix: bool = True  # the prompt a second time; it needs packing
    response_only: bool = True  # logits that predict no response token


def lay_out(pairs: Sequence[TokenizedExample], savings: Savings, *, row_multiple: int = 1) -> PreferenceBatch:
    """All pairs as one micro-batch of NumPy arrays, numbered in their order."""
    if savings.shared_prefix and not savings.packing:
        raise ValueError("a shared prefix without packing is not offered")
    longest = max(pair.length for pair in pairs)
    if savings.packing:
        sizes = [pair.size + (0 if savings.shared_prefix else len(pair.prompt)) for pair in pairs]
        shortest = round_up(max(sizes), 64)
        row_length = min(range(shortest, 4 * shortest, 64), key=lambda length: length * len(fill_rows(sizes, length)))
        planned = fill_rows(sizes, row_length)
    else:
        row_length = round_up(2 * longest, 64)
        planned = [[index] for index in range(len(pairs))]
    pairs_per_row = max(len(row) for row in planned)

    rows = []
    for ids in planned:
        row = _Row(row_length)
        for slot, index in enumerate(ids):
            if savings.shared_prefix:
                row.add_shared(pairs[index], slot)
            else:
                row.add_twice(pairs[index], slot, length=None if savings.packing else longest)
        rows.append(row)
    rows += [_Row(row_length) for _ in range(-len(rows) % row_multiple)]
    if not savings.response_only:
        for row in rows:
            row.predict_everywhere(nowhere=2 * pairs_per_row)
    targets = round_up(max(len(row.target_response) for row in rows), 64)
    layout = PartShape.of_pairs(1, len(rows), row_length, targets=targets, pairs=pairs_per_row)
    return _batch(rows, planned, pairs, layout)


class _Row:
    """A row being filled."""

    def __init__(self, length: int):
        self.tokens, self.segment_ids, self.branch_ids, self.position_ids = np.zeros((4, length), np.int32)
        self.source, self.target_ids, self.target_response = [], [], []
        self.end = self.segments = 0

    def add_shared(self, pair: TokenizedExample, slot: int) -> None:
        """`prompt | chosen | rejected`, as the library lays a pair out."""
        self.segments += 1
        self._add(pair.prompt, branch=0, position=0)
        last_of_prompt = self.end - 1
        for branch, response in enumerate(pair.responses, start=1):
            sources = [last_of_prompt, *range(self.end, self.end + len(response) - 1)]
            self._add(response, branch=branch, position=len(pair.prompt))
            self._predict(sources, response, 2 * slot + branch - 1)

    def add_twice(self, pair: TokenizedExample, slot: int, *, length: int | None) -> None:
        """`prompt | chosen` and `prompt | rejected`, each filled up to `length`."""
        for number, response in enumerate(pair.responses):
            self.segments += 1
            tokens = np.concatenate([pair.prompt, response])
            first = self.end + len(pair.prompt) - 1
            filling = np.full((length or len(tokens)) - len(tokens), PADDING_ID, np.int32)
            self._add(np.concatenate([tokens, filling]), branch=0, position=0)
            self._predict(range(first, first + len(response)), response, 2 * slot + number)

    def predict_everywhere(self, nowhere: int) -> None:
        others = sorted(set(range(len(self.tokens))) - set(self.source))
        self._predict(others, np.zeros(len(others), np.int32), nowhere)

    def _add(self, tokens: np.ndarray, *, branch: int, position: int) -> None:
        span = slice(self.end, self.end + len(tokens))
        self.tokens[span], self.segment_ids[span], self.branch_ids[span] = tokens, self.segments, branch
        self.position_ids[span] = np.arange(position, position + len(tokens))
        self.end = span.stop

    def _predict(self, sources: Sequence[int], ids: np.ndarray, slot: int) -> None:
        self.source += sources
        self.target_ids += ids.tolist()
        self.target_response += [slot] * len(ids)


def _batch(
    rows: Sequence[_Row], planned: Sequence[Sequence[int]], pairs: Sequence[TokenizedExample], layout: PartShape
) -> PreferenceBatch:
    def named(lists: Sequence, axis: str, fill: int = 0) -> hax.NamedArray:
        axes = layout.axes(axis)
        array = np.full([a.size for a in axes], fill, np.int32)
        for row, values in enumerate(lists):
            array[0, row, : len(values)] = values
        return hax.named(array, axes)

    return PreferenceBatch(
        **{
            name: named([getattr(row, name) for row in rows], POSITION)
            for name in ("tokens", "segment_ids", "branch_ids", "position_ids")
        },
        source=named([row.source for row in rows], TARGET),
        target_ids=named([row.target_ids for row in rows], TARGET),
        target_response=named([row.target_response for row in rows], TARGET, fill=-1),
        response_tokens=named([[len(r) for i in ids for r in pairs[i].responses] for ids in planned], RESPONSE),
        examples=Examples(
            ids=named(planned, EXAMPLE, fill=-1),
            example_of_response=named([np.repeat(np.arange(len(ids)), 2) for ids in planned], RESPONSE, fill=-1),
            chosen=named([2 * np.arange(len(ids)) for ids in planned], COMPARISON),
            rejected=named([2 * np.arange(len(ids)) + 1 for ids in planned], COMPARISON),
            example_of_comparison=named([np.arange(len(ids)) for ids in planned], COMPARISON, fill=-1),
            weight=named([np.ones(len(ids)) for ids in planned], COMPARISON).astype(np.float32),
        ),
    )
