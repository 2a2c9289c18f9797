"""Grouped products on GPUs: Pallas kernels for Triton. Each program multiplies rows of one group with its matrix alone.

Rows are cut into tiles, none of which holds rows of two groups. There are never more than `_num_tiles` of them, so the
number of programs does not depend on the data, and those left over have nothing to do. Kernels take whole arrays, which
in Triton are only addresses. Matrices are read in the order of their axes, whichever is contracted.

`haliax.nn.ragged_dot` takes matrices [group, in, out], so ours would be copied in that order, and rows are padded to a
multiple of 512. It starts a program for each tile of all rows and each group, of which most are empty.
"""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from lora_dpo_jax.models.attention.packed_blocks import dot

SMALLEST_BLOCK = 16  # of a product of Triton
NONE = -1  # no matrix
STRIP = 8  # tiles that run beside each other for the same columns, so that both factors stay in the cache


@dataclass(frozen=True)
class TritonProducts:
    """`GroupedProducts` for GPUs. Blocks of float32, which no tensor core multiplies, have sides half as long."""

    largest_block: int = 128  # rows of a tile, and columns of its result; a power of two
    interpret: bool = False
    reads_stacks: ClassVar[bool] = True

    def product(
        self,
        rows: Array,
        matrices: Array,
        sizes: Array,
        *,
        dtype: jnp.dtype,
        contracted: int,
        first: Array | int = 0,
    ) -> Array:
        num_rows, inner = rows.shape
        columns, largest = matrices.shape[3 - contracted], self._largest(rows)
        # Half as long as a middle group, because on average half of a group's last tile is empty.
        block_m = _block(pl.cdiv(num_rows, 2 * len(sizes)), largest)
        block_n, block_k = _block(columns, largest), _block(inner, largest // 2)
        tiles = _tiles(sizes, num_rows, block_m, first)
        strip = min(STRIP, len(tiles[0]))
        kernel = functools.partial(_product_kernel, blocks=(block_m, block_n, block_k), contracted=contracted)
        return self._call(
            kernel,
            "product",
            grid=(strip, pl.cdiv(columns, block_n), len(tiles[0]) // strip),
            out_shape=jax.ShapeDtypeStruct((num_rows, columns), dtype),
        )(*tiles, rows, matrices)

    def sums_of_outer_products(self, rows: Array, cotangents: Array, sizes: Array) -> Array:
        largest = self._largest(rows) // 2
        (num_rows, num_in), num_out = rows.shape, cotangents.shape[1]
        block_k, block_m, block_n = (_block(size, largest) for size in (num_rows, num_out, num_in))
        stops = jnp.cumsum(sizes)
        return self._call(
            functools.partial(_outer_products_kernel, blocks=(block_m, block_n, block_k)),
            "outer_products",
            grid=(pl.cdiv(num_in, block_n), pl.cdiv(num_out, block_m), len(sizes)),
            out_shape=jax.ShapeDtypeStruct((len(sizes), num_out, num_in), jnp.float32),
        )(stops - sizes, stops, rows, cotangents.astype(rows.dtype))

    def _largest(self, rows: Array) -> int:
        return self.largest_block if rows.dtype.itemsize <= 2 else self.largest_block // 2

    def _call(self, kernel: Any, name: str, grid: tuple[int, ...], out_shape: Any) -> Any:
        return pl.pallas_call(
            kernel,
            grid=grid,
            out_shape=out_shape,
            compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
            interpret=self.interpret,
            name=f"grouped_{name}",
        )


def _block(size: int, largest: int) -> int:
    return max(SMALLEST_BLOCK, min(largest, pl.next_power_of_2(size)))


def _num_tiles(num_rows: int, num_groups: int, block: int) -> int:
    """At most: of each group one tile may have a single row."""
    return (num_rows + num_groups * (block - 1)) // block


def _tiles(sizes: Array, num_rows: int, block: int, first_matrix: Array | int) -> tuple[Array, Array, Array]:
    """The matrix, the first row, and the row after the last of each tile, int32 [tile]. Some tiles have no rows.

    Tiles of the rows after the last group have the matrix NONE. The number of tiles is a multiple of STRIP, or less.
    """
    num_groups = len(sizes)
    sizes = jnp.append(sizes, num_rows - sizes.sum())
    total = _num_tiles(num_rows, len(sizes), block)
    if total > STRIP:
        total = pl.cdiv(total, STRIP) * STRIP
    counts = pl.cdiv(sizes, block)
    stops, last_tiles, tiles = jnp.cumsum(sizes), jnp.cumsum(counts), jnp.arange(total, dtype=jnp.int32)
    group = jnp.searchsorted(last_tiles, tiles, side="right", method="compare_all")
    group = jnp.minimum(group, num_groups).astype(jnp.int32)
    first = (stops - sizes)[group] + (tiles - (last_tiles - counts)[group]) * block
    return jnp.where(group < num_groups, group + first_matrix, NONE), first, stops[group]


def _product_kernel(numbers, firsts, stops, rows, matrices, out, *, blocks: tuple[int, int, int], contracted: int):
    block_m, block_n, block_k = blocks
    tile = pl.program_id(2) * pl.num_programs(0) + pl.program_id(0)
    number, first, stop = numbers[tile], firsts[tile], stops[tile]
    column = pl.program_id(1) * block_n
    of_tile, of_columns = pl.ds(first, block_m), pl.ds(column, block_n)
    mine, inside = _before(first, block_m, stop), _inside(column, block_n, out.shape[1])

    def add(step, total):
        inner = step * block_k
        of_inner, exists = pl.ds(inner, block_k), _inside(inner, block_k, rows.shape[1])
        left = _load(rows.at[of_tile, of_inner], mine, exists)
        if contracted == 2:
            return total + dot(left, _load(matrices.at[number, of_columns, of_inner], inside, exists), (1, 1))
        return total + dot(left, _load(matrices.at[number, of_inner, of_columns], exists, inside))

    has_work = (first < stop) & (number != NONE)
    count = has_work.astype(jnp.int32) * pl.cdiv(rows.shape[1], block_k)
    total = jax.lax.fori_loop(0, count, add, jnp.zeros((block_m, block_n)))
    _store(out.at[of_tile, of_columns], total, mine, inside)


def _outer_products_kernel(firsts, stops, rows, cotangents, out, *, blocks: tuple[int, int, int]):
    block_m, block_n, block_k = blocks
    group, row, column = pl.program_id(2), pl.program_id(1) * block_m, pl.program_id(0) * block_n
    first, stop = firsts[group], stops[group]
    of_out, of_in = pl.ds(row, block_m), pl.ds(column, block_n)
    in_out, in_in = _inside(row, block_m, out.shape[1]), _inside(column, block_n, out.shape[2])

    def add(step, total):
        begin = first + step * block_k
        here, mine = pl.ds(begin, block_k), _before(begin, block_k, stop)
        left, right = _load(cotangents.at[here, of_out], mine, in_out), _load(rows.at[here, of_in], mine, in_in)
        return total + dot(left, right, (0, 0))

    count = pl.cdiv(stop - first, block_k)
    total = jax.lax.fori_loop(0, count, add, jnp.zeros((block_m, block_n)))
    _store(out.at[group, of_out, of_in], total, in_out, in_in)


def _before(first: Any, size: int, stop: Any) -> Array:
    """Which of `size` indices from `first` on come before `stop`."""
    return first + jnp.arange(size) < stop


def _inside(first: Any, size: int, length: int) -> Array | None:
    """The same for the edge of an array; nothing if no block crosses it."""
    return _before(first, size, length) if length % size else None


def _mask(rows: Array | None, columns: Array | None) -> Array | None:
    if rows is not None and columns is not None:
        return rows[:, None] & columns[None]
    if rows is not None:
        return rows[:, None]
    return None if columns is None else columns[None]


def _load(ref: Any, rows: Array | None, columns: Array | None) -> Array:
    """A block of an array, with zeros where one of the masks says no."""
    mask = _mask(rows, columns)
    return plgpu.load(ref, mask=mask, other=None if mask is None else 0)


def _store(ref: Any, block: Array, rows: Array | None, columns: Array | None) -> None:
    plgpu.store(ref, block.astype(ref.dtype), mask=_mask(rows, columns))
