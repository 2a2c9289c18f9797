"""The grouped product by the platform: blocks on CPUs, Triton kernels on GPUs, `jax.lax.ragged_dot_general` on TPUs.

XLA's backends for CPUs and GPUs expand `ragged_dot_general`: they multiply every row with the matrices of all groups.
"""

from functools import partial
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import RaggedDotDimensionNumbers, ragged_dot_general

from lora_dpo_jax.models.grouped_products.blocks import BlockedProducts
from lora_dpo_jax.models.grouped_products.gpu import TritonProducts
from lora_dpo_jax.platforms import platform

Contracted = Literal[1, 2]  # an axis of the matrices


class GroupedProducts(Protocol):
    """Both products of one platform. Arrays are as in `grouped_dot`."""

    def product(
        self, rows: Array, matrices: Array, sizes: Array, *, dtype: jnp.dtype, contracted: Contracted
    ) -> Array: ...

    def sums_of_outer_products(self, rows: Array, cotangents: Array, sizes: Array) -> Array:
        """rows [row, in] and cotangents [row, out] -> float32 [group, out, in], summed over the rows of each group."""
        ...


PRODUCTS: dict[str, GroupedProducts] = {"cpu": BlockedProducts(), "gpu": TritonProducts()}  # elsewhere: XLA's


def grouped_dot(rows: Array, matrices: Array, sizes: Array, *, dtype: jnp.dtype, contracted: Contracted = 2) -> Array:
    """rows [row, in] and matrices [group, out, in] -> [row, out] in `dtype`.

    The first `sizes[0]` rows are those of group 0, the next `sizes[1]` those of group 1, and so on: int32 [group]. Rows
    that follow the last group give zeros. With `contracted=1`, rows are [row, out] and the result is [row, in].
    """
    if products := PRODUCTS.get(platform()):
        return grouped_dot_by(products, rows, matrices, sizes, dtype, contracted)
    # Contracts the last axes of both.
    dimensions = RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
    matrices = matrices if contracted == 2 else matrices.swapaxes(1, 2)
    found = ragged_dot_general(rows, matrices, sizes, dimensions, preferred_element_type=dtype)
    # What rows without a group give depends on the platform.
    return jnp.where((jnp.arange(len(found)) < sizes.sum())[:, None], found, 0)


@partial(jax.custom_vjp, nondiff_argnums=(0, 4, 5))
def grouped_dot_by(
    products: GroupedProducts, rows: Array, matrices: Array, sizes: Array, dtype: jnp.dtype, contracted: Contracted
) -> Array:
    """`grouped_dot` with the products of one platform."""
    return products.product(rows, matrices, sizes, dtype=dtype, contracted=contracted)


def _forward(products, rows, matrices, sizes, dtype, contracted):
    return grouped_dot_by(products, rows, matrices, sizes, dtype, contracted), (rows, matrices, sizes)


def _backward(products, dtype, contracted, saved, cotangent):
    rows, matrices, sizes = saved
    other = 1 if contracted == 2 else 2
    of_rows = products.product(cotangent.astype(rows.dtype), matrices, sizes, dtype=rows.dtype, contracted=other)
    factors = (rows, cotangent) if contracted == 2 else (cotangent, rows)
    return of_rows, products.sums_of_outer_products(*factors, sizes).astype(matrices.dtype), None


grouped_dot_by.defvjp(_forward, _backward)
