"""LoRA from factors that are not zero, beside a base that stays as it is (PiSSA, OLoRA, orthogonal)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
import jax.numpy as jnp
from haliax import Axis, NamedArray

from lora_dpo_jax.axes import RANK
from lora_dpo_jax.lora.adapter import Adapter, ByLayer, Factor
from lora_dpo_jax.lora.config import LoraConfig
from lora_dpo_jax.lora.dropout import dropout
from lora_dpo_jax.lora.initialization import OF_WEIGHTS, new_factors
from lora_dpo_jax.lora.lora_linear import LoraLinear, low_rank_factors, low_rank_product, with_low_rank


class OffsetLora(Adapter):
    """y = wrapped(x) + scaling * (B A - B0 A0) dropout(x), where A0 and B0 are what A and B started from.

    PEFT takes B0 A0 away from the weight instead. Here the weight stays, because it is the reference. The difference is
    computed as (B - B0) A + B0 (A - A0), one product of twice the rank, which is exactly zero in the beginning whatever
    the dtype of A and B.
    """

    wrapped: hnn.Linear
    lora_A: NamedArray  # {*stack, lora_rank, *In}
    lora_B: NamedArray  # {*stack, *Out, lora_rank}
    initial_A: NamedArray  # float32, with the axes of A
    initial_B: NamedArray  # float32, with the axes of B
    scaling: float = eqx.field(static=True)
    dropout: float = eqx.field(static=True, default=0.0)
    by_layer: ByLayer | None = None
    a_init: str = eqx.field(static=True, default="pissa")  # of the settings

    @classmethod
    def init(cls, layer: hnn.Linear, config: LoraConfig, by_layer: ByLayer | None, *, key) -> "OffsetLora":
        lora_A, lora_B = new_factors(layer, config, by_layer, key=key)
        initial_A, initial_B = jax.tree.map(jnp.copy, (lora_A, lora_B))
        return OffsetLora(
            layer,
            lora_A=lora_A,
            lora_B=lora_B,
            initial_A=initial_A,
            initial_B=initial_B,
            scaling=config.scaling,
            dropout=config.dropout,
            by_layer=by_layer,
            a_init=config.a_init,
        )

    @property
    def factors(self) -> dict[str, Factor]:
        return low_rank_factors(self)

    @property
    def constants(self) -> dict[str, NamedArray]:
        return {"initial_A": self.initial_A, "initial_B": self.initial_B}

    @property
    def rank(self) -> int:
        return self.lora_A.resolve_axis(RANK).size

    @property
    def flops_per_token(self) -> int:
        return 2 * 2 * self.parameter_count

    def __call__(self, x: NamedArray, *, key=None) -> NamedArray:
        if key is not None and self.dropout > 0.0:
            dropped = dropout(x, self.dropout, key)
        else:
            dropped = x
        A, B = self._doubled()
        return self.wrapped(x) + hax.auto_sharded(low_rank_product(dropped, A, B * self.scale))

    def merge(self, weight: Any, tensors: Mapping[str, Any], scaling: Any) -> Any:
        return with_low_rank(weight, tensors, scaling)

    def adds_nothing(self) -> jax.Array:
        moved_A, moved_B = self._moved()
        return ~(jnp.any(moved_A.array != 0) | jnp.any(moved_B.array != 0))

    def plain(self) -> LoraLinear:
        """Plain LoRA, of twice the rank if B0 A0 is not zero."""
        by_layer = self.by_layer
        if self.a_init not in OF_WEIGHTS:  # B0 A0 is zero, but for its rounding
            moved_A, moved_B = self._moved()
            A, B = self.initial_A + moved_A, self.initial_B + moved_B
        else:
            A, B = self._doubled()
            if by_layer is not None:
                by_layer = dataclasses.replace(by_layer, ranks=tuple(2 * rank for rank in by_layer.ranks))
        return LoraLinear(
            self.wrapped, lora_A=A, lora_B=B, scaling=self.scaling, dropout=self.dropout, by_layer=by_layer
        )

    def for_inference(self) -> LoraLinear:
        return self.plain().for_inference()

    def with_factors(self, arrays: Mapping[str, NamedArray]) -> Self:
        """A0 and B0 are then those of the weight, as PEFT takes them when it loads such an adapter."""
        a_init: Any = self.a_init
        settings = LoraConfig(r=self.rank, alpha=self.scaling * self.rank, a_init=a_init)
        initial_A, initial_B = new_factors(self.wrapped, settings, self.by_layer, key=jax.random.key(0))
        return dataclasses.replace(super().with_factors(arrays), initial_A=initial_A, initial_B=initial_B)

    def _doubled(self) -> tuple[NamedArray, NamedArray]:
        """A and B of twice the rank. The parts of each rank are neighbours, so a layer's own ranks come first."""
        moved_A, moved_B = self._moved()
        return _interleaved(self.initial_A + moved_A, moved_A), _interleaved(moved_B, self.initial_B)

    def _moved(self) -> tuple[NamedArray, NamedArray]:
        """float32: how far A and B are from where they started."""
        pairs = (self.lora_A, self.initial_A), (self.lora_B, self.initial_B)
        moved_A, moved_B = ((now - start.astype(now.dtype)).astype(jnp.float32) for now, start in pairs)
        return moved_A, moved_B


def _interleaved(first: NamedArray, second: NamedArray) -> NamedArray:
    """Along the axis of ranks: a row of the first, a row of the second, and so on."""
    pair = Axis("pair", 2)
    order = [name for axis in first.axes for name in ((axis.name, pair.name) if axis.name == RANK else (axis.name,))]
    return hax.stack(pair, [first, second]).rearrange(tuple(order)).flatten_axes((RANK, pair.name), RANK)
