"""A reference that follows the policy at a distance."""

from dataclasses import dataclass
from typing import TypeVar

import jax

T = TypeVar("T")


@dataclass(frozen=True)
class ReferenceSync:
    """Every `sync_steps` steps, the reference becomes a mixture of itself and the policy.

    Eq. 4 of https://arxiv.org/abs/2404.09656 (TR-DPO). The factors of the adapters are mixed, one by one. With
    `mixup_alpha` 1 the reference becomes a copy of the policy.
    """

    mixup_alpha: float = 0.6  # the policy's share
    sync_steps: int | None = None  # TRL's default is 512; null: never, the reference stays what it is

    def __post_init__(self):
        if not 0 < self.mixup_alpha <= 1:
            raise ValueError(f"reference_sync.mixup_alpha={self.mixup_alpha} must be above 0, and at most 1")
        if self.sync_steps is None and self.mixup_alpha != type(self).mixup_alpha:
            raise ValueError(
                f"reference_sync.mixup_alpha={self.mixup_alpha} does nothing without reference_sync.sync_steps, the "
                "number of steps from one mixture to the next: set it too, such as to 512"
            )
        if self.sync_steps is not None and self.sync_steps < 1:
            raise ValueError(f"reference_sync.sync_steps={self.sync_steps} must be at least 1")

    @property
    def moves(self) -> bool:
        return self.sync_steps is not None

    def __call__(self, step: jax.Array, policy: T, reference: T) -> T:
        """The reference's adapters after `step` steps (int32 scalar), from the policy's and its own."""
        assert self.sync_steps is not None, "as TrainStep makes sure"
        share = self.mixup_alpha

        def mixed(reference: T) -> T:
            return jax.tree.map(lambda mine, its: share * mine + (1.0 - share) * its, policy, reference)

        return jax.lax.cond(step % self.sync_steps == 0, mixed, lambda reference: reference, reference)
