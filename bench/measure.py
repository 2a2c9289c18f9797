"""Seconds, processor seconds and memory of training steps. Standard library alone: the peers measure with it too."""

import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# glibc gives large arrays back to the system when they are freed and faults them in again at the next use, which took
# half of PyTorch's time. With these in its environment a process keeps its memory.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}


class Meter:
    """Times steps, of which the first `warmup` do not count, and samples resident memory while the others run."""

    def __init__(self, warmup: int):
        self.warmup = warmup
        self.seconds: list[float] = []  # of each step, the warm-up's too
        self.cpu_seconds: list[float] = []
        self._memory = _PeakMemory()
        self.begin()

    def begin(self) -> None:
        """The clock starts: call it right before the first step."""
        self._last = time.perf_counter(), time.process_time()

    def end_step(self, steps: int = 1) -> None:
        """One step is over, or several that ran without a pause and share the time."""
        now = time.perf_counter(), time.process_time()
        self.seconds += [(now[0] - self._last[0]) / steps] * steps
        self.cpu_seconds += [(now[1] - self._last[1]) / steps] * steps
        self._last = now
        if len(self.seconds) == self.warmup:
            self._memory.reset()

    def report(self, tokens: Sequence[int], pairs_per_step: int) -> dict[str, Any]:
        """`tokens`: the real ones of each timed step."""
        self._memory.stop()
        seconds, cpu = self.seconds[self.warmup :], self.cpu_seconds[self.warmup :]
        if len(seconds) != len(tokens):
            raise ValueError(f"{len(seconds)} steps were timed, {len(tokens)} were to be")
        return {
            "seconds_per_step": round(statistics.median(seconds), 4),
            "tokens_per_second": round(sum(tokens) / sum(seconds), 2),
            "pairs_per_second": round(pairs_per_step * len(seconds) / sum(seconds), 4),
            "cpu_seconds_per_step": round(statistics.median(cpu), 4),
            "tokens_per_cpu_second": round(sum(tokens) / sum(cpu), 2),
            "warmup_seconds": round(sum(self.seconds[: self.warmup]), 2),
            "peak_memory_mb": round(self._memory.peak / 2**20, 1),
            "tokens": sum(tokens),
            "steps": len(seconds),
            "load_average": round(os.getloadavg()[0], 2),  # of the machine; above its cores, wall time says little
        }


class _PeakMemory(threading.Thread):
    """Samples the resident memory of this process; bytes."""

    def __init__(self, every_seconds: float = 0.02):
        super().__init__(daemon=True, name="memory")
        self.every_seconds, self.peak, self._stopped = every_seconds, 0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self._stopped.wait(self.every_seconds):
            self.peak = max(self.peak, self._now())

    def reset(self) -> None:
        self.peak = self._now()

    def stop(self) -> None:
        self._stopped.set()
        self.join()

    @staticmethod
    def _now() -> int:
        if not os.path.exists("/proc/self/statm"):  # not Linux
            import resource

            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def host() -> str:
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


def emit(result: dict[str, Any], out: str | None) -> None:
    """Prints one line of JSON and writes it to the file `out`."""
    line = json.dumps(result)
    print(line, flush=True)
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(line + "\n", encoding="utf-8")
