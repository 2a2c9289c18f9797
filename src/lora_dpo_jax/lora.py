"""Low-rank adapters (https://arxiv.org/abs/2106.09685) on the linear layers of any equinox / haliax model.

    before                          after loraize

    self_attn                       self_attn
      q_proj: Linear                  q_proj: LoraLinear
                                        wrapped: Linear       frozen, the very same arrays
                                        lora_A   {layers, lora_rank, *In}     float32, random
                                        lora_B   {layers, *Out, lora_rank}    float32, zero

Nothing is flagged or mutated: the reference is another tree, `unwrap_lora(model)`, that shares the weights.
"""

import dataclasses
import functools
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
import jax.numpy as jnp
import numpy as np
from haliax import Axis, NamedArray

from lora_dpo_jax.parameters import axes_of, checkpoint_names

M = TypeVar("M")
RANK = "lora_rank"
LOW_RANK = "low_rank"  # what a checkpointing policy calls A x


@dataclass(frozen=True)
class LoraConfig:
    """PEFT's options under Levanter's names."""

    r: int = 8  # the rank
    alpha: float = 8.0  # what the adapters add is scaled by alpha / r
    dropout: float = 0.0  # on the input of the adapters, of the policy alone, in training alone
    use_rslora: bool = False  # scale by alpha / sqrt(r) (https://arxiv.org/abs/2312.03732) instead of alpha / r
    # A list matches by suffix on dotted paths, a string is a regular expression for the whole path, null is every
    # linear layer of the decoder (not lm_head). Paths are those of the checkpoint: model.layers.0.self_attn.q_proj
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None  # the same syntax
    zero_init_b: bool = True  # with a_init random: B starts at zero. The trainer insists on it
    a_init: Literal["random", "zero"] = "random"  # zero: A starts at zero and B at random, the product being zero too

    def __post_init__(self):
        if self.r < 1:
            raise ValueError(f"lora.r={self.r} must be at least 1")
        if not 0.0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha={self.alpha} must be a positive number")
        if not 0.0 <= np.float32(self.dropout) < 1.0:
            raise ValueError(f"lora.dropout={self.dropout} must be in [0, 1), in float32 too")
        if self.a_init not in ("random", "zero"):
            raise ValueError(f"lora.a_init={self.a_init!r} must be 'random' or 'zero'")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(pattern := getattr(self, name), str):
                _check_pattern(f"lora.{name}", pattern)

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def _check_pattern(setting: str, pattern: str) -> None:
    if pattern == "all-linear":
        raise ValueError(f"{setting}={pattern!r}: PEFT's word for every linear layer is null here; leave it out")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a later Python may read otherwise
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{setting}={pattern!r} is no regular expression ({error}); write a list for names: [q_proj, v_proj]"
        ) from error


class TokenKey(eqx.Module):
    """A key for dropout by which a token is treated alike in whatever row, micro-batch and device it lies."""

    key: jax.Array
    token: tuple[NamedArray, ...]  # int32, axes alike: numbers that together tell a token from all others

    def split(self, count: int) -> list["TokenKey"]:
        return [TokenKey(key, self.token) for key in jax.random.split(self.key, count)]

    def bernoulli(self, shape: tuple[Axis, ...], p: float) -> NamedArray:
        """bool {shape}; the axes that `token` has not are drawn for each token by itself."""
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


class LoraLinear(eqx.Module):
    """y = wrapped(x) + scaling * B A dropout(x)."""

    wrapped: hnn.Linear
    lora_A: NamedArray  # {..., lora_rank, *In}
    lora_B: NamedArray  # {..., *Out, lora_rank}
    scaling: float = eqx.field(static=True)
    dropout: float = eqx.field(static=True, default=0.0)
    # {layers} of 0 and 1 where only some layers of a stack are targets; None where all are.
    active: NamedArray | None = None

    def __call__(self, x: NamedArray, *, key=None) -> NamedArray:
        """`key`, JAX's or a `TokenKey`, switches dropout on."""
        return self.wrapped(x) + self.delta(x, key=key)

    def delta(self, x: NamedArray, *, key=None) -> NamedArray:
        """What the adapters add to the wrapped layer's output, in the dtype of `x`."""
        if key is not None and self.dropout > 0.0:
            x = _dropout(x, self.dropout, key)
        scale = self.scaling if self.active is None else self.scaling * self.active
        return hax.auto_sharded(_low_rank(x, self.lora_A, self.lora_B * scale))

    def merged(self) -> hnn.Linear:
        """The wrapped layer with the adapters folded in: summed in float32 and rounded once to the weight's dtype."""
        delta = self.lora_B.astype(jnp.float32).dot(self.lora_A.astype(jnp.float32), axis=RANK) * self.scaling
        if self.active is not None:
            delta = delta * self.active.astype(jnp.float32)
        weight = self.wrapped.weight
        total = (weight.astype(jnp.float32) + delta.rearrange(weight.axes)).astype(weight.dtype)
        return dataclasses.replace(self.wrapped, weight=total)


def _dropout(x: NamedArray, rate: float, key: Any) -> NamedArray:
    draw = key.bernoulli if isinstance(key, TokenKey) else functools.partial(hax.random.bernoulli, key)
    return hax.where(draw(p=1 - rate, shape=x.axes), x / x.dtype.type(1 - rate), 0)


@jax.custom_vjp
def _low_rank(x: NamedArray, A: NamedArray, B: NamedArray) -> NamedArray:
    """B A x in the dtype of `x`. The factors' gradients are summed in the factors' own dtype."""
    return _low_rank_forward(x, A, B)[0]


def _low_rank_forward(x: NamedArray, A: NamedArray, B: NamedArray):
    low = x.dot(A.astype(x.dtype), axis=_but_rank(A))
    low = hax.tree_checkpoint_name(low, LOW_RANK)
    return low.dot(B.astype(x.dtype), axis=RANK), (x, A, B, low)


def _low_rank_backward(saved, d_out: NamedArray):
    x, A, B, low = saved
    tokens: Any = [axis for axis in low.axes if axis.name != RANK]
    d_low = d_out.dot(B.astype(x.dtype), axis=_but_rank(B))
    # The thin factor comes first: the wide one is then not transposed, which would cost more than the product.
    d_A = _summed_in(A.dtype, d_low, x, tokens).rearrange(A.axes)
    d_B = _summed_in(B.dtype, low, d_out, tokens).rearrange(B.axes)
    return d_low.dot(A.astype(x.dtype), axis=RANK).rearrange(x.axes), d_A, d_B


_low_rank.defvjp(_low_rank_forward, _low_rank_backward)


def _summed_in(dtype: Any, a: NamedArray, b: NamedArray, axis: Any) -> NamedArray:
    return jax.lax.platform_dependent(
        a,
        b,
        # XLA has no such sums of bfloat16 products for some layouts on a CPU, and fails when it runs.
        cpu=lambda a, b: hax.dot(a.astype(dtype), b.astype(dtype), axis=axis),
        default=lambda a, b: hax.dot(a, b, axis=axis, preferred_element_type=dtype),
    )


def _but_rank(factor: NamedArray) -> Any:
    return [axis for axis in factor.axes if axis.name != RANK]


def loraize(model: M, config: LoraConfig, *, key) -> M:
    """The model with `LoraLinear` where `config` says so; float32 adapters, the weights shared.

    Raises ValueError if nothing matches, or if a target cannot be adapted.
    """
    names = [name for _, linear_names in linear_layers(model) for name in linear_names]
    targets = set(matching_names(names, config))
    _refuse_bad_targets(targets, names, model, config)
    keys = iter(jax.random.split(key, len(names)))

    def adapt(linear: Any, layer_names: list[str]) -> Any:
        layer_key = next(keys)
        chosen = [name in targets for name in layer_names]
        if not any(chosen):
            return linear
        if isinstance(linear, LoraLinear):
            raise ValueError(f"{layer_names[0]} has an adapter already; merge_lora it, or start from the plain model")
        return _new_adapter(linear, chosen, config, layer_key)

    return map_linear_layers(adapt, model)


def unwrap_lora(model: M) -> M:
    """The reference: the model without its adapters, under `stop_gradient`. Shares the weights."""
    plain = map_linear_layers(lambda linear, _: linear.wrapped if isinstance(linear, LoraLinear) else linear, model)
    return jax.lax.stop_gradient(plain)


def frozen_copy(model: M) -> M:
    """The model's adapters as they are now, to be the reference of a run that goes on training them."""
    return jax.tree.map(jnp.copy, eqx.filter(model, trainable_filter(model)))


def reference_model(model: M, adapters: Any) -> M:
    """What the policy `model`, or a part of it, is held to; shares the weights, and no gradient flows.

    That is the base without adapters, or with frozen ones (a tree like `model`, or its leaves alone).
    """
    if adapters is None:
        return unwrap_lora(model)
    mine, weights = eqx.partition(model, trainable_filter(model))
    frozen = jax.tree.unflatten(jax.tree.structure(mine), jax.tree.leaves(adapters))
    return jax.lax.stop_gradient(eqx.combine(frozen, weights))


@eqx.filter_jit
def equals_reference(model: Any, adapters: Any, *, training: bool = False) -> jax.Array:
    """Whether the policy `model` is `reference_model(model, adapters)`, by their arrays: a bool without axes.

    It is if its adapters add nothing to the base, or if they are those of the reference. Both may be the adapters of a
    model, without its weights. With dropout, in `training`, the policy is not the reference that has equal adapters.
    """
    mine = [linear for linear, _ in linear_layers(model) if isinstance(linear, LoraLinear)]
    if adapters is None:
        adds_nothing = [~(jnp.any(x.lora_A.array != 0) & jnp.any(x.lora_B.array != 0)) for x in mine]
        return functools.reduce(jnp.logical_and, adds_nothing, jnp.ones((), bool))
    trainable = eqx.filter(model, trainable_filter(model))
    drops = training and any(linear.dropout > 0.0 for linear in mine)
    if drops or jax.tree.structure(trainable) != jax.tree.structure(adapters):
        return jnp.zeros((), bool)
    same = jax.tree.leaves(jax.tree.map(jnp.array_equal, trainable, adapters))
    return functools.reduce(jnp.logical_and, same, jnp.ones((), bool))


def merge_lora(model: M) -> M:
    """The plain model that computes what the adapted one does."""
    return map_linear_layers(lambda linear, _: linear.merged() if isinstance(linear, LoraLinear) else linear, model)


def with_dropout(model: M, rate: float) -> M:
    """The model with this dropout in all its adapters."""

    def change(linear: Any, _: list[str]) -> Any:
        return dataclasses.replace(linear, dropout=rate) if isinstance(linear, LoraLinear) else linear

    return map_linear_layers(change, model)


def trainable_filter(model: M) -> M:
    """A tree of bools, true at adapters: for `equinox.partition`."""

    def mark(node):
        mine = jax.tree.map(lambda _: False, node)
        if isinstance(node, LoraLinear):
            return eqx.tree_at(lambda n: (n.lora_A.array, n.lora_B.array), mine, (True, True))
        return mine

    return jax.tree.map(mark, model, is_leaf=lambda node: isinstance(node, LoraLinear))


def linear_layers(model: Any) -> Iterator[tuple[Any, list[str]]]:
    """Every Linear or LoraLinear with its dotted names: one name, or one per layer if it is stacked."""
    found: list[tuple[Any, list[str]]] = []

    def remember(linear, names):
        found.append((linear, names))
        return linear

    map_linear_layers(remember, model)
    return iter(found)


def map_linear_layers(fn: Callable[[Any, list[str]], Any], model: M) -> M:
    """Replaces each Linear or LoraLinear by `fn(layer, names)`."""

    def is_linear(node):
        return isinstance(node, LoraLinear | hnn.Linear)

    def visit(path, node):
        return fn(node, checkpoint_names(path, model)) if is_linear(node) else node

    return jax.tree_util.tree_map_with_path(visit, model, is_leaf=is_linear)


def matching_names(names: list[str], config: LoraConfig) -> list[str]:
    """The targets among `names`, matched as PEFT matches them."""
    targets, excluded = config.target_modules, config.exclude_modules
    if targets is None:
        chosen = [name for name in names if name != "lm_head"]
    else:
        chosen = [name for name in names if _matches(name, targets)]
    return [name for name in chosen if not (excluded and _matches(name, excluded))]


def _matches(name: str, patterns: list[str] | str) -> bool:
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith("." + pattern) for pattern in patterns)


def _refuse_bad_targets(targets: set[str], names: list[str], model: Any, config: LoraConfig) -> None:
    wanted = config.target_modules
    tied = getattr(model, "lm_head", "absent") is None
    if tied and wanted is not None and _matches("lm_head", wanted):
        raise ValueError(
            "lora.target_modules names lm_head, but this model ties its head to the input embedding: merging such an "
            "adapter would change the embedding too (PEFT does so, without a word). Leave lm_head out."
        )
    if not targets:
        raise ValueError(
            f"lora.target_modules={wanted!r} (exclude_modules={config.exclude_modules!r}) matches none of the "
            f"{len(names)} linear layers: {_abridged(names)}"
        )
    if isinstance(wanted, list) and (unused := [t for t in wanted if not any(_matches(n, [t]) for n in names)]):
        raise ValueError(f"lora.target_modules: {unused} match no linear layer; there are: {_abridged(names)}")


def _abridged(names: list[str]) -> list[str]:
    """One name per kind of layer."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))


def _new_adapter(linear: hnn.Linear, chosen: list[bool], config: LoraConfig, key) -> LoraLinear:
    Rank = Axis(RANK, config.r)
    In, Out = axes_of(linear.In), axes_of(linear.Out)
    # A stacked (scanned) layer has extra leading axes; each of its slices gets its own factors.
    stack = tuple(axis for axis in linear.weight.axes if axis not in In + Out)
    k_A, k_B = jax.random.split(key)
    A_axes, B_axes = stack + (Rank,) + In, stack + Out + (Rank,)
    zero_A = config.a_init == "zero"
    zero_B = config.zero_init_b and not zero_A
    fan_in = math.prod(axis.size for axis in In)
    lora_A = hax.zeros(A_axes) if zero_A else _kaiming_uniform(k_A, A_axes, fan_in)
    lora_B = hax.zeros(B_axes) if zero_B else _kaiming_uniform(k_B, B_axes, config.r)
    active = None
    if not all(chosen):
        active = hax.named(jnp.array(chosen, dtype=jnp.float32), stack)
    return LoraLinear(linear, lora_A, lora_B, config.scaling, config.dropout, active)


def _kaiming_uniform(key, axes: tuple[Axis, ...], fan_in: int) -> NamedArray:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): torch's kaiming_uniform with a = sqrt(5), PEFT's default."""
    bound = 1 / math.sqrt(fan_in)
    return hax.random.uniform(key, axes, minval=-bound, maxval=bound, dtype=jnp.float32)
