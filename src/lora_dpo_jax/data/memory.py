"""Tokenized pairs that a script holds in memory."""

import hashlib
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from lora_dpo_jax.data.chat import TokenizedPair


class MemoryPairs(Sequence[TokenizedPair]):
    """All that `TokenizedPairs` offers of pairs on disk, of (prompt, chosen, rejected), token ids each.

    Raises ValueError for a part that does not hold ids, or holds none: a prompt needs at least the token that the first
    one of a response is predicted from.
    """

    def __init__(self, pairs: Iterable[Sequence[ArrayLike]], name: str = "memory"):
        self.name = name
        self.pairs = [TokenizedPair(*self._parts(number, pair)) for number, pair in enumerate(pairs)]
        self.lengths = np.array([[len(part) for part in pair] for pair in self.pairs], np.int32).reshape(-1, 3)
        self.prompt_hashes = np.array([pair.prompt_hash for pair in self.pairs], np.uint64)
        tokens = b"".join(part.astype("<i4").tobytes() for pair in self.pairs for part in pair)
        lengths = self.lengths.astype("<i4").tobytes()
        self.checksums = {"tokens": zlib.crc32(tokens), "lengths": zlib.crc32(lengths)}
        self.fingerprint = hashlib.sha256(lengths + tokens).hexdigest()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index):
        return self.pairs[index]

    def origin(self, index: int) -> str:
        return f"{self.name}, row {index}"

    def _parts(self, number: int, pair: Sequence[ArrayLike]) -> list[np.ndarray]:
        if len(pair) != 3:
            raise ValueError(f"{self.origin(number)}: a pair is (prompt, chosen, rejected), but has {len(pair)} parts")
        parts = [np.asarray(part) for part in pair]
        for name, part in zip(TokenizedPair._fields, parts, strict=True):
            if part.ndim != 1 or part.size == 0 or not np.issubdtype(part.dtype, np.integer) or part.min() < 0:
                raise ValueError(
                    f"{self.origin(number)}: {name} must be one or more token ids, but is of shape {part.shape} and "
                    f"{part.dtype}: {part}"
                )
        return [part.astype(np.int32) for part in parts]
