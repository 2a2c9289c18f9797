"""A thread that watches the waits of a run, and logs a warning when one takes far longer than usual."""

import logging
import statistics
import sys
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import jax

logger = logging.getLogger("lora_dpo_jax")

INPUT = "the input"
SENDING = "the step to be compiled and sent to the devices"
FINISHING = "the devices to finish the step"
HINTS = {
    INPUT: "The next batch is not ready: look at the storage of the pairs, and at other work of this machine.",
    SENDING: "The first steps compile. Later on, the devices have not finished the steps before.",
    FINISHING: "They compute, or wait for another process that has not reached the same exchange: look at its log.",
}
UNUSUAL = 5.0  # times the median
SHORTEST_DELAY = 1.0  # seconds beyond the median; less is not reported
KNOWN_STEPS = 8  # steps before any step is called slow
REMEMBERED = 64  # steps that the medians cover
FRAMES = 6  # shown of a stack


@dataclass
class _Wait:
    what: str
    step: int
    since: float
    limit: float  # seconds after which it is logged, and logged again
    was_logged: bool = False


class StallMonitor:
    """Logs waits that are longer than `seconds` and unusual for their kind, while they last, and slow steps.

    A context manager; the thread runs inside it. `helpers` names other threads whose stacks show what the run waits
    for. If `seconds` is None, nothing is watched.
    """

    def __init__(self, seconds: float | None, *, helpers: Sequence[str] = (), shortest_delay: float = SHORTEST_DELAY):
        self.seconds, self.helpers, self.shortest_delay = seconds, helpers, shortest_delay
        self._waits: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self._steps: deque[float] = deque(maxlen=REMEMBERED)
        self._spent: dict[str, float] = {}  # in the current step, by kind of wait
        self._at: _Wait | None = None
        self._run_thread = threading.current_thread()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def waiting_for(self, what: str, step: int, *, is_step: bool = True) -> Iterator[None]:
        """Watches a wait in `step`; `what` is its kind. If not `is_step`, it does not count as time of the step."""
        before = self._waits[what]
        usual = statistics.median(before) if before else 0.0
        wait = _Wait(what, step, time.monotonic(), max(self.seconds or 0.0, UNUSUAL * usual))
        self._at = wait
        try:
            yield
        finally:
            self._at = None
            waited = time.monotonic() - wait.since
            before.append(waited)
            if is_step:
                self._spent[what] = self._spent.get(what, 0.0) + waited
            if wait.was_logged:
                logger.warning("%sstep %d: waited %.1f s for %s; it is over", _here(), step, waited, what)

    def end_step(self, step: int) -> None:
        """Compares the step's waits with those of the steps before."""
        spent, self._spent = self._spent, {}
        seconds = sum(spent.values())
        usual = statistics.median(self._steps) if len(self._steps) >= KNOWN_STEPS else seconds
        self._steps.append(seconds)
        if self.seconds is not None and seconds > max(UNUSUAL * usual, usual + self.shortest_delay):
            parts = ", ".join(f"{part:.1f} s for {what}" for what, part in spent.items())
            logger.warning(
                "%sstep %d took %.1f s, and %.1f s is the median; it waited %s", _here(), step, seconds, usual, parts
            )

    def __enter__(self) -> "StallMonitor":
        self._run_thread = threading.current_thread()
        if self.seconds is not None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._look, args=(self.seconds,), daemon=True, name="stall monitor")
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _look(self, seconds: float) -> None:
        while not self._stop.wait(min(seconds / 4, 5.0)):
            wait = self._at
            if wait is not None and (waited := time.monotonic() - wait.since) >= wait.limit:
                # Logged again after twice this time.
                wait.limit, wait.was_logged = 2 * waited, True
                self._report(wait, waited)

    def _report(self, wait: _Wait, waited: float) -> None:
        before = list(self._waits[wait.what])
        usual = f"{statistics.median(before):.1f} s is the median" if before else "it is the first of its kind"
        logger.warning(
            "%sstep %d: waiting for %s, for %.0f s so far; %s. %s\n%s",
            _here(),
            wait.step,
            wait.what,
            waited,
            usual,
            HINTS.get(wait.what, ""),
            "\n".join(self._stacks()),
        )

    def _stacks(self) -> list[str]:
        """The stacks of the run and of its helpers, innermost call last."""
        frames = sys._current_frames()
        lines = []
        for thread in threading.enumerate():
            frame = frames.get(thread.ident or 0)
            if frame is not None and (thread is self._run_thread or thread.name in self.helpers):
                lines.append(f"  thread {thread.name}:")
                calls = traceback.extract_stack(frame)[-FRAMES:]
                lines += [f"    {call.filename}:{call.lineno} in {call.name}: {call.line}" for call in calls]
        return lines


def _here() -> str:
    return f"process {jax.process_index()}, " if jax.process_count() > 1 else ""
