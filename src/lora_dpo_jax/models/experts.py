"""Experts in the place of an MLP: a router sends each token to some of them.

    mlp: Experts
      gate: Router        weight {layers, expert, embed}
      experts: Stacked
        gate_proj         weight {layers, expert, mlp, embed}
        up_proj
        down_proj

Each device sorts its own tokens by expert. A product of all of them with the matrices of their experts is then one
`jax.lax.ragged_dot_general`. Padding belongs to no expert.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
import jax.numpy as jnp
from haliax import Axis, NamedArray
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.lax import RaggedDotDimensionNumbers, ragged_dot_general
from jax.sharding import PartitionSpec

from lora_dpo_jax.axes import EMBED, EXPERT, POSITION, RANK
from lora_dpo_jax.lora import LOW_RANK, Adapter, LoraLinear, TokenKey, split_key
from lora_dpo_jax.lora.adapter import names_of
from lora_dpo_jax.lora.dropout import dropout
from lora_dpo_jax.models.compute import CHECKPOINT_POLICIES
from lora_dpo_jax.models.config import DecoderConfig, ExpertsConfig
from lora_dpo_jax.models.linear import PRODUCT, linear
from lora_dpo_jax.models.mlp import ACTIVATIONS
from lora_dpo_jax.models.quantization import QuantizedWeight

BALANCE = "router_balance"  # the name of what layers report, {row, segment}: the mean over the layers that have experts
SEGMENT = "segment"


class Router(eqx.Module):
    """Chooses the experts of each token. It is frozen, never quantized, and computes in float32."""

    config: ExpertsConfig = eqx.field(static=True)
    weight: NamedArray  # {expert, embed}

    @property
    def tensor_sides(self) -> tuple[str, ...]:
        """See `tensor_names.Sided`."""
        return EXPERT, EMBED

    def __call__(self, x: NamedArray, segments: NamedArray) -> tuple[Array, Array, Array]:
        """x {row, position, embed} -> (numbers of experts int32, their weights float32, probabilities of all experts).

        The first two are [row, position, choice], the last float32 [row, position, expert]. The experts of padding have
        the number that follows the last expert, and weight 0.
        """
        logits = hax.dot(x.astype(jnp.float32), self.weight.astype(jnp.float32), axis=EMBED)
        probabilities = hax.nn.softmax(logits.rearrange((..., EXPERT)), axis=EXPERT)
        weights, experts = jax.lax.top_k(probabilities.array, self.config.per_token)
        if self.config.normalizes:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        real = segments.rearrange(x.axes[:-1]).array[..., None] > 0
        experts = jnp.where(real, experts, self.config.num_experts)
        return experts, jnp.where(real, weights, 0.0), probabilities.array


class Expert(eqx.Module):
    """down(activation(gate(x)) * up(x)). In a stack, each matrix has the axis of the experts."""

    config: ExpertsConfig = eqx.field(static=True)
    gate_proj: hnn.Linear
    up_proj: hnn.Linear
    down_proj: hnn.Linear

    @staticmethod
    def init(config: DecoderConfig, *, key) -> "Expert":
        assert config.experts is not None
        Embed, Inner = config.Embed, config.experts.Mlp
        keys = jax.random.split(key, 3)
        return Expert(
            config.experts,
            gate_proj=linear(Embed, Inner, key=keys[0], use_bias=False),
            up_proj=linear(Embed, Inner, key=keys[1], use_bias=False),
            down_proj=linear(Inner, Embed, key=keys[2], use_bias=False),
        )

    @property
    def tensor_parts(self) -> Mapping[str, str]:
        return dict(zip(("gate_proj", "up_proj", "down_proj"), self.config.matrix_names, strict=True))


class Experts(eqx.Module):
    """The weighted sum of the experts that a router chooses for each token."""

    activation: str = eqx.field(static=True)
    num_layers: int = eqx.field(static=True)  # of the decoder, that have experts
    gate: Router
    experts: hnn.Stacked[Expert]

    @staticmethod
    def init(config: DecoderConfig, *, key) -> "Experts":
        assert config.experts is not None
        k_router, k_experts = jax.random.split(key)
        All = config.experts.Expert
        experts = hax.vmap(functools.partial(Expert.init, config), All)(key=jax.random.split(k_experts, All.size))
        router = Router(config.experts, hax.random.normal(k_router, (All, config.Embed)))
        stacked = hnn.Stacked(experts, All, CHECKPOINT_POLICIES["none"])
        return Experts(config.activation, config.num_expert_layers, router, stacked)

    def __call__(self, x: NamedArray, segments: NamedArray, *, key=None) -> tuple[NamedArray, dict[str, NamedArray]]:
        """See `layers.FeedForward`."""
        x = x.rearrange((..., POSITION, EMBED))
        chosen, weights, probabilities = self.gate(x, segments)
        sorting = Sorting.by_expert(chosen, x.axes[0], self.gate.config.num_experts)
        keys = [None if k is None else sorting.keys(k) for k in split_key(key, 3)]
        expert: Expert = self.experts.stacked
        inputs = sorting.sort(x.array)
        gate = grouped_product(expert.gate_proj, inputs, sorting, key=keys[0])
        up = grouped_product(expert.up_proj, inputs, sorting, key=keys[1])
        activated = ACTIVATIONS[self.activation](hax.named(gate, ("assignment", "inner"))).array * up
        out = grouped_product(expert.down_proj, activated, sorting, key=keys[2])
        out = NamedArray(sorting.combine(out, weights), x.axis_names)
        if not self.gate.config.reports_balance:
            return out, {}
        values = balance(chosen, probabilities, segments.rearrange(x.axes[:-1]).array) / self.num_layers
        return out, {BALANCE: NamedArray(values, (x.axes[0].name, SEGMENT))}


def balance(chosen: Array, probabilities: Array, segments: Array) -> Array:
    """How unevenly a router treats each example of a row, float32 [row, position]: of segment 1, 2, ...; 0 if unused.

    Equations 4 to 6 of https://arxiv.org/abs/2101.03961 over the tokens of one example: experts * the sum over experts
    of (their share of tokens * their mean probability). It is the number of choices a token has if they are even.
    """
    count = probabilities.shape[-1]
    hits = jnp.sum(jax.nn.one_hot(chosen, count), axis=-2)  # the experts of padding have no column

    def of_row(hits, probabilities, segments):
        def total(values):
            return jax.ops.segment_sum(values, segments, len(segments) + 1)[1:]

        tokens = jnp.maximum(total(jnp.ones(len(segments))), 1.0)[:, None]
        return count * jnp.sum((total(hits) / tokens) * (total(probabilities) / tokens), axis=-1)

    return jax.vmap(of_row)(hits, probabilities, segments)


class Sorting(eqx.Module):
    """The order of a device's pairs of token and expert when they are sorted by expert. Padding comes last."""

    expert: Array  # int32 [pair], sorted
    order: Array  # int32 [pair]: where each pair was
    place: Array  # int32 [pair]: where each pair is now
    sizes: Array  # int32 [device, expert]: how many pairs each expert has
    per_token: int = eqx.field(static=True)
    devices: Any = eqx.field(static=True)  # the mesh axes that split rows, as in a PartitionSpec

    @staticmethod
    def by_expert(chosen: Array, Row: Axis, num_experts: int) -> "Sorting":
        """`chosen`: see `Router`."""
        devices = hax.partitioning.pspec_for_axis((Row,))[0] if _is_split() else None

        def sort(chosen: Array):
            flat = chosen.reshape(-1)
            order = jnp.argsort(flat, stable=True).astype(jnp.int32)
            sizes = jnp.bincount(flat, length=num_experts + 1)[None, :num_experts]
            return flat[order], order, jnp.argsort(order).astype(jnp.int32), sizes.astype(jnp.int32)

        expert, order, place, sizes = on_each_device(sort, _spec(devices), (_spec(devices),) * 4)(chosen)
        return Sorting(expert, order, place, sizes, chosen.shape[-1], devices)

    def sort(self, x: Array) -> Array:
        """From tokens [row, position, feature] to pairs [pair, feature]."""

        def sort(x, order, place):
            each = jnp.repeat(x.reshape(-1, x.shape[-1]), self.per_token, axis=0)
            return permuted(each, order, place)

        split = _spec(self.devices)
        return on_each_device(sort, (split,) * 3, split)(x, self.order, self.place)

    def combine(self, pairs: Array, weights: Array) -> Array:
        """The sum over each token's pairs [pair, feature] with weights [row, position, choice]."""

        def combine(pairs, weights, order, place):
            each = permuted(pairs, place, order).reshape(*weights.shape, -1).astype(jnp.float32)
            return jnp.sum(each * weights[..., None], axis=-2).astype(pairs.dtype)

        split = _spec(self.devices)
        return on_each_device(combine, (split,) * 4, split)(pairs, weights, self.order, self.place)

    def keys(self, key: TokenKey) -> TokenKey:
        """The key of each pair: what a token drops before one expert does not depend on other tokens."""

        def sort(order, *numbers):
            return tuple(number.reshape(-1)[order // self.per_token] for number in numbers)

        split = _spec(self.devices)
        arrays = [number.array for number in key.token]
        numbers = on_each_device(sort, (split,) * (1 + len(arrays)), (split,) * len(arrays))(self.order, *arrays)
        return TokenKey(key.key, tuple(hax.named(number, "pair") for number in (*numbers, self.expert)))


def grouped_product(layer: Any, x: Array, sorting: Sorting, *, key: TokenKey | None = None) -> Array:
    """Each pair [pair, in] times the matrix of its expert, [pair, out]; with the term of the layer's adapter."""
    if not isinstance(layer, Adapter):
        (In,), (Out,) = names_of(layer.In), names_of(layer.Out)
        return checkpoint_name(_frozen_product(x, layer.weight, sorting, In, Out), PRODUCT)
    if not isinstance(layer, LoraLinear):
        raise TypeError(f"experts have LoRA adapters alone, no {type(layer).__name__}")
    frozen = grouped_product(layer.wrapped, x, sorting)
    if key is not None and layer.dropout > 0.0:
        x = dropout(hax.named(x, ("pair", "feature")), layer.dropout, key).array
    (In,), (Out,) = names_of(layer.wrapped.In), names_of(layer.wrapped.Out)
    low = _trained_product(x, layer.lora_A, sorting, In, RANK)
    low = checkpoint_name(low, LOW_RANK)
    return frozen + _trained_product(low, layer.lora_B * layer.scale, sorting, RANK, Out)


def _trained_product(x: Array, factor: NamedArray, sorting: Sorting, In: str, Out: str) -> Array:
    return _ragged(x, factor.rearrange((EXPERT, Out, In)).astype(x.dtype), sorting, In, Out)


def _frozen_product(x: Array, weight: NamedArray | QuantizedWeight, sorting: Sorting, In: str, Out: str) -> Array:
    """The weight gets no gradient, and is dequantized again in the backward pass, as in `quantized_product`."""

    def plain(weight: Any, dtype: Any) -> NamedArray:
        return hax.auto_sharded(weight).astype(dtype).rearrange((EXPERT, Out, In))

    @jax.custom_vjp
    def product(x, weight, sorting):
        return _ragged(x, plain(weight, x.dtype), sorting, In, Out)

    def forward(x, weight, sorting):
        return product(x, weight, sorting), (weight, sorting)

    def backward(saved, cotangent):
        weight, sorting = saved
        transposed = plain(weight, cotangent.dtype).rearrange((EXPERT, In, Out))
        return _ragged(cotangent, transposed, sorting, Out, In), None, None

    product.defvjp(forward, backward)
    return product(x, weight, sorting)


def _ragged(x: Array, matrices: NamedArray, sorting: Sorting, In: str, Out: str) -> Array:
    """x [pair, in] and matrices {expert, out, in} -> [pair, out]."""
    split = hax.partitioning.pspec_for_axis(matrices.axes) if _is_split() else PartitionSpec(None, None, None)
    _, of_out, of_in = split

    def product(x, matrices, sizes):
        # Contracts the last axes of both.
        dimensions = RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
        dtype = jnp.float32 if of_in is not None else x.dtype
        found = ragged_dot_general(x, matrices, sizes[0], dimensions, preferred_element_type=dtype)
        if of_in is not None:
            found = jax.lax.psum(found, of_in).astype(x.dtype)
        # What the product of a pair that has no expert is depends on the platform.
        return jnp.where((jnp.arange(len(x)) < sizes[0].sum())[:, None], found, 0)

    rows = sorting.devices
    specs = PartitionSpec(rows, of_in), split, _spec(rows)
    return on_each_device(product, specs, PartitionSpec(rows, of_out))(x, matrices.array, sorting.sizes)


@jax.custom_vjp
def permuted(x: Array, order: Array, inverse: Array) -> Array:
    """x[order]. The gradient is a gather too, by the inverse."""
    return x[order]


def _permuted_forward(x, order, inverse):
    return x[order], inverse


def _permuted_backward(inverse, cotangent):
    return cotangent[inverse], None, None


permuted.defvjp(_permuted_forward, _permuted_backward)


def on_each_device(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """The function of each device's part of the arrays; the function itself without a mesh."""
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False) if _is_split() else function


def _is_split() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def _spec(devices: Any) -> PartitionSpec:
    return PartitionSpec(devices)
