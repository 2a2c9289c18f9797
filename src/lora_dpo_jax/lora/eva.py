"""EVA (https://arxiv.org/abs/2410.07170): A starts at the principal components of a layer's inputs on the data.

A probe in the place of each target sums over tokens what is needed: it is an adapter whose "gradients" are these sums.
Subspace iteration then finds the components, so that no matrix of the size of inputs squared is held.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
from haliax import Axis, NamedArray

from lora_dpo_jax.axes import RANK
from lora_dpo_jax.lora.adapter import Adapter, ByLayer, Factor, names_of, stack_axes
from lora_dpo_jax.lora.config import LoraConfig
from lora_dpo_jax.lora.dropout import TokenKey
from lora_dpo_jax.lora.surgery import adapt
from lora_dpo_jax.lora.tree import linear_layers, map_linear_layers
from lora_dpo_jax.tensor_names import axes_of

M = TypeVar("M")

MORE = 8  # components that are sought beyond the rank, so that those within it are found sooner
ROUNDS = 8  # of subspace iteration


class Probe(Adapter):
    """Leaves the layer as it is. Whatever is differentiated, its gradients are sums over the tokens that are shown.

    The first token number of the key says which tokens are: 1, or 0.
    """

    wrapped: Any
    sketch: NamedArray  # {*stack, lora_rank, *In}: S; its gradient is S X^T X, with X the inputs {token, *In}
    total: NamedArray  # {*stack, *In}: its gradient is the sum of X over tokens
    count: NamedArray  # {*stack}: its gradient is the number of tokens
    scaling: float = eqx.field(static=True, default=1.0)
    dropout: float = eqx.field(static=True, default=0.0)
    by_layer: ByLayer | None = None

    @classmethod
    def init(cls, layer: Any, config: LoraConfig, by_layer: ByLayer | None, *, key) -> "Probe":
        del by_layer
        stack, In = stack_axes(layer), axes_of(layer.In)
        Rank = Axis(RANK, min(config.r + MORE, hax.axis_size(In)))
        sketch = hax.random.normal(key, (*stack, Rank, *In), dtype=jnp.float32)
        return Probe(layer, sketch=sketch, total=hax.zeros((*stack, *In)), count=hax.zeros(stack))

    @property
    def factors(self) -> dict[str, Factor]:
        In = names_of(self.wrapped.In)
        return {
            "sketch": Factor(self.sketch, ((RANK,), In)),
            "total": Factor(self.total, (In,)),
            "count": Factor(self.count, ()),
        }

    @property
    def rank(self) -> int:
        return self.sketch.resolve_axis(RANK).size

    def __call__(self, x: NamedArray, *, key=None) -> NamedArray:
        assert isinstance(key, TokenKey)
        return self.wrapped(_observed(x, key.token[0], self.sketch, self.total, self.count))

    def merge(self, weight: Any, tensors: Mapping[str, Any], scaling: Any) -> Any:
        return weight

    def adds_nothing(self) -> jax.Array:
        return jnp.ones((), bool)


@jax.custom_vjp
def _observed(x: NamedArray, shown: NamedArray, sketch: NamedArray, total: NamedArray, count: NamedArray) -> NamedArray:
    """x itself."""
    return x


def _observe(x, shown, sketch, total, count):
    return x, (x, shown, sketch, total, count)


def _sums(saved, cotangent: NamedArray):
    x, shown, sketch, total, count = saved
    tokens: Any = shown.axes
    seen = x.astype(jnp.float32) * shown
    low = seen.dot(sketch, axis=[axis for axis in total.axes if axis not in count.axes])
    return (
        cotangent,
        hax.zeros_like(shown),
        low.dot(seen, axis=tokens).rearrange(sketch.axes),
        hax.sum(seen, axis=tokens).rearrange(total.axes),
        hax.zeros(count.axes) + hax.sum(shown, axis=tokens),
    )


_observed.defvjp(_observe, _sums)


def with_principal_inputs(model: M, adapted: M, targets: list[str], rank: int, sums: Callable[[M], M], *, key) -> M:
    """`adapted` with A at the principal components of the inputs of its layers: orthonormal, the largest first.

    `model` has no adapters. `sums` takes it with probes on `targets`, and gives the gradients of the probes over the
    data. Of layers of lower rank, as many components are taken.
    """
    config = LoraConfig(r=rank)
    keys = iter(jax.random.split(key, len(targets)))

    def probe(layer: Any, chosen: dict[str, bool]) -> Probe:
        return Probe.init(layer, config, None, key=next(keys))

    probed = adapt(model, targets, probe)
    for _ in range(ROUNDS):
        probed = _turned(probed, _by_name(sums(probed)))
    found = _by_name(sums(probed))
    components = {
        name: _components(_matrix(probe), _covariance_times(probe, found[name]))
        for name, probe in _by_name(probed).items()
    }

    def fill(layer: Any, names: list[str]) -> Any:
        return _with_A(layer, components[names[0]]) if names[0] in components else layer

    return map_linear_layers(fill, adapted)


def _by_name(model: Any) -> dict[str, Probe]:
    return {names[0]: layer for layer, names in linear_layers(model) if isinstance(layer, Probe)}


def _turned(probed: M, sums: Mapping[str, Probe]) -> M:
    """A round of subspace iteration: each sketch becomes an orthonormal basis of the covariance times the sketch."""

    def turn(layer: Any, names: list[str]) -> Any:
        if not isinstance(layer, Probe):
            return layer
        ordered = layer.factors["sketch"].in_order()
        basis = _orthonormal(_covariance_times(layer, sums[names[0]]))
        sketch = hax.named(basis.reshape(ordered.array.shape), ordered.axes).rearrange(layer.sketch.axes)
        return eqx.tree_at(lambda probe: probe.sketch.array, layer, sketch.array)

    return map_linear_layers(turn, probed)


def _matrix(probe: Probe) -> jax.Array:
    """[*stack, rank, in]: the sketch."""
    return probe.factors["sketch"].in_order().array.reshape(*probe.count.array.shape, probe.rank, -1)


@eqx.filter_jit
def _covariance_times(probe: Probe, sums: Probe) -> jax.Array:
    """[*stack, rank, in]: the sketch times the covariance of the inputs, without its factor 1 / n."""
    S, product = _matrix(probe), _matrix(sums)
    total = sums.factors["total"].in_order().array.reshape(*S.shape[:-2], 1, -1)
    count = jnp.maximum(sums.count.array[..., None, None], 1.0)
    return product - (S @ jnp.matrix_transpose(total)) * total / count


@jax.jit
def _orthonormal(product: jax.Array) -> jax.Array:
    return jnp.matrix_transpose(jnp.linalg.qr(jnp.matrix_transpose(product))[0])


@jax.jit
def _components(S: jax.Array, product: jax.Array) -> jax.Array:
    """[*stack, rank, in]: the eigenvectors of the covariance within the span of the orthonormal rows of S."""
    _, vectors = jnp.linalg.eigh(product @ jnp.matrix_transpose(S))
    return jnp.matrix_transpose(vectors[..., ::-1]) @ S


def _with_A(adapter: Any, components: jax.Array) -> Any:
    factor = adapter.factors["lora_A.weight"]
    ordered = factor.in_order()
    ranks = [adapter.settings_of(index)[0] for index in range(int(np.prod(components.shape[:-2], dtype=int)))]
    within = np.arange(adapter.rank) < np.reshape(ranks, (*components.shape[:-2], 1))
    A = components[..., : adapter.rank, :] * within[..., None]
    if A.shape[-2] < adapter.rank:
        A = jnp.pad(A, [(0, 0)] * (A.ndim - 2) + [(0, adapter.rank - A.shape[-2]), (0, 0)])
    array = hax.named(A.reshape(ordered.array.shape), ordered.axes).rearrange(factor.array.axes)
    return eqx.tree_at(lambda a: a.factors["lora_A.weight"].array.array, adapter, array.array)
