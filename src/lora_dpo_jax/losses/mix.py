"""A weighted sum of losses."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from haliax import NamedArray

from lora_dpo_jax.columns import LABEL
from lora_dpo_jax.losses.examples import Examples
from lora_dpo_jax.losses.interface import Loss
from lora_dpo_jax.losses.scores import Scores
from lora_dpo_jax.objective import ExampleLosses, Mean


@dataclass(frozen=True)
class Mix(Loss):
    """The weighted sum of several losses, as in MPO, https://arxiv.org/abs/2411.10442.

    The metrics are those of the first loss, with what the others add to them; and `<type>_loss` of each loss, without
    its weight.
    """

    beta: float = 0.0  # of all `losses`; 0: each has its own
    losses: list[Loss] = field(default_factory=list)  # each with its type and settings
    weights: list[float] | None = None  # of the losses, in their order; null: 1 for each

    def __post_init__(self):
        if not 0 <= self.beta < math.inf:
            raise ValueError(
                f"loss.beta={self.beta} must be positive and finite, or 0: each loss of the mix has its own"
            )
        if not self.losses or any(isinstance(loss, Mix) for loss in self.losses):
            raise ValueError("loss.losses must list at least one loss, and no mix")
        if self.needs_comparisons and LABEL in self.all_columns:
            raise ValueError(
                "loss.losses has losses of single answers (kto, apo_zero_unpaired) beside losses of comparisons: no "
                "data have both; choose losses of one kind"
            )
        if self.weights is not None and len(self.weights) != len(self.losses):
            raise ValueError(
                f"loss.weights has {len(self.weights)} weights for the {len(self.losses)} losses of loss.losses; "
                "needed: one for each"
            )
        if self.weights is not None and not all(0 <= weight < math.inf for weight in self.weights):
            raise ValueError(f"loss.weights={self.weights} must be at least 0, and finite")
        for number, loss in enumerate(self.losses):
            if self.beta and loss.beta not in (self.beta, type(loss).beta):
                raise ValueError(
                    f"loss.beta={self.beta} and loss.losses.{number}.beta={loss.beta} disagree; give one of them"
                )

    @property
    def needs_comparisons(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(loss.needs_comparisons for loss in self.losses)

    @property
    def needs_mismatched(self) -> bool:
        return any(loss.needs_mismatched for loss in self.losses)

    @property
    def takes_margins(self) -> bool:
        return any(loss.takes_margins for loss in self.losses)

    @property
    def takes_labels(self) -> bool:
        return any(loss.takes_labels for loss in self.losses)

    @property
    def parts(self) -> tuple[tuple[float, Loss], ...]:
        """The weights and the losses, with the beta that counts."""
        losses = [dataclasses.replace(loss, beta=self.beta) if self.beta else loss for loss in self.losses]
        return tuple(zip(self.weights or [1.0] * len(losses), losses, strict=True))

    @property
    def needs_reference(self) -> bool:
        return any(loss.needs_reference for loss in self.losses)

    @property
    def needs_tokens(self) -> bool:
        return any(loss.needs_tokens for loss in self.losses)

    @property
    def needs_tokens_of_reference(self) -> bool:
        return any(loss.needs_tokens_of_reference for loss in self.losses)

    @property
    def all_columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for loss in self.losses for name in loss.all_columns))

    @property
    def all_statistics(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for loss in self.losses for name in loss.all_statistics))

    def loss_where_equal(self, examples: Examples) -> float | None:
        total = 0.0
        for weight, loss in self.parts:
            if (value := loss.loss_where_equal(examples)) is None:
                return None
            total += weight * value
        return total

    def margins(self, policy: Scores, reference: Scores | None, examples: Examples) -> NamedArray | None:
        """Those of the first loss, as its other metrics."""
        return self.parts[0][1].margins(policy, reference, examples)

    @property
    def warning(self) -> str | None:
        return " ".join(filter(None, (loss.warning for loss in self.losses))) or None

    @property
    def needs_of_batch(self) -> Literal["nothing", "tokens", "scores"]:
        needs = {loss.needs_of_batch for loss in self.losses}
        return "scores" if "scores" in needs else "tokens" if "tokens" in needs else "nothing"

    def of_batch(self, policy: Scores, reference: Scores | None, examples: Examples) -> dict[str, NamedArray]:
        return _numbered(loss.of_batch(policy, reference, examples) for _, loss in self.parts)

    def __call__(
        self, policy: Scores, reference: Scores | None, examples: Examples, *, are_equal: jax.Array | bool = False
    ) -> ExampleLosses:
        total, metrics, own_name = None, {}, {}
        for number, (weight, loss) in enumerate(self.parts):
            known = dataclasses.replace(examples, of_batch=_of_number(examples.of_batch, number))
            found = loss(policy, reference, known, are_equal=are_equal)
            total = weight * found.loss if total is None else total + weight * found.loss
            metrics = found.metrics | metrics
            mean = Mean.over(found.loss, examples.is_example.astype(jnp.float32))
            own_name[f"{self.names[number]}_loss"] = mean
        assert total is not None
        return ExampleLosses(total, metrics | own_name)

    @property
    def names(self) -> list[str]:
        """The types of the losses. The second of a type is `<type>_2`, and so on."""
        types = [loss.get_choice_name(type(loss)) for loss in self.losses]
        earlier = [types[:number].count(name) for number, name in enumerate(types)]
        return [f"{name}_{count + 1}" if count else name for name, count in zip(types, earlier, strict=True)]


def _numbered(dictionaries: Iterable[dict[str, NamedArray]]) -> dict[str, NamedArray]:
    """The entries of all, each named after the number of its dictionary too."""
    return {f"{n}.{name}": values for n, found in enumerate(dictionaries) for name, values in found.items()}


def _of_number(entries: dict[str, NamedArray], number: int) -> dict[str, NamedArray]:
    """The entries of dictionary `number`, under their own names."""
    prefix = f"{number}."
    return {name.removeprefix(prefix): values for name, values in entries.items() if name.startswith(prefix)}
