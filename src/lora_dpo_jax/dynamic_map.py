"""The dynamic 8-bit maps of https://arxiv.org/abs/1511.04561, as in bitsandbytes: numbers from -1 to 1 as uint8.

For i from 0 to 6, evenly spaced values lie between 10^(i - 7) and 10^(i - 6): 2^i of them on either side of zero in the
signed map, 2^(i + 1) above zero in the unsigned one. Both are sorted. Code 127 of the signed map, and code 0 of the
unsigned one, stand for zero. The largest code, 255, stands for 1.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_dpo_jax.platforms import platform


def dynamic_value(codes: jax.Array, *, signed: bool = True) -> jax.Array:
    """float32: the values that the codes, uint8, stand for."""
    if platform() == "tpu":  # where gathers are slow
        return _values(codes, signed, xp=jnp)
    table = DYNAMIC_MAP if signed else UNSIGNED_MAP
    return jnp.asarray(table).at[codes].get(mode="promise_in_bounds")


def dynamic_code(values: jax.Array, *, signed: bool = True) -> jax.Array:
    """uint8: the codes whose values are nearest to `values`, float32 in [-1, 1] or, if not signed, in [0, 1].

    Of two values that are equally near, rounding decides.
    """
    size, decades = jnp.abs(values), list(_decades(signed))
    distance = jnp.zeros(size.shape, jnp.int32)
    below = 0.0  # the largest value of the decade below
    for decade in decades:
        inside = jnp.floor((size - decade.start) / decade.spacing).astype(jnp.int32)
        code = decade.first + jnp.clip(inside, 0, decade.count - 1)
        smallest = decade.start + decade.spacing / 2
        distance = jnp.where(size > (below + smallest) / 2, code, distance)
        below = decade.start + decade.spacing * (decade.count - 0.5)
    last = decades[-1].first + decades[-1].count
    distance = jnp.where(size > (below + 1.0) / 2, last, distance)
    if not signed:
        return distance.astype(jnp.uint8)
    # The signed map has 127 codes below zero and 128 above it: its smallest value is not -1.
    return jnp.where(values < 0, 127 - jnp.minimum(distance, 127), 127 + distance).astype(jnp.uint8)


class _Decade(NamedTuple):
    first: int  # the code of the smallest value, counted from the code of zero
    count: int
    start: float  # the lower end
    spacing: float


def _decades(signed: bool) -> Iterator[_Decade]:
    for i in range(7):
        count = 2**i if signed else 2 ** (i + 1)
        end = 10.0 ** (i - 6)
        yield _Decade(count if signed else count - 1, count, 0.1 * end, 0.9 * end / count)


def _values(codes: Any, signed: bool, xp: Any = np) -> Any:
    signs = codes.astype(xp.float32) - (127 if signed else 0)
    distance = abs(signs)
    value = xp.zeros_like(signs)
    for i, (first, count, _, _) in enumerate(_decades(signed)):
        decade, step = 10.0 ** (i - 6), 0.9 / count
        inside = (distance - first) * xp.float32(decade * step) + xp.float32(decade * (0.1 + step / 2))
        value = xp.where(distance >= first, inside, value)
    return xp.sign(signs) * xp.where(distance == (128 if signed else 255), xp.float32(1.0), value)


DYNAMIC_MAP: np.ndarray = _values(np.arange(256), True)
UNSIGNED_MAP: np.ndarray = _values(np.arange(256), False)
