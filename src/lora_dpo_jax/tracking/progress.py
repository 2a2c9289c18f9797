"""Shows the progress of a run, on the terminal or in the log."""

import logging
import sys
import time
from collections.abc import Mapping
from typing import TextIO

import jax
from tqdm import tqdm

from lora_dpo_jax.tracking.interface import as_number

logger = logging.getLogger(__name__)


class ProgressBar:
    """The progress of a run: a bar if stderr is a terminal, else a log line at level INFO for each logged step."""

    def __init__(self, total_steps: int, *, initial: int = 0, stream: TextIO | None = None):
        """`initial` is the number of steps already done, of a resumed run."""
        stream = sys.stderr if stream is None else stream
        self._total = total_steps
        self._shown = jax.process_index() == 0
        self._first: tuple[int, float] | None = None  # the first step seen, and when it had ended
        self._bar = None
        if self._shown and stream is not None and stream.isatty():  # pythonw has no stderr
            self._bar = tqdm(total=total_steps, initial=initial, file=stream, unit="step", dynamic_ncols=True)

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Reports that `step`, counted from 0, is done. `metrics`, if available, have the names that are logged."""
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        if not self._shown:
            return
        if self._bar is not None:
            if metrics is not None:
                self._bar.set_postfix_str("  ".join(_headline(metrics)), refresh=False)
            self._bar.update(step + 1 - self._bar.n)
        elif metrics is not None:
            parts = [f"step {step}/{self._total}", *_headline(metrics), *self._time_left(step, now)]
            logger.info("%s", "  ".join(parts))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, exception_type, exception, traceback) -> None:
        self.close()

    def _time_left(self, step: int, now: float) -> list[str]:
        # Measured from the end of the first step, which compiles.
        first_step, first_end = self._first or (step, now)
        if step == first_step:
            return []
        seconds = round((now - first_end) / (step - first_step) * (self._total - step - 1))
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        return [f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left"]


_HEADLINE = {
    "train/loss": "loss {:.4f}",
    "train/dpo_accuracy": "accuracy {:.2f}",
    "train/pairs_per_second": "{:.1f} pairs/s",
    "train/answers_per_second": "{:.1f} answers/s",
    "train/examples_per_second": "{:.1f} examples/s",
}


def _headline(metrics: Mapping[str, float]) -> list[str]:
    return [text.format(as_number(name, metrics[name])) for name, text in _HEADLINE.items() if name in metrics]
