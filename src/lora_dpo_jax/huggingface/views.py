"""Tensors made of others that lie in files: with zeros, transposed, or joined. Indexed and described as a `LazyTensor`.

Indexing takes slices, one for each of the first dimensions. Only what these need is read, except for padded tensors.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_dpo_jax.huggingface.tensors import LazyTensor, TensorInfo

Index = tuple[slice, ...]


@dataclass(frozen=True)
class PaddedTensor:
    """A tensor whose dimensions each combine axes of the sizes `has`, with zeros at the end of axes up to `shape`."""

    inner: LazyTensor
    has: tuple[tuple[int, ...], ...]
    shape: tuple[tuple[int, ...], ...]

    def __getitem__(self, index: Index) -> np.ndarray:
        has, shape = ([size for side in sides for size in side] for sides in (self.has, self.shape))
        values = self.inner[()].reshape(has)
        padded = np.pad(values, [(0, size - own) for own, size in zip(has, shape, strict=True)])
        return padded.reshape([math.prod(side) for side in self.shape])[index]


@dataclass(frozen=True)
class TransposedTensor:
    """The last two dimensions of a tensor {matrix, row, column} are exchanged."""

    inner: Any

    @property
    def info(self) -> TensorInfo:
        count, rows, columns = self.inner.info.shape
        return dataclasses.replace(self.inner.info, shape=(count, columns, rows))

    def __getitem__(self, index: Index) -> np.ndarray:
        matrices, rows, columns = (*index, *[slice(None)] * (3 - len(index)))
        return self.inner[matrices, columns, rows].swapaxes(1, 2)


@dataclass(frozen=True)
class JoinedTensor:
    """A tensor {matrix, row, column} of matrices that lie below each other: by (matrix, place among them)."""

    parts: Mapping[tuple[int, int], LazyTensor]

    @property
    def info(self) -> TensorInfo:
        count, places = (max(at) + 1 for at in zip(*self.parts, strict=True))
        first = self.parts[0, 0].info
        rows, columns = first.shape
        return dataclasses.replace(first, shape=(count, places * rows, columns))

    def __getitem__(self, index: Index) -> np.ndarray:
        count, rows, _ = self.info.shape
        matrices, cut, columns = (*index, *[slice(None)] * (3 - len(index)))
        start, stop, _ = cut.indices(rows)
        return np.stack([self._rows(matrix, start, stop, columns) for matrix in range(count)[matrices]])

    def _rows(self, matrix: int, start: int, stop: int, columns: slice) -> np.ndarray:
        height = self.parts[0, 0].info.shape[0]
        found = []
        for place in range(start // height, -(-stop // height)):
            before = place * height
            within = slice(max(start - before, 0), min(stop - before, height))
            found.append(self.parts[matrix, place][within, columns])
        return np.concatenate(found)
