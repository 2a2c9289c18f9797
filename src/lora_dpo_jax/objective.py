"""What a train step minimizes: a function from a model and a micro-batch to a loss for each example.

    losses = objective(model, reference, micro, key=key)      ExampleLosses
        loss       {row, example}     0 where a slot is empty
        metrics    name -> Mean

The step divides the sum of the losses by the number of examples in the whole batch, whatever its parts and
micro-batches. A metric is a sum and its count, so that parts add up too.
"""

from typing import Any, Protocol, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from haliax import NamedArray

M = TypeVar("M", contravariant=True)


class Mean(eqx.Module):
    """A metric: `total / count`, once all parts of a batch are added up."""

    total: jax.Array
    count: jax.Array

    @staticmethod
    def over(values: NamedArray, weight: NamedArray) -> "Mean":
        """The mean of `values`, each counting `weight` times; what has no weight may be NaN."""
        counted = jnp.where(weight.array > 0, weight.array * values.rearrange(weight.axes).array, 0.0)
        return Mean(jnp.sum(counted), jnp.sum(weight.array))

    @property
    def value(self) -> jax.Array:
        """0 where there is nothing to take the mean of."""
        return self.total / jnp.maximum(self.count, jnp.finfo(jnp.float32).tiny)


class ExampleLosses(eqx.Module):
    """What an objective says of a micro-batch."""

    loss: NamedArray  # float32 {..., example}; 0 where a slot is empty
    metrics: dict[str, Mean] = eqx.field(default_factory=dict)


class Objective(Protocol[M]):
    """Any such function. One that has `flops(model, part)` too gets them logged, as `mfu`."""

    def __call__(self, model: Any, reference: Any, micro: M, /, *, key: jax.Array | None) -> ExampleLosses:
        """`reference` is the state's: the adapters of the reference, or None. `key` is for dropout."""
        ...
