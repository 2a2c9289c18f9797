"""Which responses belong to which example, which responses are compared, and their columns of the data.

    example                0       1           two examples of a row: a pair, and a ranked list
    response               0 1     2 3 4
    example_of_response    0 0     1 1 1
    chosen                 0       2 2 3       response 2 is preferred to 3 and to 4, and 3 to 4
    rejected               1       3 4 4
    example_of_comparison  0       1 1 1
    weight                 1       1/3 1/3 1/3

Arrays may also have a leading row axis; indices then count slots within the row. Empty slots are -1, or have weight 0.
"""

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
from haliax import NamedArray

from lora_dpo_jax.axes import EXAMPLE, RESPONSE
from lora_dpo_jax.columns import DESIRABLE, LABEL, WEIGHT


class Examples(eqx.Module):
    """The examples of a row or of a batch. Arrays are int32 unless noted."""

    ids: NamedArray  # {..., example}: index in the data
    example_of_response: NamedArray  # {..., response}
    chosen: NamedArray  # {..., comparison}: the preferred response
    rejected: NamedArray  # {..., comparison}
    example_of_comparison: NamedArray  # {..., comparison}
    weight: NamedArray  # float32 {..., comparison}; an example's weights add up to 1 unless the data set others
    columns: dict[str, NamedArray] = eqx.field(default_factory=dict)  # float32 {..., example} or {..., response}
    # What a loss knows of the whole batch, of which these examples may be a part: see Loss.of_batch.
    of_batch: dict[str, NamedArray] = eqx.field(default_factory=dict)  # float32 {...} or {..., slot}

    def column(self, name: str) -> NamedArray:
        """float32 {..., example} or {..., response}. Raises ValueError if the batch has no such column."""
        if name not in self.columns:
            raise ValueError(
                f"the batch has the columns {sorted(self.columns)}, but the loss reads {name!r}: name it in the loss's "
                "`columns`, and give it to packed_batches(..., columns=...)"
            )
        return self.columns[name]

    @property
    def is_example(self) -> NamedArray:
        """bool {..., example}."""
        return self.ids >= 0

    @property
    def is_response(self) -> NamedArray:
        """bool {..., response}."""
        return self.example_of_response >= 0

    @property
    def is_comparison(self) -> NamedArray:
        """bool {..., comparison}."""
        return self.example_of_comparison >= 0

    @property
    def is_imitated(self) -> NamedArray:
        """bool {..., response}: responses without a comparison that are to be imitated.

        If the batch has labels, these are desirable answers; if it has weights, those whose weight is not 0.
        """
        comparisons = self.of_responses(self.sum_of_comparisons(self.is_comparison.astype(jnp.float32)))
        found = self.is_response & (comparisons == 0)
        if LABEL in self.columns:
            found = found & (self.column(LABEL) == DESIRABLE)
        if WEIGHT in self.columns:
            found = found & (self.of_responses(self.column(WEIGHT)) > 0)
        return found

    @property
    def share(self) -> NamedArray:
        """float32 {..., comparison}: weight / its sum over the example. A mean with it counts each example once."""
        total = self.of_comparisons(self.sum_of_comparisons(self.weight))
        return hax.where(total > 0, self.weight / hax.where(total > 0, total, 1.0), 0.0)

    def of_comparisons(self, values: NamedArray) -> NamedArray:
        """The value of each comparison's example: from {..., example} to {..., comparison}."""
        return take(values, EXAMPLE, self.example_of_comparison)

    def of_responses(self, values: NamedArray) -> NamedArray:
        """The value of each response's example: from {..., example} to {..., response}."""
        return take(values, EXAMPLE, self.example_of_response)

    def compared(self, values: NamedArray) -> tuple[NamedArray, NamedArray]:
        """The values of each comparison's chosen and rejected response: from {..., response} to {..., comparison}."""
        return take(values, RESPONSE, self.chosen), take(values, RESPONSE, self.rejected)

    def sum_of_comparisons(self, values: NamedArray) -> NamedArray:
        """The sum over each example's comparisons: from {..., comparison} to {..., example}."""
        return add_up(values, self.example_of_comparison, self.ids.resolve_axis(EXAMPLE))

    def least_of_responses(self, values: NamedArray) -> NamedArray:
        """The least value among all responses of a response's example: from {..., response} to {..., response}."""
        other = values.rename({RESPONSE: "other_response"})
        example = self.example_of_response.rename({RESPONSE: "other_response"})
        is_mine = self.example_of_response.broadcast_axis(other.axes[-1]) == example
        most = jnp.iinfo(values.dtype).max if jnp.issubdtype(values.dtype, jnp.integer) else jnp.inf
        return hax.min(hax.where(is_mine, other, most), axis="other_response").rearrange(values.axes)

    def sum_of_responses(self, values: NamedArray) -> NamedArray:
        """The sum over each example's responses: from {..., response} to {..., example}."""
        return add_up(values, self.example_of_response, self.ids.resolve_axis(EXAMPLE))


def take(values: NamedArray, axis: str, index: NamedArray) -> NamedArray:
    """The values {..., axis} at `index` {..., slot}, within each row; 0 where the index is negative."""
    slots = index.axes[-1]
    values = values.rearrange((*index.axes[:-1], axis))
    if len(index.axes) == 1:
        return hax.where(index >= 0, hax.named(values.array[jnp.maximum(index.array, 0)], slots), 0)
    # By a sum over a one-hot mask: on a GPU, the gradient of a gather would use atomic additions in no fixed order.
    Axis = values.resolve_axis(axis)
    is_it = index.broadcast_axis(Axis) == hax.arange(Axis)
    return hax.sum(hax.where(is_it, values, 0), axis=Axis).rearrange(index.axes)


def add_up(values: NamedArray, index: NamedArray, Axis: hax.Axis) -> NamedArray:
    """The transpose of `take`: sums the values {..., slot} that have the same index, within each row."""
    values = values.rearrange(index.axes)
    if len(index.axes) == 1:
        at = jnp.where(index.array >= 0, index.array, Axis.size)
        return hax.named(jax.ops.segment_sum(values.array, at, Axis.size + 1)[:-1], Axis)
    is_it = index.broadcast_axis(Axis) == hax.arange(Axis)
    summed = hax.sum(hax.where(is_it, values, 0), axis=index.axes[-1])
    return summed.rearrange((*index.axes[:-1], Axis))


def greatest(values: NamedArray, index: NamedArray, Axis: hax.Axis) -> NamedArray:
    """The greatest of the values {..., slot} that have the same index, within each row; 0 where there are none."""
    values = values.rearrange(index.axes)
    if len(index.axes) == 1:
        at = jnp.where(index.array >= 0, index.array, Axis.size)
        found = hax.named(jax.ops.segment_max(values.array, at, Axis.size + 1)[:-1], Axis)
    else:
        is_it = index.broadcast_axis(Axis) == hax.arange(Axis)
        found = hax.max(hax.where(is_it, values, -jnp.inf), axis=index.axes[-1])
        found = found.rearrange((*index.axes[:-1], Axis))
    return hax.where(found > -jnp.inf, found, 0.0)
