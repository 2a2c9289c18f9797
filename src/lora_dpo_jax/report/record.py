"""report.json in the run's folder: what its report shows beside the metrics and the settings.

It is written while the run goes, so that a resumed run still has the completions and the scores of before training.
"""

import dataclasses
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import draccus
import numpy as np

from lora_dpo_jax.files import replace_file
from lora_dpo_jax.json_objects import JsonObject, read_json_object

RECORD = "report.json"
FORMAT = 1

Numbers = list[float | None]  # None: not finite

T = TypeVar("T", bound="Completions | Scored")


@dataclass(frozen=True)
class Facts:
    """What neither the metrics nor the settings say of a run."""

    num_steps: int
    noun: str  # pairs, answers or examples
    training: int  # how many
    held_out: int
    rows: str  # of a micro-batch, such as 16 x 128 tokens
    devices: str  # such as 8 x NVIDIA H100
    processes: int
    versions: dict[str, str]  # by package
    loss_warning: str | None = None


@dataclass(frozen=True)
class Sitting:
    """A stretch of the run by one process: a run that was resumed has several."""

    first_step: int
    last_step: int
    seconds: float  # from the start of the command, with reading, compiling and evaluating
    began: str  # such as 2026-11-28 06:35


@dataclass(frozen=True)
class Completions:
    """The completions of the sample prompts after `step` steps."""

    step: int
    texts: list[str]


@dataclass(frozen=True)
class Scored:
    """The held-out comparisons after `step` steps, in the table's order."""

    step: int
    margins: Numbers  # of rewards, as the loss defines them
    differences: Numbers  # log p(chosen) - log p(rejected) of the policy, in nats


@dataclass(frozen=True)
class HeldOut:
    """The held-out comparisons. All lists have one number for each."""

    chosen_tokens: list[int]  # that are scored
    rejected_tokens: list[int]
    prompts: list[int]  # the same number for the same prompt
    shares: Numbers  # of its example: 1 of a pair
    reference: Numbers  # log p(chosen) - log p(rejected) of the reference, in nats; empty if the loss has none
    before: Scored | None = None  # before the first step
    after: Scored | None = None  # at the last evaluation, or at the one whose adapters are exported


@dataclass(frozen=True)
class ShownResponse:
    """A response in pieces of text, with log(policy / reference) of each in nats; 0 of those that are not scored."""

    pieces: list[str]
    log_ratios: Numbers
    log_ratio: float | None  # of the whole response
    left_out: int = 0  # pieces after those


@dataclass(frozen=True)
class ShownPair:
    """A held-out comparison with its tokens."""

    origin: str  # its file and row
    prompt: str
    margin: float | None  # of rewards
    chosen: ShownResponse
    rejected: ShownResponse


@dataclass(frozen=True)
class Record:
    """Everything in the file."""

    facts: Facts | None = None
    sittings: list[Sitting] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)  # that are completed
    completed_before: Completions | None = None
    completed_after: Completions | None = None
    held_out: HeldOut | None = None
    most_right: list[ShownPair] = field(default_factory=list)
    most_wrong: list[ShownPair] = field(default_factory=list)
    chosen_step: int | None = None  # of the exported adapters, if trainer.best chose them
    notes: dict[str, str] = field(default_factory=dict)  # what was chosen and why, by title

    def until(self, step: int) -> "Record":
        """What a run that resumes from `step` still has."""
        held_out = self.held_out
        if held_out is not None:
            before, after = _until(held_out.before, step), _until(held_out.after, step)
            held_out = dataclasses.replace(held_out, before=before, after=after)
        sittings = [
            dataclasses.replace(sitting, last_step=min(sitting.last_step, step))
            for sitting in self.sittings
            if step and sitting.first_step <= step
        ]
        return dataclasses.replace(
            self,
            sittings=sittings,
            completed_before=_until(self.completed_before, step),
            completed_after=_until(self.completed_after, step),
            held_out=held_out,
            most_right=[],
            most_wrong=[],
            chosen_step=None,
            notes={},
        )


def _until(moment: T | None, step: int) -> T | None:
    return moment if moment is not None and moment.step < step else None


def write_record(run_dir: Path, record: Record) -> None:
    encode: Any = draccus.encode
    text = json.dumps({"format": FORMAT, **encode(record)}, ensure_ascii=False, allow_nan=False)
    replace_file(run_dir / RECORD, (text + "\n").encode("utf-8", "backslashreplace"))


def read_record(run_dir: Path) -> Record | None:
    """The record of a run; None if it has none. Raises ValueError or OSError with the file's name."""
    path = run_dir / RECORD
    if not path.exists():
        return None
    found: JsonObject = read_json_object(path)
    if found.whole("format", least=0) != FORMAT:
        raise found.error("format", f"is of another version of this library; needed: {FORMAT}")
    try:
        return draccus.decode(Record, {name: value for name, value in found.values.items() if name != "format"})
    except Exception as error:  # draccus has several kinds
        raise ValueError(f"{path} is no record of a run: {error}") from error


def numbers_of(values: Iterable[Any] | np.ndarray) -> Numbers:
    """float32 values as JSON has them: the shortest decimals that give them back, and None for what is not finite."""
    return [float(str(x)) if np.isfinite(x) else None for x in np.asarray(values, np.float32).ravel()]


def array_of(numbers: Sequence[float | None]) -> np.ndarray:
    """float64, with NaN for None."""
    return np.array([np.nan if x is None else x for x in numbers], np.float64)


def now_in_words() -> str:
    return time.strftime("%Y-%m-%d %H:%M")
