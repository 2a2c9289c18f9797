"""Grouped products on CPUs: each group's rows are multiplied with its matrix alone, a block at a time.

A group's last block may reach into the rows of the next group, which overwrites them.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import fori_loop

LARGEST_BLOCK, SMALLEST_BLOCK = 128, 16  # rows


@dataclass(frozen=True)
class BlockedProducts:
    """`GroupedProducts` for CPUs."""

    reads_stacks: ClassVar[bool] = False

    def product(
        self, rows: Array, matrices: Array, sizes: Array, *, dtype: jnp.dtype, contracted: int, first: Array | int = 0
    ) -> Array:
        matrices = matrices if contracted == 2 else matrices.swapaxes(1, 2)
        num_rows, size = len(rows), _block_size(len(rows), len(sizes))
        rows = jnp.pad(rows, ((0, size), (0, 0)))
        starts = jnp.cumsum(sizes) - sizes

        def of_group(group, found):
            matrix = jax.lax.dynamic_index_in_dim(matrices, first + group, keepdims=False)

            def of_block(number, found):
                begin = starts[group] + number * size
                block = jax.lax.dynamic_slice_in_dim(rows, begin, size)
                product = jnp.einsum("ri,oi->ro", block, matrix, preferred_element_type=dtype)
                return jax.lax.dynamic_update_slice_in_dim(found, product, begin, 0)

            return fori_loop(0, _num_blocks(sizes[group], size), of_block, found)

        found = jnp.zeros((num_rows + size, matrices.shape[1]), dtype)
        found = fori_loop(0, len(sizes), of_group, found)[:num_rows]
        return jnp.where((jnp.arange(num_rows) < sizes.sum())[:, None], found, 0)

    def sums_of_outer_products(self, rows: Array, cotangents: Array, sizes: Array) -> Array:
        size = _block_size(len(rows), len(sizes))
        rows, cotangents = (jnp.pad(x, ((0, size), (0, 0))) for x in (rows, cotangents))
        starts = jnp.cumsum(sizes) - sizes

        def of_group(group):
            def of_block(number, total):
                first = number * size
                is_mine = (first + jnp.arange(size) < sizes[group])[:, None]
                blocks = (jax.lax.dynamic_slice_in_dim(x, starts[group] + first, size) for x in (rows, cotangents))
                block, its = (jnp.where(is_mine, x, 0) for x in blocks)
                return total + jnp.einsum("ro,ri->oi", its, block, preferred_element_type=jnp.float32)

            zeros = jnp.zeros((cotangents.shape[1], rows.shape[1]), jnp.float32)
            return fori_loop(0, _num_blocks(sizes[group], size), of_block, zeros)

        return jax.lax.map(of_group, jnp.arange(len(sizes)))


def _block_size(num_rows: int, num_groups: int) -> int:
    """A quarter of the rows of a group of middle size: larger blocks are faster, and reach farther into the next."""
    quarter = num_rows // (4 * num_groups) // SMALLEST_BLOCK * SMALLEST_BLOCK
    return max(SMALLEST_BLOCK, min(LARGEST_BLOCK, quarter))


def _num_blocks(size: Array, block: int) -> Array:
    return (size + block - 1) // block
