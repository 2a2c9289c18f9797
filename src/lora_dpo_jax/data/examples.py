"""Tokenized examples: one prompt with its K responses, their comparisons, and columns of the data.

K = 2 with one comparison is a pair. K = 1 with a label is an example for unpaired losses. More responses are a ranked
list.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_dpo_jax.axes import COMPARISON, EXAMPLE, RESPONSE
from lora_dpo_jax.columns import LABEL

if TYPE_CHECKING:
    from lora_dpo_jax.losses.examples import Examples

PAIR = ((0, 1),)  # the comparisons of a pair: the first response is the chosen one


@dataclass(frozen=True, eq=False)
class TokenizedExample:
    """Token ids, int32. The tokens of responses are scored, all or those that `scored` marks; none of the prompt is."""

    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    comparisons: tuple[tuple[int, int], ...] = ()  # (chosen, rejected), numbers of responses
    weights: tuple[float, ...] | None = None  # one for each comparison; None: equal, with sum 1
    columns: Mapping[str, float | Sequence[float]] = field(default_factory=dict)  # a number, or one for each response
    # bool arrays, one for each response, as long as it. The other tokens are context. None: all tokens are scored.
    scored: tuple[np.ndarray, ...] | None = None
    shares_prompt: bool = True  # false: the responses cannot share one computation of the prompt

    @classmethod
    def pair(cls, prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray, **columns) -> "TokenizedExample":
        return cls(prompt, (chosen, rejected), PAIR, columns=columns)

    @property
    def parts(self) -> tuple[np.ndarray, ...]:
        """The prompt, then the responses."""
        return (self.prompt, *self.responses)

    @property
    def is_pair(self) -> bool:
        return len(self.responses) == 2 and self.comparisons == PAIR

    @property
    def size(self) -> int:
        """Number of tokens. The prompt counts once."""
        return sum(map(len, self.parts))

    @property
    def length(self) -> int:
        """Number of tokens of the prompt and the longest response, at most train_seq_len."""
        return len(self.prompt) + max(map(len, self.responses))

    @property
    def comparison_weights(self) -> tuple[float, ...]:
        if self.weights is not None:
            return self.weights
        return (1 / len(self.comparisons),) * len(self.comparisons) if self.comparisons else ()

    @property
    def prompt_hash(self) -> int:
        """64-bit hash of the prompt's tokens. Examples with the same hash stay together when a table is split."""
        digest = hashlib.blake2b(self.prompt.astype("<i4").tobytes(), digest_size=8).digest()
        return int.from_bytes(digest, "little")


@dataclass(frozen=True)
class ExampleSizes:
    """The sizes of a table's examples, int32 [example] each. The layout of rows depends on nothing else."""

    prompt: np.ndarray  # tokens
    targets: np.ndarray  # tokens of all responses that are scored
    unscored: np.ndarray  # tokens of all responses that are not
    responses: np.ndarray  # how many
    comparisons: np.ndarray  # how many
    shares_prompt: np.ndarray | None = None  # bool: see TokenizedExample; None = all true

    @staticmethod
    def of_pairs(lengths: np.ndarray) -> "ExampleSizes":
        """Of pairs, from int [example, 3]: tokens of prompt, chosen and rejected."""
        lengths = np.asarray(lengths, np.int32).reshape(-1, 3)
        one = np.ones(len(lengths), np.int32)
        return ExampleSizes(lengths[:, 0], lengths[:, 1:].sum(axis=1), 0 * one, 2 * one, one)

    def __len__(self) -> int:
        return len(self.prompt)

    def __getitem__(self, ids: np.ndarray) -> "ExampleSizes":
        arrays: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        chosen: dict[str, Any] = {name: None if array is None else array[ids] for name, array in arrays.items()}
        return ExampleSizes(**chosen)

    @property
    def tokens(self) -> np.ndarray:
        """Tokens that each example takes in a row. The prompt counts once, unless the responses cannot share it."""
        together = self.prompt + self.targets + self.unscored
        return together if self.shares_prompt is None else np.where(self.shares_prompt, together, self.tokens_apart)

    @property
    def tokens_apart(self) -> np.ndarray:
        """Tokens of each example if the prompt is repeated before each response."""
        return self.prompt * self.responses + self.targets + self.unscored


@dataclass(frozen=True)
class Column:
    """A column of numbers, float32: one for each example, or one for each response."""

    values: np.ndarray
    per_response: bool


@dataclass(frozen=True)
class ExampleArrays:
    """All data of many examples except their tokens, concatenated. int32, unless noted."""

    prompt_tokens: np.ndarray  # [example]
    response_counts: np.ndarray  # [example]
    response_tokens: np.ndarray  # [response]
    comparison_counts: np.ndarray  # [example]
    comparisons: np.ndarray  # [comparison, 2]: chosen and rejected, numbered within their example
    weights: np.ndarray  # float32 [comparison]
    unscored_counts: np.ndarray  # [response]: stretches of tokens that are not scored
    unscored: np.ndarray  # [stretch, 2]: its first token, and the one after its last, numbered within their response
    columns: dict[str, Column] = field(default_factory=dict)

    @staticmethod
    def of(examples: Sequence[TokenizedExample], origin: Callable[[int], str]) -> "ExampleArrays":
        """From examples in memory. Raises ValueError with the `origin` of an invalid example."""
        for number, example in enumerate(examples):
            if fault := _fault(example, examples[0]):
                raise ValueError(f"{origin(number)}: {fault}")
        columns = {}
        for name in examples[0].columns if examples else ():
            values = [np.atleast_1d(np.asarray(example.columns[name], np.float32)) for example in examples]
            columns[name] = Column(np.concatenate(values), np.ndim(examples[0].columns[name]) == 1)
        unscored = [stretches for example in examples for stretches in _unscored(example)]
        return ExampleArrays(
            _ints(len(example.prompt) for example in examples),
            _ints(len(example.responses) for example in examples),
            _ints(len(response) for example in examples for response in example.responses),
            _ints(len(example.comparisons) for example in examples),
            _ints(number for example in examples for pair in example.comparisons for number in pair).reshape(-1, 2),
            np.array([weight for example in examples for weight in example.comparison_weights], np.float32),
            _ints(map(len, unscored)),
            np.concatenate([np.zeros((0, 2), np.int32), *unscored]),
            columns,
        )

    @staticmethod
    def joined(parts: Sequence["ExampleArrays"]) -> "ExampleArrays":
        """`parts`, concatenated, with the columns that all of them have."""
        if not parts:
            return ExampleArrays.of([], str)
        names = [field.name for field in dataclasses.fields(ExampleArrays) if field.name != "columns"]
        shared = [
            name
            for name, column in parts[0].columns.items()
            if all(name in p.columns and p.columns[name].per_response == column.per_response for p in parts)
        ]
        columns = {
            name: Column(np.concatenate([p.columns[name].values for p in parts]), parts[0].columns[name].per_response)
            for name in shared
        }
        return ExampleArrays(
            **{name: np.concatenate([getattr(p, name) for p in parts]) for name in names}, columns=columns
        )

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    @functools.cached_property
    def sizes(self) -> ExampleSizes:
        targets, tokens = (_sums(x, self.response_starts) for x in (self.scored_tokens, self.response_tokens))
        return ExampleSizes(self.prompt_tokens, targets, tokens - targets, self.response_counts, self.comparison_counts)

    @functools.cached_property
    def scored_tokens(self) -> np.ndarray:
        """[response]: how many of its tokens are scored."""
        if not len(self.unscored):
            return self.response_tokens
        return self.response_tokens - _sums(np.diff(self.unscored).ravel(), self._unscored_starts)

    @functools.cached_property
    def _unscored_starts(self) -> np.ndarray:
        """int64 [response + 1]: where the stretches of each response begin in `unscored`."""
        return np.concatenate([[0], np.cumsum(self.unscored_counts, dtype=np.int64)])

    def on_one_side_of(self, length: int) -> np.ndarray:
        """bool [example]: whether all sequences, of the prompt and one response, or none are longer than `length`."""
        starts, counts = self.response_starts[:-1], np.maximum(self.response_counts, 1)
        if not len(self):
            return np.ones(0, bool)
        is_long = np.repeat(self.prompt_tokens, self.response_counts) + self.response_tokens > length
        number = np.add.reduceat(np.append(is_long, False).astype(np.int64), starts)
        return (number == 0) | (number == counts)

    @functools.cached_property
    def response_starts(self) -> np.ndarray:
        """int64 [example + 1]: where the responses of each example begin."""
        return np.concatenate([[0], np.cumsum(self.response_counts, dtype=np.int64)])

    @functools.cached_property
    def comparison_starts(self) -> np.ndarray:
        """int64 [example + 1]: where the comparisons of each example begin."""
        return np.concatenate([[0], np.cumsum(self.comparison_counts, dtype=np.int64)])

    @property
    def are_pairs(self) -> bool:
        return bool(
            (self.response_counts == 2).all()
            and (self.comparison_counts == 1).all()
            and (self.comparisons == PAIR[0]).all()
        )

    @property
    def noun(self) -> str:
        """The examples in the words of messages."""
        return noun_of(self.columns, are_pairs=self.are_pairs)

    def example(self, number: int, tokens: np.ndarray) -> TokenizedExample:
        """Example `number`. `tokens` are those of its prompt and responses, concatenated."""
        responses = slice(self.response_starts[number], self.response_starts[number + 1])
        comparisons = slice(self.comparison_starts[number], self.comparison_starts[number + 1])
        ends = np.cumsum([self.prompt_tokens[number], *self.response_tokens[responses]])
        prompt, *parts = np.split(tokens, ends[:-1])
        return TokenizedExample(
            prompt,
            tuple(parts),
            tuple((int(chosen), int(rejected)) for chosen, rejected in self.comparisons[comparisons]),
            tuple(self.weights[comparisons].tolist()),
            {
                name: column.values[responses].tolist() if column.per_response else float(column.values[number])
                for name, column in self.columns.items()
            },
            self._scored(responses),
        )

    def _scored(self, responses: slice) -> tuple[np.ndarray, ...] | None:
        """`TokenizedExample.scored` of these responses."""
        starts = self._unscored_starts[responses.start : responses.stop + 1]
        if starts[0] == starts[-1]:
            return None
        scored = tuple(np.ones(tokens, bool) for tokens in self.response_tokens[responses])
        for number, (first, last) in enumerate(itertools.pairwise(starts)):
            for start, stop in self.unscored[first:last]:
                scored[number][start:stop] = False
        return scored

    def responses_of(self, ids: np.ndarray) -> np.ndarray:
        """The indices of the responses of these examples."""
        return _ranges(self.response_starts, ids)

    def comparisons_of(self, ids: np.ndarray) -> np.ndarray:
        """The indices of the comparisons of these examples."""
        return _ranges(self.comparison_starts, ids)

    def subset(self, ids: np.ndarray) -> "ExampleArrays":
        responses, comparisons = self.responses_of(ids), self.comparisons_of(ids)
        return ExampleArrays(
            self.prompt_tokens[ids],
            self.response_counts[ids],
            self.response_tokens[responses],
            self.comparison_counts[ids],
            self.comparisons[comparisons],
            self.weights[comparisons],
            self.unscored_counts[responses],
            self.unscored[_ranges(self._unscored_starts, responses)],
            {
                name: Column(column.values[responses if column.per_response else ids], column.per_response)
                for name, column in self.columns.items()
            },
        )

    def by_example(self, values: np.ndarray) -> Callable[[int], np.ndarray]:
        """A function from an example's number to its part of `values` [response]."""
        return lambda number: values[self.response_starts[number] : self.response_starts[number + 1]]

    @functools.cached_property
    def examples(self) -> "Examples":
        """All examples as losses take them, without rows."""
        from haliax import NamedArray  # slow to import, as JAX is, and not needed to tokenize

        from lora_dpo_jax.losses.examples import Examples

        def named(array: Any, axis: str) -> NamedArray:
            return NamedArray(array, (axis,))

        numbers = np.arange(len(self), dtype=np.int32)
        example_of_comparison = np.repeat(numbers, self.comparison_counts)
        chosen, rejected = (self.comparisons + self.response_starts[:-1][example_of_comparison][:, None]).T
        return Examples(
            ids=named(numbers, EXAMPLE),
            example_of_response=named(np.repeat(numbers, self.response_counts), RESPONSE),
            chosen=named(chosen.astype(np.int32), COMPARISON),
            rejected=named(rejected.astype(np.int32), COMPARISON),
            example_of_comparison=named(example_of_comparison, COMPARISON),
            weight=named(self.weights, COMPARISON),
            columns={
                name: named(column.values, RESPONSE if column.per_response else EXAMPLE)
                for name, column in self.columns.items()
            },
        )

    def to_bytes(self) -> bytes:
        """Bytes that are the same for the same examples, on any machine."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "columns"]
        arrays = [getattr(self, name) for name in names] + [self.columns[name].values for name in sorted(self.columns)]
        return b"".join(array.astype(array.dtype.newbyteorder("<")).tobytes() for array in arrays)


def noun_of(columns: Iterable[str], *, are_pairs: bool) -> str:
    """Examples with these columns in the words of messages: pairs, answers if they have labels, else examples."""
    return "pairs" if are_pairs else "answers" if LABEL in columns else "examples"


def _fault(example: TokenizedExample, first: TokenizedExample) -> str | None:
    """The fault of an example in a table that begins with `first`; None if it has no fault."""
    count = len(example.responses)
    for chosen, rejected in example.comparisons:
        if not (0 <= chosen < count and 0 <= rejected < count and chosen != rejected):
            return f"comparison ({chosen}, {rejected}) must name two of its {count} responses, numbered from 0"
    if example.weights is not None and len(example.weights) != len(example.comparisons):
        return f"has {len(example.weights)} weights for {len(example.comparisons)} comparisons"
    if not all(0 <= weight < math.inf for weight in example.comparison_weights):
        return f"weights of comparisons must be finite and not negative; found {example.comparison_weights}"
    if example.scored is not None:
        if [mask.shape for mask in example.scored] != [response.shape for response in example.responses]:
            return f"scored must have a bool for each token of each of the {count} responses"
        if not all(mask.dtype == bool and mask.any() for mask in example.scored):
            return "scored must hold bools, and mark at least one token of each response"
    if example.columns.keys() != first.columns.keys():
        return f"has the columns {sorted(example.columns)}, and the first example has {sorted(first.columns)}"
    for name, values in example.columns.items():
        is_number = np.asarray(values).dtype.kind in "biuf"
        if not is_number or np.ndim(values) != np.ndim(first.columns[name]) or np.shape(values) not in ((), (count,)):
            return f"column {name!r} is {values}; needed: one number, or one for each response, as in all examples"
        if not np.isfinite(np.asarray(values, np.float64)).all():
            return f"column {name!r} is {values}, which is not finite"
    return None


def _unscored(example: TokenizedExample) -> list[np.ndarray]:
    """For each response, int32 [stretch, 2]: see ExampleArrays."""
    if example.scored is None:
        return [np.zeros((0, 2), np.int32)] * len(example.responses)
    edges = (np.flatnonzero(np.diff(np.concatenate([[True], mask, [True]]))) for mask in example.scored)
    return [edge.reshape(-1, 2).astype(np.int32) for edge in edges]


def _sums(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """int32: for each part, which begins at starts[part], the sum of its values. A part may be empty."""
    return np.diff(np.concatenate([[0], np.cumsum(values, dtype=np.int64)])[starts]).astype(np.int32)


def _ints(values: Iterable[int]) -> np.ndarray:
    return np.fromiter(values, np.int32)


def _ranges(starts: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """int64: the numbers from starts[id] up to starts[id + 1] for each id, concatenated."""
    first, counts = starts[:-1][ids], np.diff(starts)[ids]
    before = np.concatenate([[0], np.cumsum(counts)])
    return np.arange(before[-1]) + np.repeat(first - before[:-1], counts)
