"""The interface of all losses."""

import abc
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import draccus
import jax
from haliax import NamedArray

from lora_dpo_jax.losses.examples import Examples
from lora_dpo_jax.losses.scores import Scores
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

    def loss_where_equal(self) -> float | None:
        """The loss of every example if policy and reference are equal, or None if that loss is not known."""
        return None

    @property
    def needs_of_batch(self) -> Literal["nothing", "tokens", "scores"]:
        """What `of_batch` is made of: numbers of tokens, or scores.

        With "scores", a batch of several micro-batches is scored once before the step's own passes.
        """
        return "nothing"

    def batch_inputs(self, policy: Scores, reference: Scores | None, examples: Examples) -> dict[str, NamedArray]:
        """What `of_batch` reads, by name: float32 {..., comparison}, {..., example} or {..., response}.

        Log-probs are zeros unless it needs scores.
        """
        return {}

    def of_batch(self, inputs: dict[str, NamedArray]) -> dict[str, NamedArray]:
        """What the loss needs to know of the whole batch, for `Examples.of_batch`, by name.

        All are float32 {comparison}, or likewise: the `batch_inputs` of all comparisons of the batch, and the result,
        whose axes are among theirs. Slots without a comparison are among them; none of them may change the result for
        the others.
        """
        return {}

    @abc.abstractmethod
    def __call__(
        self, policy: Scores, reference: Scores | None, examples: Examples, *, are_equal: jax.Array | bool = False
    ) -> ExampleLosses:
        """`reference` is None if it is not needed. `are_equal`: policy and reference are equal up to rounding.

        If `examples.of_batch` is empty, the examples given are the whole batch.
        """
