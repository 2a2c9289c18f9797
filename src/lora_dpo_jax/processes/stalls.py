"""A thread that sees what a run waits for, and says so in the log when it waits far longer than it should."""

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
    INPUT: "The next batch is not ready: look at the storage of the pairs, and at what else this machine does.",
    SENDING: "The first steps compile. Later on, the devices have not come to the steps before.",
    FINISHING: "They compute, or wait for another process that has not come to the same exchange: look at its log.",
}
UNUSUAL = 5.0  # times the median
SHORTEST_DELAY = 1.0  # seconds beyond the median, below which a slow step is no news
KNOWN_STEPS = 8  # before which no step is called slow
REMEMBERED = 64  # steps, of which the medians are
FRAMES = 6  # of a stack that is shown


@dataclass
class _Wait:
    what: str
    step: int
    since: float
    limit: float  # seconds after which it is logged, and logged again
    was_told: bool = False


class StallMonitor:
    """Tells of waits longer than `seconds` and unusual for their kind, while they last, and of steps that were slow.

    A context manager: the thread lives inside of it. Other threads whose stacks say what the run waits for are named by
    `helpers`. With `seconds` of None nothing is watched.
    """

    def __init__(self, seconds: float | None, *, helpers: Sequence[str] = (), shortest_delay: float = SHORTEST_DELAY):
        self.seconds, self.helpers, self.shortest_delay = seconds, helpers, shortest_delay
        self._waits: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self._steps: deque[float] = deque(maxlen=REMEMBERED)
        self._spent: dict[str, float] = {}  # in the step at hand, by what was waited for
        self._at: _Wait | None = None
        self._run_thread = threading.current_thread()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def waiting_for(self, what: str, step: int, *, is_step: bool = True) -> Iterator[None]:
        """Around a wait of step `step`, of one kind by `what`. If not `is_step`, the step is no slower for it."""
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
            if wait.was_told:
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
                # Again after as long as it has lasted.
                wait.limit, wait.was_told = 2 * waited, True
                self._tell(wait, waited)

    def _tell(self, wait: _Wait, waited: float) -> None:
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
        """Where the run is, and its helpers are, innermost last."""
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
