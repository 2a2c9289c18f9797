"""Single answers, each with the answer to another prompt as a second response, to estimate a KL divergence.

    example       prompt 0               prompt 1               prompt 2
    responses     answer 0, answer 2     answer 1, answer 0     answer 2, answer 1
    label         1, -1                  0, -1                  1, -1

Each answer of the table is the second response of one example. The pairing is of the whole table and of the seed, so
no batch, order or layout changes it, and the log-probs of the reference are computed once for all steps.
"""

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_dpo_jax.columns import LABEL, MISMATCHED
from lora_dpo_jax.data.examples import Column, ExampleArrays, TokenizedExample
from lora_dpo_jax.data.table import ExampleSource, ExampleTable

logger = logging.getLogger(__name__)

VERSION = 1  # increase it when the same table and seed would get other answers


def with_mismatched_answers(table: ExampleTable, *, seed: int, longest: int) -> ExampleTable:
    """The table, whose examples have a second response. All must have one response with a label.

    A second response is cut where prompt and response would be more than `longest` tokens; if none of the tokens that
    are left is one to score, all of them are scored. Warns if some prompts are
    so frequent that their answers are paired with each other.
    """
    if not len(table):
        return table
    hashes = [source.prompt_hashes[indices] for source, indices in table.components]
    partners = _partners(np.concatenate(hashes), seed)
    identity = hashlib.sha256(f"{VERSION} {longest}".encode() + partners.astype("<i8").tobytes())
    for source, indices in table.components:
        identity.update(source.fingerprint.encode() + np.asarray(indices, "<i8").tobytes())
    components, start = {}, 0
    for name, (source, indices) in zip(table.names, table.components, strict=True):
        mine = partners[start : start + len(indices)]
        components[name] = (MismatchedAnswers(source, indices, table, mine, longest, identity.hexdigest()), indices)
        start += len(indices)
    return ExampleTable(components)


class MismatchedAnswers(Sequence[TokenizedExample]):
    """An `ExampleSource`: those of another one, with second responses. Examples outside of the table get their own."""

    def __init__(
        self,
        source: ExampleSource,
        indices: np.ndarray,
        table: ExampleTable,
        partners: np.ndarray,
        longest: int,
        identity: str,
    ):
        """`partners`, int64: the number in `table` of the example whose answer each of `indices` gets."""
        self.source, self.table, self.longest = source, table, longest
        self.partner = np.full(len(source), -1)  # its number in the table; -1: the example itself
        self.partner[indices] = partners
        self.prompt_hashes, self.checksums = source.prompt_hashes, source.checksums
        self.fingerprint = hashlib.sha256(f"{identity} {source.fingerprint}".encode()).hexdigest()
        self.arrays = self._arrays()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index):
        example, partner = self.source[index], self.partner[index]
        other = example if partner < 0 else self.table[int(partner)]
        columns = {}
        for name, column in self.arrays.columns.items():
            mine: Any = example.columns[name]
            of_other: Any = [MISMATCHED] if name == LABEL else other.columns[name]
            columns[name] = [*mine, *of_other] if column.per_response else mine
        response = other.responses[0][: max(self.longest - len(example.prompt), 1)]
        scored = None
        if example.scored is not None or other.scored is not None:
            mask = _mask_of(other)[: len(response)]
            scored = (_mask_of(example), mask if mask.any() else ~mask)
        return TokenizedExample(example.prompt, (*example.responses, response), columns=columns, scored=scored)

    def origin(self, index: int, /) -> str:
        return self.source.origin(index)

    def _arrays(self) -> ExampleArrays:
        mine, numbers = self.source.arrays, np.arange(len(self.source))
        partners = np.where(self.partner < 0, numbers, len(mine) + self.partner)
        # The own response of each example, then the mismatched one.
        both = ExampleArrays.joined([mine, self.table.arrays]).subset(np.column_stack([numbers, partners]).reshape(-1))
        tokens = both.response_tokens.copy()
        tokens[1::2] = np.minimum(tokens[1::2], np.maximum(self.longest - mine.prompt_tokens, 1))
        columns = {name: column if column.per_response else mine.columns[name] for name, column in both.columns.items()}
        labels = columns[LABEL].values.copy()
        labels[1::2] = MISMATCHED
        return ExampleArrays(
            mine.prompt_tokens,
            np.full(len(mine), 2, np.int32),
            tokens,
            mine.comparison_counts,
            mine.comparisons,
            mine.weights,
            *_unscored_of_cut(both, tokens),
            columns | {LABEL: Column(labels, per_response=True)},
        )


def _mask_of(example: TokenizedExample) -> np.ndarray:
    """bool [token]: what is scored of its first response."""
    return np.ones(len(example.responses[0]), bool) if example.scored is None else example.scored[0]


def _unscored_of_cut(arrays: ExampleArrays, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`unscored_counts` and `unscored` where responses are cut to these numbers of tokens, int32 [response].

    What is left of a response is scored as a whole if none of it was to be scored.
    """
    response = np.repeat(np.arange(len(tokens)), arrays.unscored_counts)
    stretches = np.minimum(arrays.unscored, tokens[response][:, None])
    lengths = np.diff(stretches).ravel()
    unscored = np.bincount(response, weights=lengths, minlength=len(tokens))
    remain = (lengths > 0) & (unscored < tokens)[response]
    return np.bincount(response[remain], minlength=len(tokens)).astype(np.int32), stretches[remain]


def _partners(prompts: np.ndarray, seed: int) -> np.ndarray:
    """For each example, the number of another one with another prompt, int64. Each is taken once.

    Examples are put in order by prompt, prompts in a random order, and turned by as many places as the most frequent
    prompt has. `prompts` are hashes.
    """
    _, prompt, counts = np.unique(prompts, return_inverse=True, return_counts=True)
    place = np.random.default_rng([seed, 0x4B544F]).permutation(len(counts))
    order = np.argsort(place[prompt], kind="stable")
    turn = min(int(counts.max()), max(len(prompts) // 2, 1))
    partners = np.empty(len(prompts), np.int64)
    partners[order] = np.roll(order, turn)
    if alike := int((prompts[partners] == prompts).sum()):
        logger.warning(
            "%s of %s answers are paired with an answer to the same prompt, because too many have that prompt: the "
            "estimate of the KL divergence counts them as answers to other prompts",
            f"{alike:,}",
            f"{len(prompts):,}",
        )
    return partners
