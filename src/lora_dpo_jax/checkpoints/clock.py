"""Decides when a checkpoint is due by the clock, for all processes after the same step."""

import time

import jax
import numpy as np
from jax.experimental import multihost_utils

LOOKS = 20  # how often in an interval several processes ask the first one


class SaveClock:
    """Whether `seconds` have passed since the last save, by the clock of the first process."""

    def __init__(self, seconds: float | None):
        self.seconds = seconds
        self.restart()

    def restart(self) -> None:
        self.since = time.monotonic()
        self.looked_at: tuple[float, int] | None = None  # the time and step of the last look
        self.next_look = 0

    def is_due(self, step: int) -> bool:
        if self.seconds is None or step < self.next_look:
            return False
        now = time.monotonic()
        is_due, ahead = now - self.since >= self.seconds, 1
        if jax.process_count() > 1:
            # Asking the first process is a collective that waits for the devices. So it is done a few times in an
            # interval, after a number of steps that the first process decides too.
            if self.looked_at is not None:
                then, at = self.looked_at
                ahead = max(1, int(self.seconds / LOOKS / max((now - then) / (step - at), 1e-6)))
            is_due, ahead = multihost_utils.broadcast_one_to_all(np.array([is_due, ahead]))
        self.looked_at, self.next_look = (now, step), step + int(ahead)
        return bool(is_due)
