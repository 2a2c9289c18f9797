"""Dropout on the input of adapters. What a token drops does not depend on its row, micro-batch or device."""

import functools
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import haliax as hax
import jax
from haliax import Axis, NamedArray


class TokenKey(eqx.Module):
    """A random key. Each token draws from it by its own numbers, not by its place in the batch."""

    key: jax.Array
    token: tuple[NamedArray, ...]  # int32, all with the same axes: together they identify a token

    def split(self, count: int) -> list["TokenKey"]:
        return [TokenKey(key, self.token) for key in jax.random.split(self.key, count)]

    def bernoulli(self, shape: tuple[Axis, ...], p: float) -> NamedArray:
        """bool {shape}. Each token draws values over the axes that `token` lacks."""
        tokens = self.token[0].axes
        features = tuple(axis for axis in shape if axis not in tokens)

        def draw(*numbers: jax.Array) -> jax.Array:
            key = functools.reduce(jax.random.fold_in, numbers, self.key)
            return jax.random.bernoulli(key, p, tuple(axis.size for axis in features))

        draw_all = functools.reduce(lambda draw, _: jax.vmap(draw), tokens, draw)
        drawn = hax.named(draw_all(*(number.array for number in self.token)), (*tokens, *features))
        return hax.auto_sharded(drawn.rearrange(shape))


def split_key(key: TokenKey | None, count: int) -> Sequence[TokenKey | None]:
    return [None] * count if key is None else key.split(count)


def dropout(x: NamedArray, rate: float, key: Any) -> NamedArray:
    """`x` with a fraction `rate` of its entries set to zero and the others scaled up. `key`: JAX's or a `TokenKey`."""
    draw = key.bernoulli if isinstance(key, TokenKey) else functools.partial(hax.random.bernoulli, key)
    return hax.where(draw(p=1 - rate, shape=x.axes), x / x.dtype.type(1 - rate), 0)
