"""The adapter of the original LoRA: two thin matrices beside a frozen linear layer."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
import jax.numpy as jnp
from haliax import NamedArray

from lora_dpo_jax.axes import RANK
from lora_dpo_jax.lora.adapter import Adapter, ByLayer, Factor, names_of
from lora_dpo_jax.lora.config import LoraConfig
from lora_dpo_jax.lora.dropout import dropout
from lora_dpo_jax.lora.initialization import new_factors
from lora_dpo_jax.platforms import platform
from lora_dpo_jax.tensor_names import gathered_axes

LOW_RANK = "low_rank"  # the name of A x in checkpointing policies


class LoraLinear(Adapter):
    """y = wrapped(x) + scaling * B A dropout(x)."""

    wrapped: hnn.Linear
    lora_A: NamedArray  # {*stack, lora_rank, *In}
    lora_B: NamedArray  # {*stack, *Out, lora_rank}
    scaling: float = eqx.field(static=True)
    dropout: float = eqx.field(static=True, default=0.0)
    by_layer: ByLayer | None = None

    @classmethod
    def init(cls, layer: hnn.Linear, config: LoraConfig, by_layer: ByLayer | None, *, key) -> "LoraLinear":
        lora_A, lora_B = new_factors(layer, config, by_layer, key=key)
        return LoraLinear(
            layer, lora_A=lora_A, lora_B=lora_B, scaling=config.scaling, dropout=config.dropout, by_layer=by_layer
        )

    @property
    def factors(self) -> dict[str, Factor]:
        return low_rank_factors(self)

    @property
    def rank(self) -> int:
        return self.lora_A.resolve_axis(RANK).size

    def __call__(self, x: NamedArray, *, key=None) -> NamedArray:
        return self.wrapped(x) + self.delta(x, key=key)

    def delta(self, x: NamedArray, *, key=None) -> NamedArray:
        """The term that the adapter adds to the wrapped layer's output, in the dtype of `x`."""
        if key is not None and self.dropout > 0.0:
            x = dropout(x, self.dropout, key)
        return hax.auto_sharded(low_rank_product(x, self.lora_A, self.lora_B * self.scale))

    def for_inference(self) -> "LoraLinear":
        """With the scaling in B, which is the same to the bit."""
        return LoraLinear(self.wrapped, lora_A=self.lora_A, lora_B=self.lora_B * self.scale, scaling=1.0)

    def merge(self, weight: Any, tensors: Mapping[str, Any], scaling: Any) -> Any:
        return with_low_rank(weight, tensors, scaling)

    def adds_nothing(self) -> jax.Array:
        return ~(jnp.any(self.lora_A.array != 0) & jnp.any(self.lora_B.array != 0))


def low_rank_factors(adapter: Any) -> dict[str, Factor]:
    """The factors A and B of an adapter that has them as `lora_A` and `lora_B`, by PEFT's names.

    Of gathered matrices, PEFT stores all A below each other, and the columns of all B side by side, those of the first
    rank first.
    """
    In, Out, gathered = names_of(adapter.wrapped.In), names_of(adapter.wrapped.Out), gathered_axes(adapter.wrapped)
    return {
        "lora_A.weight": Factor(adapter.lora_A, ((*gathered, RANK), In), gathered),
        "lora_B.weight": Factor(adapter.lora_B, (Out, (RANK, *gathered)), gathered),
    }


def with_low_rank(weight: Any, tensors: Mapping[str, Any], scaling: Any) -> Any:
    """W + scaling * B A, of arrays of NumPy or JAX: see `Adapter.merge`."""
    return weight + (tensors["lora_B.weight"] @ tensors["lora_A.weight"]) * scaling


def apply_all(layers: Sequence[Any], x: NamedArray, keys: Sequence[Any]) -> Iterator[NamedArray]:
    """layer(x, key=key) of each of some linear layers that read the same input.

    On a GPU, plain adapters without dropout multiply it with all their factors A at once. Each of these thin products
    alone would take the time of reading `x`, and its gradient that of adding to the gradient of `x`.
    """
    given = list(zip(layers, keys, strict=True))
    together = [layer for layer, key in given if type(layer) is LoraLinear and (key is None or layer.dropout == 0.0)]
    if platform() != "gpu" or len(together) < 2:
        yield from (layer(x, key=key) for layer, key in given)
        return
    As, Bs = [layer.lora_A for layer in together], [layer.lora_B * layer.scale for layer in together]
    deltas = iter(low_rank_products(x, As, Bs))
    for layer, key in given:
        is_shared = any(layer is other for other in together)
        yield layer.wrapped(x) + hax.auto_sharded(next(deltas)) if is_shared else layer(x, key=key)


@jax.custom_vjp
def low_rank_products(x: NamedArray, As: Sequence[NamedArray], Bs: Sequence[NamedArray]) -> list[NamedArray]:
    """[low_rank_product(x, A, B) ...]. The factors have no axes but {lora_rank, *In} and {*Out, lora_rank}."""
    return _low_rank_products_forward(x, As, Bs)[0]


def _low_rank_products_forward(x: NamedArray, As, Bs):
    joint = _joint(As, x.dtype)
    lows = hax.tree_checkpoint_name(_split(x.dot(joint, axis=_side(As[0], Bs[0])), As), LOW_RANK)
    return [low.dot(B.astype(x.dtype), axis=RANK) for low, B in zip(lows, Bs, strict=True)], (x, As, Bs, lows)


def _low_rank_products_backward(saved, d_outs: Sequence[NamedArray]):
    x, As, Bs, lows = saved
    tokens: Any = [axis for axis in lows[0].axes if axis.name != RANK]
    d_lows = [
        d_out.dot(B.astype(x.dtype), axis=_side(B, A)).rearrange(low.axes)
        for d_out, A, B, low in zip(d_outs, As, Bs, lows, strict=True)
    ]
    d_low = hax.concatenate(RANK, d_lows)
    d_joint = _summed_in(As[0].dtype, d_low, x, tokens)
    d_As = [d_A.rearrange(A.axes) for d_A, A in zip(_split(d_joint, As), As, strict=True)]
    d_Bs = [
        _summed_in(B.dtype, low, d_out, tokens).rearrange(B.axes)
        for low, d_out, B in zip(lows, d_outs, Bs, strict=True)
    ]
    return d_low.dot(_joint(As, x.dtype), axis=RANK).rearrange(x.axes), d_As, d_Bs


low_rank_products.defvjp(_low_rank_products_forward, _low_rank_products_backward)


def _joint(As: Sequence[NamedArray], dtype: Any) -> NamedArray:
    return hax.concatenate(RANK, [A.astype(dtype).rearrange(As[0].axes) for A in As])


def _split(joint: NamedArray, As: Sequence[NamedArray]) -> list[NamedArray]:
    """The parts of an array with the rank of `_joint(As)` that belong to each of them."""
    ranks = [A.resolve_axis(RANK).size for A in As]
    stops = itertools.accumulate(ranks)
    return [joint[RANK, stop - rank : stop] for rank, stop in zip(ranks, stops, strict=True)]


@jax.custom_vjp
def low_rank_product(x: NamedArray, A: NamedArray, B: NamedArray) -> NamedArray:
    """B A x in the dtype of `x`. The factors' gradients are summed in the factors' own dtype.

    `x` {..., *In} may lack leading axes that both factors have. Each slice of the factors then applies to all of `x`.
    """
    return _low_rank_forward(x, A, B)[0]


def _low_rank_forward(x: NamedArray, A: NamedArray, B: NamedArray):
    low = x.dot(A.astype(x.dtype), axis=_side(A, B))
    low = hax.tree_checkpoint_name(low, LOW_RANK)
    return low.dot(B.astype(x.dtype), axis=RANK), (x, A, B, low)


def _low_rank_backward(saved, d_out: NamedArray):
    x, A, B, low = saved
    tokens: Any = [axis for axis in low.axes if axis not in A.axes]
    d_low = d_out.dot(B.astype(x.dtype), axis=_side(B, A))
    # The thin factor comes first, so that the wide one is not transposed: this would cost more than the product.
    d_A = _summed_in(A.dtype, d_low, x, tokens).rearrange(A.axes)
    d_B = _summed_in(B.dtype, low, d_out, tokens).rearrange(B.axes)
    not_in_x: Any = [axis for axis in A.axes if axis not in x.axes]
    return d_low.dot(A.astype(x.dtype), axis=not_in_x).rearrange(x.axes), d_A, d_B


low_rank_product.defvjp(_low_rank_forward, _low_rank_backward)


def _summed_in(dtype: Any, a: NamedArray, b: NamedArray, axis: Any) -> NamedArray:
    if (
        platform() == "cpu"
    ):  # XLA does not support such sums of bfloat16 products for some layouts, and fails at run time
        return hax.dot(a.astype(dtype), b.astype(dtype), axis=axis)
    return hax.dot(a, b, axis=axis, preferred_element_type=dtype)


def _side(factor: NamedArray, other: NamedArray) -> Any:
    """The axes that only `factor` has: A's inputs or B's outputs. Both factors have the rank and the stack's axes."""
    return [axis for axis in factor.axes if axis not in other.axes]
