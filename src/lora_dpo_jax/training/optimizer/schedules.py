"""Learning rates by step: a warmup, then one of the schedules of transformers."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import optax

from lora_dpo_jax.settings.choices import check_choices


@dataclass(frozen=True)
class Schedule:
    """The learning rate of a run, as transformers computes it.

    `warmup` below 1 is a fraction of the run, rounded up to whole steps as in transformers. From 1 on it is a number of
    steps. If this number exceeds the run, the rate rises until the end of the run. `num_decay_steps` likewise.
    """

    learning_rate: float = 5e-6  # the peak; the default is that of TRL's and Levanter's LoRA-DPO examples
    # How the rate falls after the warmup.
    lr_schedule: Literal[
        "constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "wsd", "inverse_sqrt"
    ] = "linear"
    warmup: int | float = 0  # below 1 a fraction of the run, from 1 on a number of steps
    min_lr_ratio: float = 0.0  # the last rate of linear, cosine and wsd, as a fraction of learning_rate
    num_cycles: int | None = None  # of cosine_with_restarts: how often the rate falls from its peak to 0; null is 1
    power: float | None = None  # of polynomial: the exponent of what is left of the run; null is 1
    lr_end: float | None = None  # of polynomial: the last rate, below learning_rate; null is 1e-7
    # Of wsd, which needs it: the length of the decay at the end; below 1 a fraction of the run.
    num_decay_steps: int | float | None = None
    decay_type: Literal["linear", "cosine", "1-sqrt"] | None = None  # of wsd: the form of the decay; null is cosine
    # Of inverse_sqrt: so many steps after the warmup the rate is its peak / sqrt(2); null: the warmup's, or 10,000.
    timescale: int | None = None

    def __post_init__(self):
        require(0 <= self.learning_rate < math.inf, "learning_rate", self.learning_rate, "at least 0, and finite")
        check_choices(self, "optimizer")
        needed = "a fraction in [0, 1) or a whole number of steps below 2**31"
        require(_counts_steps(self.warmup), "warmup", self.warmup, needed)
        require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", self.min_lr_ratio, "in [0, 1]")
        for name, (needed, holds) in _PARAMETERS.items():
            value = getattr(self, name)
            if value is not None:
                require(holds(value), name, value, f"{needed}, or null")
        self._check_use()
        if self.lr_schedule == "polynomial":
            found = _or(self.lr_end, LR_END)
            require(found < self.learning_rate, "lr_end", found, f"below optimizer.learning_rate={self.learning_rate}")

    def warmup_steps(self, num_train_steps: int) -> int:
        return _steps(self.warmup, num_train_steps)

    def schedule(self, num_train_steps: int) -> optax.Schedule:
        """The learning rate of update `step`, counted from 0, as a float32 scalar.

        As in transformers, update 0 of a warmup has rate 0 and changes nothing (but with wsd and min_lr_ratio), and
        update `warmup_steps` has the peak rate.
        """
        warmup_steps = self.warmup_steps(num_train_steps)
        decay_steps = max(1, num_train_steps - warmup_steps)
        decayed = _DECAYS[self.lr_schedule](self, warmup_steps, decay_steps)
        lowest = self.min_lr_ratio if self.lr_schedule == "wsd" else 0.0  # where the warmup starts

        def learning_rate(step):
            counted = jnp.asarray(step)
            step = counted.astype(jnp.float32)
            warming = step / max(1, warmup_steps)
            if lowest:
                warming = lowest + (1.0 - lowest) * warming
            return self.learning_rate * jnp.where(step < warmup_steps, warming, decayed(counted - warmup_steps))

        return learning_rate

    def _check_use(self) -> None:
        """Raises ValueError for a parameter that the schedule does not read, or for one that it lacks."""
        if self.lr_schedule == "wsd" and self.num_decay_steps is None:
            raise ValueError(
                "optimizer.num_decay_steps is missing; optimizer.lr_schedule=wsd needs the length of its decay, as a "
                "number of steps or, below 1, as a fraction of the run"
            )
        for name, schedules in _READ_BY.items():
            value = getattr(self, name)
            # Files with constant and min_lr_ratio have always been taken.
            is_set = value != 0.0 and self.lr_schedule != "constant" if name == "min_lr_ratio" else value is not None
            if is_set and self.lr_schedule not in schedules:
                raise ValueError(
                    f"optimizer.{name}={value!r} is for optimizer.lr_schedule {' and '.join(schedules)} alone, and it "
                    f"is {self.lr_schedule}: leave {name} out, or choose another schedule"
                )


LR_END = 1e-7
TIMESCALE = 10_000

_READ_BY = {
    "min_lr_ratio": ("linear", "cosine", "wsd"),
    "num_cycles": ("cosine_with_restarts",),
    "power": ("polynomial",),
    "lr_end": ("polynomial",),
    "num_decay_steps": ("wsd",),
    "decay_type": ("wsd",),
    "timescale": ("inverse_sqrt",),
}


def require(holds: bool, field: str, found: Any, needed: str) -> None:
    if not holds:
        raise ValueError(f"optimizer.{field}={found!r} must be {needed}.")


def _counts_steps(value: int | float) -> bool:
    return 0 <= value < 1 or (1 <= value < 2**31 and float(value).is_integer())


_PARAMETERS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "num_cycles": ("at least 1, and at most 1000", lambda value: 1 <= value <= 1000),
    "power": ("positive, and finite", lambda value: 0 < value < math.inf),
    "lr_end": ("at least 0, and finite", lambda value: 0 <= value < math.inf),
    "num_decay_steps": (
        "a fraction in (0, 1) or a whole number of steps below 2**31",
        lambda value: value > 0 and _counts_steps(value),
    ),
    "timescale": ("at least 1, and below 2**31", lambda value: 1 <= value < 2**31),
}


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _steps(length: int | float, num_train_steps: int) -> int:
    """A length in steps. Below 1 it is a fraction of the run, rounded up."""
    return math.ceil(num_train_steps * length) if length < 1 else int(length)


# From the schedule, the steps of its warmup and the steps after it: the rate, as a fraction of the peak, `step` steps
# (int) after the warmup. It may give anything for a negative step.
_Decay = Callable[[Any], Any]


def _between(shape: Callable[[Any], Any]) -> Callable[[Schedule, int, int], _Decay]:
    """The decay from 1 to min_lr_ratio that `shape` gives from 1 to 0, as a function of progress in [0, 1]."""

    def decay(settings: Schedule, warmup_steps: int, decay_steps: int) -> _Decay:
        def rate(step):
            progress = jnp.clip(step.astype(jnp.float32) / decay_steps, 0.0, 1.0)
            return settings.min_lr_ratio + (1.0 - settings.min_lr_ratio) * shape(progress)

        return rate

    return decay


def _cosine(progress):
    return 0.5 * (1.0 + jnp.cos(jnp.pi * progress))


def _with_restarts(settings: Schedule, warmup_steps: int, decay_steps: int) -> _Decay:
    cycles = _or(settings.num_cycles, 1)
    if cycles * decay_steps >= 2**31:
        raise ValueError(f"optimizer.num_cycles={cycles} times the {decay_steps} steps of the run exceed 2**31")

    def rate(step):
        # In whole numbers: a rounded progress just below a restart would make the rate 0 instead of its peak.
        progress = (step * cycles % decay_steps).astype(jnp.float32) / decay_steps
        return jnp.where(step < decay_steps, _cosine(progress), 0.0)

    return rate


def _polynomial(settings: Schedule, warmup_steps: int, decay_steps: int) -> _Decay:
    last = _or(settings.lr_end, LR_END) / settings.learning_rate

    def rate(step):
        left = 1.0 - jnp.clip(step.astype(jnp.float32) / decay_steps, 0.0, 1.0)
        return (1.0 - last) * left ** _or(settings.power, 1.0) + last

    return rate


def _warmup_stable_decay(settings: Schedule, warmup_steps: int, decay_steps: int) -> _Decay:
    assert settings.num_decay_steps is not None, "as _check_use makes sure"
    falling = _steps(settings.num_decay_steps, warmup_steps + decay_steps)
    if falling > decay_steps:
        raise ValueError(
            f"optimizer.num_decay_steps={settings.num_decay_steps} is {falling} steps, more than the {decay_steps} "
            f"that the run has after {warmup_steps} steps of optimizer.warmup"
        )
    fall = _between(_SHAPES[settings.decay_type or "cosine"])(settings, warmup_steps, falling)
    return lambda step: fall(jnp.maximum(step - (decay_steps - falling), 0))


def _inverse_sqrt(settings: Schedule, warmup_steps: int, decay_steps: int) -> _Decay:
    timescale = _or(settings.timescale, warmup_steps or TIMESCALE)
    return lambda step: 1.0 / jnp.sqrt((jnp.maximum(step, 0).astype(jnp.float32) + timescale) / timescale)


_SHAPES: dict[str, Callable[[Any], Any]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": _cosine,
    "1-sqrt": lambda progress: 1.0 - jnp.sqrt(progress),
}
_DECAYS: dict[str, Callable[[Schedule, int, int], _Decay]] = {
    "constant": _between(jnp.ones_like),
    "linear": _between(_SHAPES["linear"]),
    "cosine": _between(_cosine),
    "cosine_with_restarts": _with_restarts,
    "polynomial": _polynomial,
    "wsd": _warmup_stable_decay,
    "inverse_sqrt": _inverse_sqrt,
}


def is_decay(beta: float) -> bool:
    """Whether a number can be the decay of a running mean, in float32 too."""
    return 0 <= float(np.float32(beta)) < 1
