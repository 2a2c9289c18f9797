"""The interface of all losses."""

import abc
import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal

import draccus
import haliax as hax
import jax
import jax.numpy as jnp
from haliax import Axis, NamedArray

from lora_dpo_jax.axes import TARGET
from lora_dpo_jax.columns import LABEL, MARGIN, WEIGHT
from lora_dpo_jax.losses.examples import Examples
from lora_dpo_jax.losses.scores import Scores, TokenScores
from lora_dpo_jax.objective import ExampleLosses


@dataclass(frozen=True)
class Loss(draccus.ChoiceRegistry, abc.ABC):
    """A loss, chosen by its `type` in the configuration. It declares the inputs that it needs; others are left out."""

    beta: float = 0.1  # how strongly the policy is held to the reference, in reward units per nat

    # Which models' scores include `per_token`. With "both", the reference is never cached.
    per_token: ClassVar[Literal["none", "policy", "both"]] = "none"
    statistics: ClassVar[tuple[str, ...]] = ()  # of the policy's tokens, by their names in log_probs.STATISTICS
    needs_comparisons: ClassVar[bool] = False
    columns: ClassVar[tuple[str, ...]] = ()  # of the data, by the names in format.columns
    hub_tag: ClassVar[str] = "dpo"  # of exports: the tag of TRL's trainer that has this loss

    @classmethod
    def default_choice_name(cls) -> str:
        return "sigmoid"

    def __post_init__(self):
        if not 0 < self.beta < math.inf:
            raise ValueError(f"loss.beta={self.beta} must be positive and finite")

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def all_columns(self) -> tuple[str, ...]:
        """The columns that the loss reads, with those of the losses that it is made of."""
        return self.columns

    @property
    def needs_mismatched(self) -> bool:
        """Whether each single answer needs the answer to another prompt beside it."""
        return False

    @property
    def takes_margins(self) -> bool:
        """Whether the loss reads the target margins of the data, if they have any."""
        return False

    @property
    def takes_labels(self) -> bool:
        """Whether the loss reads the labels and weights of single answers, if the data have any."""
        return False

    @property
    def taken_columns(self) -> tuple[str, ...]:
        """The columns that the loss reads if the data have them."""
        return (*([MARGIN] if self.takes_margins else []), *([LABEL, WEIGHT] if self.takes_labels else []))

    def columns_in(self, columns: Collection[str]) -> tuple[str, ...]:
        """The columns that the loss reads from data that have `columns`."""
        taken = (name for name in self.taken_columns if name in columns)
        return tuple(dict.fromkeys([*self.all_columns, *taken]))

    @property
    def all_statistics(self) -> tuple[str, ...]:
        """The statistics that the loss reads; likewise, and with those that its settings ask for."""
        return self.statistics

    @property
    def needs_tokens(self) -> bool:
        """Whether the loss needs scores of single tokens, and not only sums over responses."""
        return self.per_token != "none" or bool(self.all_statistics)

    @property
    def needs_tokens_of_reference(self) -> bool:
        return self.needs_reference and self.per_token == "both"

    def loss_where_equal(self, examples: Examples) -> float | None:
        """The mean loss of a batch if policy and reference are equal, or None if it is not known.

        `examples` are without rows, as from `ExampleArrays.examples`.
        """
        return None

    @property
    def warning(self) -> str | None:
        """What one should know of these settings before a run starts: a sentence that names the setting, or None."""
        return None

    @property
    def needs_of_batch(self) -> Literal["nothing", "tokens", "scores"]:
        """What `of_batch` is made of: numbers of tokens, or scores.

        With "scores", a batch of several micro-batches is scored once before the step's own passes.
        """
        return "nothing"

    def of_batch(self, policy: Scores, reference: Scores | None, examples: Examples) -> dict[str, NamedArray]:
        """What the loss needs to know of the whole batch, for `Examples.of_batch`, by name.

        The arguments are those of a call, for all rows of the batch; log-probs are zeros unless it needs scores. The
        results are float32: scalars, or {..., slot} with the axes of an array of the arguments.
        """
        return {}

    def knowing_batch(self, policy: Scores, reference: Scores | None, examples: Examples) -> Examples:
        """The examples with what the loss needs to know of the batch. They are the whole batch if they lack it."""
        if self.needs_of_batch == "nothing" or examples.of_batch:
            return examples
        return dataclasses.replace(examples, of_batch=self.of_batch(policy, reference, examples))

    @abc.abstractmethod
    def __call__(
        self, policy: Scores, reference: Scores | None, examples: Examples, *, are_equal: jax.Array | bool = False
    ) -> ExampleLosses:
        """`reference` is None if it is not needed. `are_equal`: policy and reference are equal up to rounding.

        If `examples.of_batch` is empty, the examples given are the whole batch.
        """


def mean_of_equal_scores(loss: Loss, examples: Examples) -> float:
    """The mean loss of examples without rows, if no log-prob of policy or reference is other than zero."""
    Response = examples.example_of_response.axes[-1]
    no_token = hax.full(Axis(TARGET, 1), -1, dtype=jnp.int32)
    tokens = TokenScores(hax.zeros_like(no_token, dtype=jnp.float32), no_token, no_token)
    equal = Scores(hax.zeros(Response), hax.ones(Response, dtype=jnp.int32), tokens)

    @jax.jit
    def mean(examples: Examples) -> jax.Array:
        return hax.mean(loss(equal, equal, examples).loss).scalar()

    return float(mean(examples))
