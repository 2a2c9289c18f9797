"""Norms, computed in float32 whatever the dtype of their input."""

from typing import Literal

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax.numpy as jnp
from haliax import NamedArray
from haliax.axis import AxisSpec

# rms: x / rms(x) * w, rounded before the product with w. rms_float32: rounded after it. rms_plus_one: (1 + w) in the
# place of w, rounded after it. layer: (x - mean) / std * w, rounded after it.
NormKind = Literal["rms", "rms_float32", "rms_plus_one", "layer"]


class Norm(hnn.RmsNorm):
    """A norm without a bias whose product with the weight is computed in float32 too."""

    offset: float = eqx.field(static=True, default=0.0)  # is added to the weight
    is_centered: bool = eqx.field(static=True, default=False)  # subtracts the mean first

    def __call__(self, x: NamedArray) -> NamedArray:
        values = x.astype(jnp.float32)
        if self.is_centered:
            values = values - hax.mean(values, axis=self.axis)
        values = values * hax.rsqrt(hax.mean(hax.square(values), axis=self.axis) + self.eps)
        assert self.weight is not None
        return ((self.weight.astype(jnp.float32) + self.offset) * values).rearrange(x.axes).astype(x.dtype)


def norm(kind: NormKind, axis: AxisSpec, eps: float) -> hnn.RmsNorm:
    if kind == "rms":
        return hnn.RmsNorm.init(axis, eps=eps, use_bias=False, dtype=jnp.float32)
    offset = 1.0 if kind == "rms_plus_one" else 0.0
    return Norm(axis, hax.ones(axis), None, eps, jnp.float32, offset=offset, is_centered=kind == "layer")
