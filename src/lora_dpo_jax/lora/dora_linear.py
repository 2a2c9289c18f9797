"""DoRA (https://arxiv.org/abs/2402.09353): a low-rank change of the direction of each row, and a length of its own."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
import jax.numpy as jnp
from haliax import NamedArray

from lora_dpo_jax.axes import RANK
from lora_dpo_jax.lora.adapter import Adapter, ByLayer, Factor, names_of, stack_axes
from lora_dpo_jax.lora.config import LoraConfig
from lora_dpo_jax.lora.dropout import dropout
from lora_dpo_jax.lora.initialization import new_factors
from lora_dpo_jax.lora.lora_linear import low_rank_factors, low_rank_product, with_low_rank
from lora_dpo_jax.lora.matrices import of_matrices
from lora_dpo_jax.tensor_names import axes_of


class DoraLinear(Adapter):
    """y = m / |V| * V x with V = W + scaling * B A, and |V| the norm of each row, which gets no gradient (section 4.3).

    It is computed as W x plus a change that is exactly zero as long as B A is zero and m is as it was: |V| is the root
    of |W|^2 plus terms with B A, and m counts as |W| plus its change, whatever the dtype that m is rounded to.
    """

    wrapped: hnn.Linear
    lora_A: NamedArray  # {*stack, lora_rank, *In}
    lora_B: NamedArray  # {*stack, *Out, lora_rank}
    lora_magnitude_vector: NamedArray  # {*stack, *Out}: m
    base_norm: NamedArray  # float32 {*stack, *Out}: the norms of the rows of W
    scaling: float = eqx.field(static=True)
    dropout: float = eqx.field(static=True, default=0.0)
    by_layer: ByLayer | None = None

    @classmethod
    def init(cls, layer: hnn.Linear, config: LoraConfig, by_layer: ByLayer | None, *, key) -> "DoraLinear":
        lora_A, lora_B = new_factors(layer, config, by_layer, key=key)
        norm = row_norms(layer)
        return DoraLinear(
            layer,
            lora_A=lora_A,
            lora_B=lora_B,
            lora_magnitude_vector=jax.tree.map(jnp.copy, norm),
            base_norm=norm,
            scaling=config.scaling,
            dropout=config.dropout,
            by_layer=by_layer,
        )

    @property
    def factors(self) -> dict[str, Factor]:
        magnitude = Factor(self.lora_magnitude_vector, (names_of(self.wrapped.Out),))
        return low_rank_factors(self) | {"lora_magnitude_vector": magnitude}

    @property
    def constants(self) -> dict[str, NamedArray]:
        return {"base_norm": self.base_norm}

    @property
    def rank(self) -> int:
        return self.lora_A.resolve_axis(RANK).size

    def __call__(self, x: NamedArray, *, key=None) -> NamedArray:
        base = self.wrapped(x)
        without_bias = base if self.wrapped.bias is None else base - self.wrapped.bias
        if key is not None and self.dropout > 0.0:  # as PEFT: all that is added sees the inputs that are left
            x = dropout(x, self.dropout, key)
            without_bias = self._weight_times(x)
        change = self._relative_change(x.dtype)
        low_rank = low_rank_product(x, self.lora_A, self.lora_B * (self.scale * (1 + change)))
        added = change.astype(base.dtype) * without_bias + low_rank
        return base + hax.auto_sharded(added.astype(base.dtype))

    def merge(self, weight: Any, tensors: Mapping[str, Any], scaling: Any) -> Any:
        directed = with_low_rank(weight, tensors, scaling)
        norm = ((directed * directed).sum(-1) ** 0.5)[..., None]
        return directed * (tensors["lora_magnitude_vector"][..., None] / (norm + (norm == 0)))

    def adds_nothing(self) -> jax.Array:
        has_product = jnp.any(self.lora_A.array != 0) & jnp.any(self.lora_B.array != 0)
        return ~(has_product | jnp.any(self._moved().array != 0))

    def with_factors(self, arrays: Mapping[str, NamedArray]) -> Self:
        return dataclasses.replace(super().with_factors(arrays), base_norm=row_norms(self.wrapped))

    def _relative_change(self, dtype: Any) -> NamedArray:
        """float32 {*stack, *Out}: m / |V| - 1. Only m gets a gradient."""
        norm, longer = jax.lax.stop_gradient(self._norm_and_growth(dtype))
        return (self._moved() - longer) / hax.where(norm > 0, norm, 1.0)

    def _moved(self) -> NamedArray:
        """float32 {*stack, *Out}: how far m is from where it started; 0 in layers that are no targets."""
        start = self.base_norm.astype(self.lora_magnitude_vector.dtype)
        moved = (self.lora_magnitude_vector - start).astype(jnp.float32)
        return moved if self.by_layer is None else hax.where(self.by_layer.scaling != 0, moved, 0.0)

    def _norm_and_growth(self, dtype: Any) -> tuple[NamedArray, NamedArray]:
        """float32 {*stack, *Out}: |V|, and |V| - |W|, which is exactly 0 if B A is."""
        A, B = self.lora_A, self.lora_B * self.scale
        In, Inner = axes_of(self.wrapped.In), RANK + "_other"
        product = self._weight_times(A.astype(dtype)).astype(jnp.float32)  # W A^T
        gram = hax.dot(A, A.rename({RANK: Inner}), axis=In).astype(jnp.float32)  # A A^T
        turned = hax.dot(B, gram, axis=RANK).rename({Inner: RANK})
        squared = hax.sum(B * (2.0 * product + turned), RANK).rearrange(self.base_norm.axes)
        norm = (self.base_norm**2 + squared).clip(0.0, None) ** 0.5
        total = norm + self.base_norm
        return norm, squared / hax.where(total > 0, total, 1.0)

    def _weight_times(self, x: NamedArray) -> NamedArray:
        return dataclasses.replace(self.wrapped, bias=None)(x)


def row_norms(layer: Any) -> NamedArray:
    """float32 {*stack, *Out}: the norms of the rows of the weight {out, in}."""
    axes = (*stack_axes(layer), *axes_of(layer.Out))
    norms = of_matrices(_norms, layer)
    return hax.named(norms.reshape([axis.size for axis in axes]), axes)


def _norms(weight: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(weight * weight, axis=1))
