"""Experts in the place of an MLP: a router sends each token to some of them.

    mlp: Experts                       mlp: Experts, gathered
      gate: Router                       gate: Router         weight {layers, expert, embed}
      experts: Stacked                   experts: Expert
        gate_proj                          gate_up_proj       weight {layers, expert, gate_up, mlp, embed}
        up_proj                            down_proj          weight {layers, expert, embed, mlp}
        down_proj

Each matrix of a stack has the axes {layers, expert, ...} too, but a name for each expert; a gathered one has a name for
each layer. Each device sorts its own tokens by expert. A product of all of them with the matrices of their experts is
then one `grouped_dot`. Padding belongs to no expert.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
import jax.numpy as jnp
from haliax import Axis, NamedArray
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from lora_dpo_jax.axes import EMBED, EXPERT, GATE_UP, LAYERS, POSITION, RANK
from lora_dpo_jax.lora import LOW_RANK, Adapter, LoraLinear, TokenKey, split_key
from lora_dpo_jax.lora.adapter import names_of
from lora_dpo_jax.lora.dropout import dropout
from lora_dpo_jax.models.compute import CHECKPOINT_POLICIES
from lora_dpo_jax.models.config import DecoderConfig, ExpertsConfig
from lora_dpo_jax.models.gates import ACTIVATIONS
from lora_dpo_jax.models.grouped_products import grouped_dot
from lora_dpo_jax.models.in_stack import InStack
from lora_dpo_jax.models.linear import PRODUCT, GatheredLinear, Linear, linear
from lora_dpo_jax.models.mlp import GateUp
from lora_dpo_jax.models.quantization import QuantizedWeight

BALANCE = "router_balance"  # the name of what layers report, {row, segment}: the mean over the layers that have experts
SEGMENT = "segment"

Names = tuple[str, ...]  # of axes


class Router(eqx.Module):
    """Chooses the experts of each token. It is frozen, never quantized, and computes in float32."""

    config: ExpertsConfig = eqx.field(static=True)
    weight: NamedArray  # {expert, embed}
    bias: NamedArray | None = None  # {expert}

    @property
    def tensor_sides(self) -> tuple[tuple[str, ...], ...]:
        """See `tensor_names.Sided`."""
        return (EXPERT,), (EMBED,)

    def __call__(self, x: NamedArray, segments: NamedArray) -> tuple[Array, Array, Array]:
        """x {row, position, embed} -> (numbers of experts int32, their weights float32, probabilities of all experts).

        The first two are [row, position, choice], the last float32 [row, position, expert]. The experts of padding have
        the number that follows the last expert, and weight 0.
        """
        logits = hax.dot(x.astype(jnp.float32), self.weight.astype(jnp.float32), axis=EMBED)
        if self.bias is not None:
            logits = logits + self.bias.astype(jnp.float32)
        probabilities = hax.nn.softmax(logits.rearrange((..., EXPERT)), axis=EXPERT)
        weights, experts = jax.lax.top_k(probabilities.array, self.config.per_token)
        if self.config.normalizes:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        real = segments.rearrange(x.axes[:-1]).array[..., None] > 0
        experts = jnp.where(real, experts, self.config.num_experts)
        return experts, jnp.where(real, weights, 0.0), probabilities.array


class Expert(eqx.Module):
    """down(activation(gate(x)) * up(x)), of all experts. One matrix holds either both gate and up, or each of them."""

    config: ExpertsConfig = eqx.field(static=True)
    gate_proj: hnn.Linear | None
    up_proj: hnn.Linear | None
    gate_up_proj: hnn.Linear | None
    down_proj: hnn.Linear

    @staticmethod
    def init(config: DecoderConfig, *, key) -> "Expert":
        experts = config.experts
        assert experts is not None
        Embed, Inner, gathered = config.Embed, experts.Mlp, experts.gathered
        keys = jax.random.split(key, 3)

        def make(In, Out, key):
            kind = GatheredLinear if gathered else Linear
            return linear(In, Out, key=key, use_bias=experts.has_biases, kind=kind)

        gate_up = None
        if gathered:
            gate_up = make(Embed, (Inner, GateUp) if experts.is_interleaved else (GateUp, Inner), keys[0])
            weight = gate_up.weight.rearrange((GateUp, Inner, Embed))  # whatever the order of a file's rows
            gate_up = dataclasses.replace(gate_up, weight=weight)
        return Expert(
            experts,
            gate_proj=None if gathered else make(Embed, Inner, keys[0]),
            up_proj=None if gathered else make(Embed, Inner, keys[1]),
            gate_up_proj=gate_up,
            down_proj=make(Inner, Embed, keys[2]),
        )

    @property
    def tensor_parts(self) -> Mapping[str, str]:
        if self.config.gathered:
            return {}
        return dict(zip(("gate_proj", "up_proj", "down_proj"), self.config.matrix_names, strict=True))

    def __call__(self, x: Array, sorting: "Sorting", activation: str, keys: Sequence[TokenKey | None]) -> Array:
        """From pairs [pair, embed] to [pair, embed]."""
        if self.gate_up_proj is None:
            gate = grouped_product(self.gate_proj, x, sorting, key=keys[0])
            up = grouped_product(self.up_proj, x, sorting, key=keys[1])
        else:
            both = grouped_product(self.gate_up_proj, x, sorting, key=keys[0])
            gate, up = both[:, 0], both[:, 1]
        if self.config.clamped_gate is not None:
            inner = self.config.clamped_gate(gate, up)
        else:
            inner = ACTIVATIONS[activation](hax.named(gate, ("assignment", "inner"))).array * up
        return grouped_product(self.down_proj, inner, sorting, key=keys[2])


class Experts(eqx.Module):
    """The weighted sum of the experts that a router chooses for each token."""

    activation: str = eqx.field(static=True)
    num_layers: int = eqx.field(static=True)  # of the decoder, that have experts
    gate: Router
    experts: hnn.Stacked[Expert] | Expert

    @staticmethod
    def init(config: DecoderConfig, *, key) -> "Experts":
        assert config.experts is not None
        k_router, k_experts = jax.random.split(key)
        All = config.experts.Expert
        experts = hax.vmap(functools.partial(Expert.init, config), All)(key=jax.random.split(k_experts, All.size))
        bias = hax.zeros(All) if config.experts.has_biases else None
        router = Router(config.experts, hax.random.normal(k_router, (All, config.Embed)), bias)
        if not config.experts.gathered:
            experts = hnn.Stacked(experts, All, CHECKPOINT_POLICIES["none"])
        return Experts(config.activation, config.num_expert_layers, router, experts)

    @property
    def tensor_parts(self) -> Mapping[str, str]:
        return {"gate": self.gate.config.router_name}

    def __call__(self, x: NamedArray, segments: NamedArray, *, key=None) -> tuple[NamedArray, dict[str, NamedArray]]:
        """See `layers.FeedForward`."""
        x = x.rearrange((..., POSITION, EMBED))
        chosen, weights, probabilities = self.gate(x, segments)
        sorting = Sorting.by_expert(chosen, x.axes[0], self.gate.config.num_experts)
        keys = [None if k is None else sorting.keys(k) for k in split_key(key, 3)]
        expert: Expert = self.experts.stacked if isinstance(self.experts, hnn.Stacked) else self.experts
        out = expert(sorting.sort(x.array), sorting, self.activation, keys)
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
    """Each pair [pair, *In] times the matrix of its expert, [pair, *Out]; with its bias, and the layer's adapter.

    The axis of gate and up, if there is one, comes first in Out.
    """
    if not isinstance(layer, Adapter):
        In, Out = names_of(layer.In), _outputs(layer)
        found = checkpoint_name(_frozen_product(x, layer.weight, sorting, In, Out), PRODUCT)
        return found if layer.bias is None else _plus_bias(found, layer.bias.rearrange((EXPERT, *Out)), sorting)
    if not isinstance(layer, LoraLinear):
        raise TypeError(f"experts have LoRA adapters alone, no {type(layer).__name__}")
    frozen = grouped_product(layer.wrapped, x, sorting)
    if key is not None and layer.dropout > 0.0:
        x = dropout(hax.named(x, ("pair", "feature")), layer.dropout, key).array
    low = _trained_product(x, layer.lora_A, sorting, names_of(layer.wrapped.In), (RANK,))
    low = checkpoint_name(low, LOW_RANK)
    return frozen + _trained_product(low, layer.lora_B * layer.scale, sorting, (RANK,), _outputs(layer.wrapped))


def _outputs(layer: Any) -> tuple[str, ...]:
    return tuple(sorted(names_of(layer.Out), key=lambda name: name != GATE_UP))


def _trained_product(x: Array, factor: NamedArray, sorting: Sorting, In: Names, Out: Names) -> Array:
    return _ragged(x, factor.rearrange((EXPERT, *Out, *In)).astype(x.dtype), sorting, In, Out)


def _frozen_product(
    x: Array, weight: NamedArray | QuantizedWeight | InStack, sorting: Sorting, In: Names, Out: Names
) -> Array:
    """The weight gets no gradient, and is dequantized again in the backward pass, as in `quantized_product`."""

    def plain(weight: Any, dtype: Any) -> NamedArray | InStack:
        if isinstance(weight, InStack):
            if weight.stack.dtype == dtype and weight.stack.axis_names == (LAYERS, EXPERT, *Out, *In):
                return weight
            weight = weight.sliced()
        return hax.auto_sharded(weight).astype(dtype).rearrange((EXPERT, *Out, *In))

    @jax.custom_vjp
    def product(x, weight, sorting):
        return _ragged(x, plain(weight, x.dtype), sorting, In, Out)

    def forward(x, weight, sorting):
        return product(x, weight, sorting), (weight, sorting)

    def backward(saved, cotangent):
        weight, sorting = saved
        return _ragged(cotangent, plain(weight, cotangent.dtype), sorting, In, Out, is_backward=True), None, None

    product.defvjp(forward, backward)
    return product(x, weight, sorting)


def _ragged(
    x: Array, matrices: NamedArray | InStack, sorting: Sorting, In: Names, Out: Names, *, is_backward: bool = False
) -> Array:
    """x [pair, *In] and matrices {expert, *Out, *In} -> [pair, *Out]. Backward, from [pair, *Out] to [pair, *In]."""
    matrices, layer = (matrices.stack, matrices.layer) if isinstance(matrices, InStack) else (matrices, None)
    split = hax.partitioning.pspec_for_axis(matrices.axes) if _is_split() else PartitionSpec(*[None] * matrices.ndim)
    begin = matrices.ndim - len(Out + In)  # after the experts, and the layers
    end = begin + len(Out)
    of_out, of_in = split[begin:end], split[end:]
    of_result, of_x = (of_in, of_out) if is_backward else (of_out, of_in)
    summed = tuple(name for names in of_x if names is not None for name in hax.axis.ensure_tuple(names))

    def product(x, matrices, sizes):
        pairs, stacks, out, inner = len(x), matrices.shape[:begin], matrices.shape[begin:end], matrices.shape[end:]
        found = grouped_dot(
            x.reshape(pairs, -1),
            matrices.reshape(*stacks, math.prod(out), math.prod(inner)),
            sizes[0],
            dtype=jnp.float32 if summed else x.dtype,
            contracted=1 if is_backward else 2,
            layer=layer,
        )
        if summed:
            found = jax.lax.psum(found, summed).astype(x.dtype)
        return found.reshape(pairs, *(inner if is_backward else out))

    rows = sorting.devices
    specs = PartitionSpec(rows, *of_x), split, _spec(rows)
    return on_each_device(product, specs, PartitionSpec(rows, *of_result))(x, matrices.array, sorting.sizes)


def _plus_bias(x: Array, bias: NamedArray, sorting: Sorting) -> Array:
    """x [pair, *Out] plus the bias {expert, *Out} of each pair's expert; padding has none."""
    bias = hax.auto_sharded(bias)
    split = hax.partitioning.pspec_for_axis(bias.axes) if _is_split() else PartitionSpec(*[None] * bias.ndim)

    def add(x, bias, expert):
        return x + bias.astype(x.dtype).at[expert].get(mode="fill", fill_value=0)

    of_x = PartitionSpec(sorting.devices, *split[1:])
    return on_each_device(add, (of_x, split, _spec(sorting.devices)), of_x)(x, bias.array, sorting.expert)


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
