"""Which evaluation is the best so far, and whether later ones have been worse for long enough. Numbers alone."""

import dataclasses
import logging
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_dpo_jax.settings.choices import check_choices

logger = logging.getLogger("lora_dpo_jax")

PREFIX = "eval/"  # of the names of an evaluation's metrics


@dataclass(frozen=True)
class BestConfig:
    """The final exports hold the adapters of the evaluation with the best value of one metric."""

    metric: str | None = None  # a metric of evaluations, such as eval/loss; null: the last adapters are exported
    mode: Literal["min", "max"] | None = None  # which value is better; null: min, of a metric whose name ends in loss

    def __post_init__(self):
        check_choices(self, "trainer.best")
        if self.metric is None and self.mode is not None:
            raise ValueError(f"trainer.best.mode={self.mode} does nothing without trainer.best.metric: set it too")
        if self.metric is None:
            return
        if not self.metric.startswith(PREFIX):
            raise ValueError(
                f"trainer.best.metric={self.metric!r} must be a metric of the held-out data, such as eval/loss or "
                "eval/dpo_accuracy"
            )
        if self.mode is None and not self.metric.endswith("loss"):
            raise ValueError(
                f"trainer.best.mode must say which {self.metric} is better, min or max; null is only for losses"
            )

    @property
    def smaller_is_better(self) -> bool:
        return self.mode != "max"

    @property
    def word(self) -> str:
        """For sentences: the best value is the lowest one, or the highest."""
        return "lowest" if self.smaller_is_better else "highest"

    def is_better(self, value: float, other: float) -> bool:
        """NaN is never better."""
        return value < other if self.smaller_is_better else value > other

    def __call__(self, standing: "Standing", step: int, value: float, *, min_delta: float) -> "Standing":
        """The standing after the evaluation after `step` steps. One that was counted before changes nothing."""
        if standing.last_step is not None and step <= standing.last_step:
            return standing
        worst = math.inf if self.smaller_is_better else -math.inf
        former = worst if standing.value is None else standing.value
        is_better = math.isfinite(value) and self.is_better(value, former)
        # As transformers' EarlyStoppingCallback: progress is measured from the best value, not from the last one.
        waits = not (is_better and abs(value - former) > min_delta) and standing.evaluations > 0
        return dataclasses.replace(
            standing,
            step=step if is_better else standing.step,
            value=value if is_better else standing.value,
            evaluations=standing.evaluations + 1,
            waited=standing.waited + 1 if waits else 0,
            last_step=step,
        )


@dataclass(frozen=True)
class EarlyStoppingConfig:
    """The run ends after so many evaluations without an improvement of trainer.best.metric."""

    patience: int | None = None  # evaluations in a row; null: the run takes all its steps
    min_delta: float = 0.0  # an evaluation that is better by no more than this counts as none

    def __post_init__(self):
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"trainer.early_stopping.patience={self.patience} must be at least 1, or null for none")
        if not 0 <= self.min_delta < math.inf:
            raise ValueError(f"trainer.early_stopping.min_delta={self.min_delta} must be at least 0, and finite")
        if self.patience is None and self.min_delta:
            raise ValueError(
                f"trainer.early_stopping.min_delta={self.min_delta} does nothing without "
                "trainer.early_stopping.patience: set it too"
            )


@dataclass(frozen=True)
class Standing:
    """What the evaluations so far have shown. It serializes to JSON, and is a note of each checkpoint."""

    best: BestConfig = field(default_factory=BestConfig)  # by which they were compared
    step: int | None = None  # of the best evaluation; None: none has given a number
    value: float | None = None  # its metric
    evaluations: int = 0
    waited: int = 0  # evaluations in a row without an improvement
    last_step: int | None = None  # of the last evaluation

    @staticmethod
    def read(note: dict[str, Any] | None, best: BestConfig) -> "Standing":
        """From the note of a checkpoint, if it has one for the same metric; else without an evaluation."""
        if note is None:
            return Standing(best)
        former = BestConfig(**note["best"])
        if (former.metric, former.smaller_is_better) != (best.metric, best.smaller_is_better):
            logger.warning(
                "trainer.best: the evaluations so far were compared by the %s %s, and are forgotten: later "
                "ones compete alone for the %s %s",
                *(former.word, former.metric, best.word, best.metric),
            )
            return Standing(best)
        return Standing(**{**note, "best": best})

    def note(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
