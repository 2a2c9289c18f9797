"""The interface of all losses."""

import abc
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import draccus
import jax

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
    def needs_tokens(self) -> bool:
        """Whether the loss needs scores of single tokens, and not only sums over responses."""
        return self.per_token != "none" or bool(self.statistics)

    @property
    def needs_tokens_of_reference(self) -> bool:
        return self.needs_reference and self.per_token == "both"

    def loss_where_equal(self) -> float | None:
        """The loss of every example if policy and reference are equal, or None if that loss is not known."""
        return None

    @abc.abstractmethod
    def __call__(
        self, policy: Scores, reference: Scores | None, examples: Examples, *, are_equal: jax.Array | bool = False
    ) -> ExampleLosses:
        """`reference` is None if it is not needed. `are_equal`: policy and reference are equal up to rounding."""
