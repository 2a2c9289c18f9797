"""What a train step minimizes: a function from a model and a micro-batch to a loss for each example.

    losses = objective(model, reference, micro, key=key)      ExampleLosses
        loss       {row, example}     0 where a slot is empty
        metrics    name -> Mean

The step divides the sum of the losses by the number of examples in the whole batch, whatever its parts and
micro-batches are. A metric is made of sums, so that the metrics of parts can be added.
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
        """The mean of `values` weighted by `weight`. Values of weight 0 may be NaN."""
        counted = jnp.where(weight.array > 0, weight.array * values.rearrange(weight.axes).array, 0.0)
        return Mean(jnp.sum(counted), jnp.sum(weight.array))

    @property
    def value(self) -> jax.Array:
        """The mean; 0 if `count` is 0."""
        return self.total / (self.count + (self.count == 0))


class DifferenceOfMeans(eqx.Module):
    """A metric: a mean less another one, of other values."""

    first: Mean
    second: Mean

    @property
    def value(self) -> jax.Array:
        """The difference; 0 if one of the means is of nothing."""
        are_known = (self.first.count > 0) & (self.second.count > 0)
        return are_known * (self.first.value - self.second.value)


class Count(eqx.Module):
    """A metric: a number of the whole batch."""

    total: jax.Array

    @property
    def value(self) -> jax.Array:
        return self.total


Metric = Mean | DifferenceOfMeans | Count


class ExampleLosses(eqx.Module):
    """The output of an objective for a micro-batch."""

    loss: NamedArray  # float32 {..., example}; 0 where a slot is empty
    metrics: dict[str, Metric] = eqx.field(default_factory=dict)


class Objective(Protocol[M]):
    """Such a function. If it also has a method `flops(model, part)`, training logs `mfu`.

    A method `prepare(model, reference, parts, key=key)` is for an objective that needs to know of the whole batch: the
    step calls it once, without gradient, and takes the parts that it returns in the place of the batch's own.
    """

    def __call__(self, model: Any, reference: Any, micro: M, /, *, key: jax.Array | None) -> ExampleLosses:
        """`reference` is that of the train state: the reference's adapters, or None. `key` is for dropout."""
        ...
