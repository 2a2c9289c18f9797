"""What losses see: scores of responses, which example each belongs to, and which are compared. Nothing of tokens.

    examples       0        1
    responses      0   1    2   3   4       example_of_response: 0 0 1 1 1
    comparisons    0 > 1    2 > 3, 2 > 4    chosen: 0 2 2, rejected: 1 3 4, example_of_comparison: 0 1 1

Axes that stand before these (rows of a packed batch) are all arrays' own: numbers count within a row. An empty place has
the number -1.
"""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
from haliax import Axis, NamedArray

EXAMPLE, RESPONSE, COMPARISON = "example", "response", "comparison"


class TokenScores(eqx.Module):
    """Of single tokens of responses, {..., target}."""

    log_probs: NamedArray  # log p(token | all before it), float32, nats; 0 where there is no token
    response: NamedArray  # the response that it is of; -1 = none


class Scores(eqx.Module):
    """What one model says of responses. Float32 but for `tokens`."""

    log_probs: NamedArray  # {..., response}: log p(response | prompt), nats, summed over its tokens
    tokens: NamedArray  # {..., response}: how many they are
    # By name, {..., response}: other numbers of each token's distribution, summed over tokens; no gradient goes through.
    statistics: Mapping[str, NamedArray] = eqx.field(default_factory=dict)
    by_token: TokenScores | None = None
    auxiliary: Mapping[str, NamedArray] = eqx.field(default_factory=dict)  # {row}: see models.layers.Auxiliary


class Examples(eqx.Module):
    """Which responses make up an example, and which are compared."""

    is_example: NamedArray  # bool {..., example}
    example_of_response: NamedArray  # {..., response}
    chosen: NamedArray  # {..., comparison}: a response
    rejected: NamedArray  # {..., comparison}
    example_of_comparison: NamedArray  # {..., comparison}
    weight: NamedArray  # float32 {..., comparison}; those of an example add up to 1 unless the data say otherwise
    columns: Mapping[str, NamedArray] = eqx.field(default_factory=dict)  # of the data, float32, by name

    @property
    def is_comparison(self) -> NamedArray:
        return self.example_of_comparison >= 0

    def pairs(self, scores: Scores) -> "PairLogProbs":
        """The two sides of each comparison."""
        chosen, rejected = (_gather(scores.log_probs, side) for side in (self.chosen, self.rejected))
        tokens = (_gather(scores.tokens, side) for side in (self.chosen, self.rejected))
        return PairLogProbs(chosen, rejected, *tokens)

    def sum_by_example(self, values: NamedArray, of: NamedArray) -> NamedArray:
        """{..., example} from values {..., response} or {..., comparison}, of which `of` says the example."""
        Example = self.is_example.resolve_axis(EXAMPLE)
        (axis,) = (axis for axis in of.axes if axis not in self.is_example.axes)
        belongs: Any = of.broadcast_axis(Example) == hax.arange(Example)
        return hax.sum(hax.where(belongs, values, 0.0), axis=axis).rearrange(self.is_example.axes)

    @staticmethod
    def of_pairs(count: Axis) -> "Examples":
        """As many examples as `count`, each of two responses of which the first is preferred."""
        number = hax.arange(count)
        return Examples(
            is_example=hax.ones(count.alias(EXAMPLE), dtype=bool),
            example_of_response=hax.named(jnp.repeat(number.array, 2), RESPONSE),
            chosen=hax.named(2 * number.array, COMPARISON),
            rejected=hax.named(2 * number.array + 1, COMPARISON),
            example_of_comparison=hax.named(number.array, COMPARISON),
            weight=hax.named(jnp.ones(count.size, jnp.float32), COMPARISON),
        )


class PairLogProbs(eqx.Module):
    """The two sides of comparisons: log p(response | prompt) in nats, and the number of tokens. All {..., comparison}."""

    chosen: NamedArray
    rejected: NamedArray
    chosen_tokens: NamedArray
    rejected_tokens: NamedArray


class Weighted(eqx.Module):
    """A metric that is not a mean over examples: the sum of `values * weight` over that of `weight`. Same axes."""

    values: NamedArray
    weight: NamedArray


class ExampleLosses(eqx.Module):
    """What a loss gives: {..., example} each, or `Weighted`."""

    loss: NamedArray
    metrics: Mapping[str, NamedArray | Weighted]


def _gather(values: NamedArray, index: NamedArray) -> NamedArray:
    """values {..., response} at index {..., comparison}; where that is -1, at 0."""
    taken = jnp.take_along_axis(values.array, jnp.maximum(index.array, 0), axis=-1)
    return hax.named(taken, index.axes)
