"""Products of rows, sorted by group, with the matrix of their group: `jax.lax.ragged_dot_general`, or blocks on CPUs.

XLA's CPU backend multiplies all rows with the matrices of all groups. Here each group's rows are multiplied with its
matrix alone, a block at a time. A group's last block may reach into the rows of the next group, which overwrites them.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import RaggedDotDimensionNumbers, fori_loop, ragged_dot_general

from lora_dpo_jax.platforms import platform

LARGEST_BLOCK, SMALLEST_BLOCK = 128, 16  # rows


def grouped_dot(rows: Array, matrices: Array, sizes: Array, *, dtype: jnp.dtype) -> Array:
    """rows [row, in] and matrices [group, out, in] -> [row, out] in `dtype`.

    The first `sizes[0]` rows are those of group 0, the next `sizes[1]` those of group 1, and so on: int32 [group]. Rows
    that follow the last group give zeros.
    """
    if platform() == "cpu":
        return _in_blocks(rows, matrices, sizes, dtype)
    # Contracts the last axes of both.
    dimensions = RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
    found = ragged_dot_general(rows, matrices, sizes, dimensions, preferred_element_type=dtype)
    # What rows without a group give depends on the platform.
    return _without_rest(found, sizes)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _in_blocks(rows: Array, matrices: Array, sizes: Array, dtype: jnp.dtype) -> Array:
    num_rows, size = len(rows), _block_size(len(rows), len(sizes))
    rows = jnp.pad(rows, ((0, size), (0, 0)))
    starts = jnp.cumsum(sizes) - sizes

    def of_group(group, found):
        matrix = jax.lax.dynamic_index_in_dim(matrices, group, keepdims=False)

        def of_block(number, found):
            first = starts[group] + number * size
            block = jax.lax.dynamic_slice_in_dim(rows, first, size)
            product = jnp.einsum("ri,oi->ro", block, matrix, preferred_element_type=dtype)
            return jax.lax.dynamic_update_slice_in_dim(found, product, first, 0)

        return fori_loop(0, _num_blocks(sizes[group], size), of_block, found)

    found = jnp.zeros((num_rows + size, matrices.shape[1]), dtype)
    return _without_rest(fori_loop(0, len(sizes), of_group, found)[:num_rows], sizes)


def _forward(rows, matrices, sizes, dtype):
    return _in_blocks(rows, matrices, sizes, dtype), (rows, matrices, sizes)


def _backward(dtype, saved, cotangent):
    rows, matrices, sizes = saved
    of_rows = _in_blocks(cotangent.astype(rows.dtype), matrices.swapaxes(1, 2), sizes, rows.dtype)
    return of_rows, _sums_of_outer_products(rows, cotangent, sizes).astype(matrices.dtype), None


_in_blocks.defvjp(_forward, _backward)


def _sums_of_outer_products(rows: Array, cotangents: Array, sizes: Array) -> Array:
    """The gradients of the matrices, float32 [group, out, in]."""
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


def _without_rest(found: Array, sizes: Array) -> Array:
    return jnp.where((jnp.arange(len(found)) < sizes.sum())[:, None], found, 0)
