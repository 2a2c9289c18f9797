"""Stops a run on a signal, after the current step, so that the run can save its state and resume later."""

import os
import signal
import threading
import time
from typing import Any

import jax
from jax.experimental import multihost_utils

RESTART_STATUS = 75  # the exit status after SIGTERM: EX_TEMPFAIL of sysexits.h, "try again later"
# A signal to a group reaches each of its processes, and a launcher among them passes its own on. Both count as one.
SAME_SIGNAL_SECONDS = 0.5


class StoppedBySignalError(RuntimeError):
    """A signal ended the run before its last step; the state after `step` updates was handed to the hooks."""

    def __init__(self, signum: signal.Signals, step: int, num_steps: int):
        super().__init__(f"stopped by {signum.name} after {step} of {num_steps} steps")
        self.signum, self.step = signum, step
        self.resume_with: list[str] = []  # settings that resume the run, after those that it was started with

    @property
    def exit_code(self) -> int:
        """RESTART_STATUS after SIGTERM; after Ctrl-C, the status that shells give."""
        return RESTART_STATUS if self.signum == signal.SIGTERM else 128 + self.signum


class StopSignals:
    """While the block runs, a first SIGTERM or SIGINT is only recorded for the training loop; a second one acts.

    If `jax.distributed` runs, it notices SIGTERM itself, and all processes stop after the same step. In other threads
    than the main one, Python allows no handlers, so nothing is caught.
    """

    def __init__(self):
        self._received: signal.Signals | None = None
        self._former: dict[signal.Signals, Any] = {}
        self._times_asked = 0

    def __call__(self) -> signal.Signals | None:
        """The signal that asks the run to stop here, or None. To be called once per step, on all processes."""
        # A count of calls, not the number of the step: for a signal before the first call, JAX stops at number 1.
        self._times_asked += 1
        if jax.distributed.is_initialized() and multihost_utils.reached_preemption_sync_point(self._times_asked):
            return signal.SIGTERM
        return self._received

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread() and not jax.distributed.is_initialized():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._former[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def _note(self, signum: int, frame: Any) -> None:
        self._received = signal.Signals(signum)
        for caught in self._former:
            signal.signal(caught, lambda *_: None)
        text = f"{self._received.name}: the current step ends, then the state is saved; a second one stops at once\n"
        os.write(2, text.encode())  # a handler may run in the middle of a write to sys.stderr, which cannot be nested
        time.sleep(SAME_SIGNAL_SECONDS)
        self._restore()  # the next one acts at once

    def _restore(self) -> None:
        while self._former:
            signum, handler = self._former.popitem()
            # None: a handler that was not set from Python, and cannot be set from Python.
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
