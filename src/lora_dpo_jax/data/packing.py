"""Packed rows: examples laid into rows as `prompt | response 1 | ... | response K`, the prompt once.

    position      0 1 2 3 4 5 6 7 8 9 ...
    tokens        p p p c c r r r q q d e e . .      two pairs, then padding
    segment_ids   1 1 1 1 1 1 1 1 2 2 2 2 2 0 0      which example of the row; 0 = padding
    branch_ids    0 0 0 1 1 2 2 2 0 0 1 2 2 0 0      prompt, first response, second response
    position_ids  0 1 2 3 4 3 4 5 0 1 2 2 3 0 0      each response begins where the prompt ended

Where responses do not share their prompt, it is repeated before each of them, in the response's branch.

The targets are a list beside the rows. For each scored response token it has the position of its logits (`source`), the
token (`target_ids`) and the number of its response in the row (`target_response`). `source` is the token before it in
its own sequence, so the last prompt token serves all responses. Tokens that are not scored are in the rows alone.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import equinox as eqx
import haliax as hax
import numpy as np
from haliax import NamedArray

from lora_dpo_jax.axes import COMPARISON, EXAMPLE, MICRO, POSITION, RESPONSE, ROW, TARGET
from lora_dpo_jax.data.examples import TokenizedExample, noun_of
from lora_dpo_jax.data.shapes import PartShape
from lora_dpo_jax.losses.examples import Examples, take


class PreferenceBatch(eqx.Module):
    """A part of a step. int32, unless noted. Axes {micro, row, ...}; a micro-batch has no `micro`."""

    tokens: NamedArray  # {position}
    segment_ids: NamedArray  # {position}
    branch_ids: NamedArray  # {position}
    position_ids: NamedArray  # {position}
    source: NamedArray  # {target}
    target_ids: NamedArray  # {target}
    target_response: NamedArray  # {target}; -1 = empty
    response_tokens: NamedArray  # {response}: how many are scored; 0 = empty
    examples: Examples  # {example}, {response}, {comparison}
    reference: NamedArray | None = None  # float32 {response}: log p under the reference in nats, if it is known

    def micro_batch(self, index) -> "PreferenceBatch":
        """The micro-batch `index` (a number, or a traced one inside a loop)."""
        return hax.tree_util.tree_map(lambda x: x[MICRO, index], self)

    @property
    def num_micro_batches(self) -> int:
        return self.tokens.resolve_axis(MICRO).size

    @property
    def num_used_micro_batches(self):
        """Only the first of this many micro-batches hold examples: a step need not run the others."""
        used = hax.any(self.examples.is_example, axis=(ROW, EXAMPLE))
        return hax.sum(used).scalar()

    @property
    def num_tokens_of_sequences(self):
        """Tokens of all sequences, prompt + response: a shared prompt counts once for each of its responses."""
        is_shared = (self.segment_ids > 0) & (self.branch_ids == 0)
        if self.holds_pairs:
            again = hax.sum(is_shared)
        else:
            responses = self.examples.sum_of_responses(self.examples.is_response.astype(np.int32))
            again = hax.sum(hax.where(is_shared, take(responses, EXAMPLE, self.segment_ids - 1) - 1, 0))
        return (hax.sum(self.segment_ids > 0) + again).scalar()

    @property
    def holds_pairs(self) -> bool:
        """Whether each example is a pair, judged by the shape alone."""
        return self.examples.ids.axes[-1].size == self.examples.chosen.axes[-1].size

    @property
    def noun(self) -> str:
        """The examples in the words of messages and metrics, judged by the shape and the columns alone."""
        return noun_of(self.examples.columns, are_pairs=self.holds_pairs)


def pack(
    examples: Sequence[TokenizedExample],
    rows: Sequence[np.ndarray],
    shape: PartShape,
    reference: Callable[[int], np.ndarray] | None = None,
    *,
    share_prefix: bool = True,
    columns: Mapping[str, bool] = MappingProxyType({}),
) -> PreferenceBatch:
    """Lays the rows (arrays of indices into `examples`) out in NumPy arrays.

    `reference` maps the number of an example to log p of its responses under the reference, float32 [response] in nats.
    `columns` names the columns of the batch, and whether each has a number for each response. Without `share_prefix`
    the prompt is repeated before each response. Raises ValueError if there are more rows than the shape has.
    """
    capacity = shape.micro_batches * shape.rows
    if len(rows) > capacity:
        raise ValueError(f"{len(rows)} rows do not fit the {capacity} of {shape}")
    arrays = _EmptyRows(capacity, shape, reference is not None, columns)
    for row, ids in enumerate(rows):
        filling = _Filling(arrays, row, share_prefix)
        for number in map(int, ids):
            filling.add(number, examples[number], None if reference is None else reference(number))
    return arrays.batch(shape)


class _EmptyRows:
    """NumPy arrays [rows, ...] being filled."""

    def __init__(self, rows: int, shape: PartShape, has_reference: bool, columns: Mapping[str, bool]):
        def empty(width: int, fill: int = 0, dtype: Any = np.int32) -> np.ndarray:
            return np.full((rows, width), fill, dtype=dtype)

        self.tokens, self.segment_ids, self.branch_ids, self.position_ids = (empty(shape.row_length) for _ in range(4))
        self.source, self.target_ids = empty(shape.targets), empty(shape.targets)
        self.target_response = empty(shape.targets, -1)
        self.response_tokens, self.example_of_response = empty(shape.responses), empty(shape.responses, -1)
        self.reference = empty(shape.responses, dtype=np.float32) if has_reference else None
        self.ids = empty(shape.examples, -1)
        self.chosen, self.rejected = empty(shape.comparisons), empty(shape.comparisons)
        self.example_of_comparison = empty(shape.comparisons, -1)
        self.weight = empty(shape.comparisons, dtype=np.float32)
        self.column_axes = {name: RESPONSE if per_response else EXAMPLE for name, per_response in columns.items()}
        widths = {RESPONSE: shape.responses, EXAMPLE: shape.examples}
        self.columns = {name: empty(widths[axis], dtype=np.float32) for name, axis in self.column_axes.items()}

    def batch(self, shape: PartShape) -> PreferenceBatch:
        def named(array: Any, axis: str) -> NamedArray:
            axes = shape.axes(axis)
            # Not hax.named, which makes JAX compile a program for each shape of NumPy's arrays.
            return NamedArray(array.reshape([a.size for a in axes]), tuple(a.name for a in axes))

        return PreferenceBatch(
            **{x: named(getattr(self, x), POSITION) for x in ("tokens", "segment_ids", "branch_ids", "position_ids")},
            **{x: named(getattr(self, x), TARGET) for x in ("source", "target_ids", "target_response")},
            response_tokens=named(self.response_tokens, RESPONSE),
            examples=Examples(
                ids=named(self.ids, EXAMPLE),
                example_of_response=named(self.example_of_response, RESPONSE),
                **{x: named(getattr(self, x), COMPARISON) for x in ("chosen", "rejected", "example_of_comparison")},
                weight=named(self.weight, COMPARISON),
                columns={name: named(self.columns[name], axis) for name, axis in self.column_axes.items()},
                of_batch={},
            ),
            reference=None if self.reference is None else named(self.reference, RESPONSE),
        )


class _Filling:
    """One row, and how far it is filled."""

    def __init__(self, arrays: _EmptyRows, row: int, share_prefix: bool):
        self.arrays, self.row, self.share_prefix = arrays, row, share_prefix
        self.tokens = self.targets = self.examples = self.responses = self.comparisons = 0

    def add(self, number: int, example: TokenizedExample, reference: np.ndarray | None) -> None:
        """`number` is the example's number in the data."""
        arrays, row, slot, first = self.arrays, self.row, self.examples, self.responses
        prompt, shares = example.prompt, self.share_prefix and example.shares_prompt
        if shares:
            self._lay(prompt, branch=0, first_position=0)
        prompt_end = self.tokens
        for branch, response in enumerate(example.responses, start=1):
            if not shares:
                self._lay(prompt, branch, first_position=0)
                prompt_end = self.tokens
            start = self.tokens
            self._lay(response, branch, first_position=len(prompt))
            self._predict(response, start, prompt_end, None if example.scored is None else example.scored[branch - 1])
            arrays.example_of_response[row, self.responses] = slot
            self.responses += 1
        if reference is not None and arrays.reference is not None:
            arrays.reference[row, first : self.responses] = reference
        for (chosen, rejected), weight in zip(example.comparisons, example.comparison_weights, strict=True):
            arrays.chosen[row, self.comparisons], arrays.rejected[row, self.comparisons] = (
                first + chosen,
                first + rejected,
            )
            arrays.example_of_comparison[row, self.comparisons] = slot
            arrays.weight[row, self.comparisons] = weight
            self.comparisons += 1
        for name, axis in arrays.column_axes.items():
            at = slice(first, self.responses) if axis == RESPONSE else slot
            arrays.columns[name][row, at] = example.columns[name]
        arrays.ids[row, slot] = number
        self.examples += 1

    def _lay(self, tokens: np.ndarray, branch: int, first_position: int) -> None:
        span = slice(self.tokens, self.tokens + len(tokens))
        arrays, row = self.arrays, self.row
        arrays.tokens[row, span] = tokens
        arrays.segment_ids[row, span] = self.examples + 1
        arrays.branch_ids[row, span] = branch
        arrays.position_ids[row, span] = np.arange(first_position, first_position + len(tokens))
        self.tokens = span.stop

    def _predict(self, response: np.ndarray, start: int, prompt_end: int, scored: np.ndarray | None) -> None:
        """Predicts each scored response token from the token before it, the first from the last prompt token."""
        source = np.arange(start - 1, start + len(response) - 1)
        source[0] = prompt_end - 1
        if scored is not None:
            source, response = source[scored], response[scored]
        span = slice(self.targets, self.targets + len(response))
        arrays, row = self.arrays, self.row
        arrays.source[row, span] = source
        arrays.target_ids[row, span] = response
        arrays.target_response[row, span] = self.responses
        arrays.response_tokens[row, self.responses] = len(response)
        self.targets = span.stop
