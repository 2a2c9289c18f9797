"""The grouped product by the platform: blocks on CPUs, Triton kernels on GPUs, `jax.lax.ragged_dot_general` on TPUs.

XLA's backends for CPUs and GPUs expand `ragged_dot_general`: they multiply every row with the matrices of all groups.
"""

from functools import partial
from typing import ClassVar, Literal, Protocol

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

    reads_stacks: ClassVar[bool]  # whether it saves a copy to hand on the matrices of all layers

    def product(
        self,
        rows: Array,
        matrices: Array,
        sizes: Array,
        *,
        dtype: jnp.dtype,
        contracted: Contracted,
        first: Array | int = 0,
    ) -> Array:
        """Matrices may be more than groups. `first` is the number of the first group's."""
        ...

    def sums_of_outer_products(self, rows: Array, cotangents: Array, sizes: Array) -> Array:
        """rows [row, in] and cotangents [row, out] -> float32 [group, out, in], summed over the rows of each group."""
        ...


PRODUCTS: dict[str, GroupedProducts] = {"cpu": BlockedProducts(), "gpu": TritonProducts()}  # elsewhere: XLA's


def reads_stacks() -> bool:
    """Whether kernels read a layer's matrices in place: on GPUs, if no array is split over devices."""
    mesh, products = jax.sharding.get_abstract_mesh(), PRODUCTS.get(platform())
    return products is not None and products.reads_stacks and (mesh.empty or mesh.size == 1)


def grouped_dot(
    rows: Array,
    matrices: Array,
    sizes: Array,
    *,
    dtype: jnp.dtype,
    contracted: Contracted = 2,
    layer: Array | None = None,
) -> Array:
    """rows [row, in] and matrices [group, out, in] -> [row, out] in `dtype`.

    The first `sizes[0]` rows are those of group 0, the next `sizes[1]` those of group 1, and so on: int32 [group]. Rows
    that follow the last group give zeros. With `contracted=1`, rows are [row, out] and the result is [row, in].

    With the number of a layer, int32 [], matrices are [layer, group, out, in]. There is no gradient then.
    """
    products = PRODUCTS.get(platform())
    if products is not None and layer is not None:
        every, first = matrices.reshape(-1, *matrices.shape[2:]), layer * len(sizes)
        return products.product(rows, every, sizes, dtype=dtype, contracted=contracted, first=first)
    if products is not None:
        return grouped_dot_by(products, rows, matrices, sizes, dtype, contracted)
    if layer is not None:
        matrices = jax.lax.dynamic_index_in_dim(matrices, layer, keepdims=False)
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
