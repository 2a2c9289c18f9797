"""Tokenized examples that a script holds in memory."""

import dataclasses
import hashlib
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from lora_dpo_jax.data.examples import PAIR, ExampleArrays, TokenizedExample


class MemoryExamples(Sequence[TokenizedExample]):
    """Examples in memory, with the interface of `TokenizedExamples`.

    Each is a `TokenizedExample`, or a pair (prompt, chosen, rejected) of token ids. Raises ValueError for a part that
    is empty or does not hold ids. A prompt needs a token from which the first token of a response is predicted.
    """

    def __init__(self, examples: Iterable[TokenizedExample | Sequence[ArrayLike]], name: str = "memory"):
        self.name = name
        self.examples = [self._checked(number, example) for number, example in enumerate(examples)]
        self.arrays = ExampleArrays.of(self.examples, self.origin)
        self.prompt_hashes = np.array([example.prompt_hash for example in self.examples], np.uint64)
        tokens = b"".join(part.astype("<i4").tobytes() for example in self.examples for part in example.parts)
        shapes = self.arrays.to_bytes()
        self.checksums = {"tokens": zlib.crc32(tokens), "lengths": zlib.crc32(shapes)}
        self.fingerprint = hashlib.sha256(shapes + tokens).hexdigest()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]

    def origin(self, index: int) -> str:
        return f"{self.name}, row {index}"

    def _checked(self, number: int, example: TokenizedExample | Sequence[ArrayLike]) -> TokenizedExample:
        if not isinstance(example, TokenizedExample):
            if len(example) != 3:
                raise ValueError(
                    f"{self.origin(number)}: a pair is (prompt, chosen, rejected), but has {len(example)} parts"
                )
            prompt, *responses = (np.asarray(part) for part in example)
            example = TokenizedExample(prompt, tuple(responses), PAIR)
        names = ["prompt", *(f"response {k}" for k in range(1, len(example.responses) + 1))]
        if example.is_pair:
            names = ["prompt", "chosen", "rejected"]
        if not example.responses:
            raise ValueError(f"{self.origin(number)}: an example needs at least one response")
        parts = [self._ids(number, name, part) for name, part in zip(names, example.parts, strict=True)]
        scored = None if example.scored is None else tuple(map(np.asarray, example.scored))
        return dataclasses.replace(example, prompt=parts[0], responses=tuple(parts[1:]), scored=scored)

    def _ids(self, number: int, name: str, part: ArrayLike) -> np.ndarray:
        ids = np.asarray(part)
        if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0:
            raise ValueError(
                f"{self.origin(number)}: {name} must be one or more token ids, but is of shape {ids.shape} and "
                f"{ids.dtype}: {ids}"
            )
        return ids.astype(np.int32)
