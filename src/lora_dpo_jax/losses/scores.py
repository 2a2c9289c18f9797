"""The scores of responses under one model."""

import equinox as eqx
from haliax import NamedArray

from lora_dpo_jax.axes import RESPONSE
from lora_dpo_jax.losses.examples import Examples, add_up, take


class TokenScores(eqx.Module):
    """The scores of each token of each response, in slots; several responses share a row."""

    log_probs: NamedArray  # float32 {..., target}, in nats; 0 in an empty slot
    response: NamedArray  # int32 {..., target}: which response the token belongs to; -1 in an empty slot
    index: NamedArray  # int32 {..., target}: the token's index among the scored ones of its response, from 0
    statistics: dict[str, NamedArray] = eqx.field(default_factory=dict)  # float32 {..., target}, without gradient

    def summed(self, values: NamedArray, examples: Examples) -> NamedArray:
        """The sum over the tokens of each response: from {..., target} to {..., response}."""
        return add_up(values, self.response, examples.example_of_response.resolve_axis(RESPONSE))

    def of_tokens(self, values: NamedArray) -> NamedArray:
        """The value of each token's response: from {..., response} to {..., target}."""
        return take(values, RESPONSE, self.response)


class Scores(eqx.Module):
    """log p(response | prompt) in nats, summed over the response's tokens, and the number of these tokens."""

    log_probs: NamedArray  # float32 {..., response}
    tokens: NamedArray  # int32 {..., response}
    per_token: TokenScores | None = None  # where the loss asks for it
    auxiliary: dict[str, NamedArray] = eqx.field(default_factory=dict)  # values that layers report for a loss, by name
