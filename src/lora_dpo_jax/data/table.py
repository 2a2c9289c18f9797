"""Tables of examples from several components, numbered consecutively, and how a part of them is held out."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from lora_dpo_jax.data.examples import ExampleArrays, ExampleSizes, TokenizedExample


class ExampleSource(Protocol):
    """The examples of one component: `TokenizedExamples` on disk, `MemoryExamples` in memory."""

    fingerprint: str  # hex; different examples have different fingerprints
    arrays: ExampleArrays
    prompt_hashes: np.ndarray  # uint64 [n]
    checksums: dict[str, int]  # the same for the same examples, wherever they came from

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> TokenizedExample: ...

    def origin(self, index: int, /) -> str:
        """Where the example comes from, in words."""
        ...


class ExampleTable(Sequence[TokenizedExample]):
    """Selected examples of one or more components, numbered consecutively."""

    def __init__(self, components: Mapping[str, tuple[ExampleSource, np.ndarray]], *, switch_length: int | None = None):
        """Each component comes with the indices of its examples that belong to this table.

        `switch_length` (tokens): a sequence that is longer is computed otherwise, from its first token on. Responses
        on either side of this length cannot share their prompt.
        """
        self._switch_length = switch_length
        self.names = list(components)
        self._sources = [source for source, _ in components.values()]
        self._indices = [indices for _, indices in components.values()]
        self.counts = [len(indices) for indices in self._indices]  # examples of each component
        self._starts = np.cumsum([0, *self.counts])
        self.arrays = ExampleArrays.joined([source.arrays.subset(indices) for source, indices in components.values()])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> TokenizedExample:
        source, inner = self._locate(index)
        example = source[inner]
        shares = self.sizes.shares_prompt
        return example if shares is None or shares[index] else dataclasses.replace(example, shares_prompt=False)

    def origin(self, index: int) -> str:
        """Where the example comes from: its file and row."""
        source, inner = self._locate(index)
        return source.origin(inner)

    def identity(self, index: int) -> tuple[str, int]:
        """The fingerprint of the example's component, and its number there: the same in every table."""
        source, inner = self._locate(index)
        return source.fingerprint, inner

    @functools.cached_property
    def sizes(self) -> ExampleSizes:
        if self._switch_length is None:
            return self.arrays.sizes
        return dataclasses.replace(self.arrays.sizes, shares_prompt=self.arrays.on_one_side_of(self._switch_length))

    def switching_at(self, length: int | None) -> "ExampleTable":
        """The same examples, for a model with this `switch_length`."""
        if length == self._switch_length:
            return self
        return ExampleTable(
            dict(zip(self.names, zip(self._sources, self._indices, strict=True), strict=True)), switch_length=length
        )

    @property
    def prompt_hashes(self) -> np.ndarray:
        """uint64 [example]."""
        return np.concatenate([source.prompt_hashes[indices] for source, indices in self.components])

    @property
    def components(self) -> list[tuple[ExampleSource, np.ndarray]]:
        """In the table's order: the examples of each component, and the indices of those that belong to this table."""
        return list(zip(self._sources, self._indices, strict=True))

    def subset(self, ids: np.ndarray) -> "ExampleTable":
        """Some of the examples, given by their numbers in ascending order, as a table of their own."""
        bounds = np.searchsorted(ids, self._starts)
        inner = [
            indices[ids[first:last] - start]
            for indices, start, first, last in zip(self._indices, self._starts, bounds, bounds[1:], strict=False)
        ]
        return ExampleTable(
            dict(zip(self.names, zip(self._sources, inner, strict=True), strict=True)),
            switch_length=self._switch_length,
        )

    def _locate(self, index: int) -> tuple[ExampleSource, int]:
        component = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._sources[component], int(self._indices[component][index - self._starts[component]])


def whole_table(components: Mapping[str, ExampleSource]) -> ExampleTable:
    return ExampleTable({name: (source, np.arange(len(source))) for name, source in components.items()})


def split_by_prompt(
    components: Mapping[str, ExampleSource], fraction: float, seed: int
) -> tuple[ExampleTable, ExampleTable]:
    """(train, validation). Validation has about `fraction` of the examples. No prompt of any component is in both.

    Prompts are drawn at random, each with all of its examples. Prompts with more examples than wanted are not drawn.
    """
    hashes = [np.asarray(source.prompt_hashes) for source in components.values()]
    prompts, prompt_of = np.unique(np.concatenate(hashes), return_inverse=True)
    counts, wanted = np.bincount(prompt_of, minlength=len(prompts)), round(fraction * len(prompt_of))
    order = np.random.default_rng([seed, 0x5EED]).permutation(len(prompts))
    order = order[counts[order] <= wanted]
    held_out = np.zeros(len(prompts), dtype=bool)
    held_out[order[np.cumsum(counts[order]) <= wanted]] = True
    of_components = np.split(held_out[prompt_of], np.cumsum([len(h) for h in hashes])[:-1])
    train, validation = {}, {}
    for (name, source), is_held_out in zip(components.items(), of_components, strict=True):
        train[name] = (source, np.flatnonzero(~is_held_out))
        validation[name] = (source, np.flatnonzero(is_held_out))
    return ExampleTable(train), ExampleTable(validation)


def why_none_is_held_out(train: ExampleTable, fraction: float) -> str:
    """Why `split_by_prompt` left all examples in `train`, in words."""
    if not fraction:
        return f"validation_split_fraction is {fraction}, and no component has validation data"
    if (wanted := round(fraction * len(train))) == 0:
        return f"validation_split_fraction={fraction} of {len(train):,} is less than a pair"
    prompts = np.unique(train.prompt_hashes)
    if len(prompts) == 1:
        return "all have the same prompt, and no prompt may be in both parts"
    return (
        f"no prompt may be in both parts, and each of the {len(prompts):,} prompts has more than the {wanted:,} pairs "
        f"that validation_split_fraction={fraction} is"
    )
