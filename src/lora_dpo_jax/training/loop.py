"""The training loop. It handles steps, metrics and hooks, and does not depend on models, losses or data."""

import dataclasses
import logging
import math
import signal
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import jax
import jmp

from lora_dpo_jax.checkpoints.config import CheckpointerConfig
from lora_dpo_jax.places import is_url
from lora_dpo_jax.processes.exchange import from_first_process
from lora_dpo_jax.processes.signals import StoppedBySignalError
from lora_dpo_jax.processes.stalls import FINISHING, INPUT, SENDING, StallMonitor
from lora_dpo_jax.processes.start import DistributedConfig
from lora_dpo_jax.settings.choices import check_choices
from lora_dpo_jax.sharding import MeshConfig
from lora_dpo_jax.tracking import NoTrackerConfig, ProgressBar, Tracker, TrackerConfigs, check_trackers
from lora_dpo_jax.training.choice import BestConfig, EarlyStoppingConfig
from lora_dpo_jax.training.precision import precision_of

logger = logging.getLogger("lora_dpo_jax")

S = TypeVar("S")
# Metrics of a step that are logged as rates, if it has them.
COUNTS = ("pairs", "answers", "examples", "tokens", "flops")
MOST_STEPS = 2**31 - 1  # the optimizer counts them in int32
LONGEST_ID = 200  # bytes; a file name may have 255, and the writers of checkpoints append to the id
METRICS_LAG = 1  # later steps dispatched before a step's metrics are fetched: the device never waits for the host


@dataclass(frozen=True)
class TrainerConfig:
    """The length, the batches, the devices and the folders of a run. Names are those of Levanter if it has one."""

    num_train_steps: int | None = None  # updates
    num_train_epochs: float | None = None  # the length of the run in epochs instead of steps; 1 if neither is given
    train_batch_size: int = 32  # pairs per update
    # How to use the last pairs of an epoch if they do not fill a batch. short: they form a smaller batch, as in
    # transformers and TRL. fill: the next epoch fills the batch. null: short, or fill if num_train_steps is given.
    last_batch: Literal["short", "fill"] | None = None
    # How many pairs of the longest length a device computes at once; -1 means as many as have 16,384 tokens. A smaller
    # number uses less memory, because gradients are accumulated over micro-batches.
    per_device_parallelism: int = -1
    per_device_eval_parallelism: int = -1  # likewise in evaluation; -1 takes the number of training, or 8 if that is -1
    steps_per_eval: int | None = None  # null: evaluate before the first and after the last step only
    eval_at_start: bool = True  # evaluate before the first step
    best: BestConfig = field(default_factory=BestConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    log_every: int = 1  # steps
    token_metrics: bool = False  # also log entropy, mean_token_accuracy and logps per token
    seed: int = 0  # of adapters, order, split and dropout
    mp: str | None = None  # "f32", "bf16", "p=f32,c=bfloat16", ...; null computes in bfloat16 on accelerators
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    # Where metrics go besides metrics.jsonl: wandb, tensorboard, none, a mapping with settings, or a list of these.
    tracker: TrackerConfigs = field(default_factory=lambda: [NoTrackerConfig()])
    log_dir: str = "logs"  # the folder of all runs
    # The run's folder in log_dir; null generates a name. A run with the id of an earlier one resumes it.
    id: str | None = None
    checkpointer: CheckpointerConfig = field(default_factory=CheckpointerConfig)
    load_checkpoint: bool | None = None  # null: resume from a checkpoint if one exists. true: one must exist
    # A step whose loss or gradient is not finite makes no update. stop: the run ends there. skip: the run continues,
    # unless more than max_skips_in_a_row such steps are consecutive.
    non_finite: Literal["stop", "skip"] = "stop"
    max_skips_in_a_row: int = 10  # with skip: more consecutive steps without an update end the run
    # How long the run waits for its input, its devices or a hook before the log reports it; null never reports it.
    stall_seconds: float | None = 120.0
    # Where compiled programs are kept for the next run: a folder or a URL. null: JAX's own setting
    # ($JAX_COMPILATION_CACHE_DIR), or `programs` in the folder of the run's other caches.
    jax_compilation_cache_dir: str | None = None

    def __post_init__(self):
        positive = ("train_batch_size", "log_every", "steps_per_eval", "num_train_steps", "num_train_epochs")
        for name in (*positive, "max_skips_in_a_row", "stall_seconds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"trainer.{name}={value} must be positive")
        for name in ("num_train_steps", "num_train_epochs"):
            if (getattr(self, name) or 0) > MOST_STEPS:
                raise ValueError(f"trainer.{name}={getattr(self, name)} makes more steps than {MOST_STEPS:,}, the most")
        for name in ("per_device_parallelism", "per_device_eval_parallelism"):
            value = getattr(self, name)
            if value < 1 and value != -1:
                raise ValueError(f"trainer.{name}={value} must be positive, or -1 for all rows at once")
        check_choices(self, "trainer")
        if self.num_train_steps is not None and self.num_train_epochs is not None:
            raise ValueError("trainer.num_train_steps and trainer.num_train_epochs exclude each other; set one to null")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"trainer.seed={self.seed} must be in [0, 2**32)")
        if self.stall_seconds is not None and self.stall_seconds > threading.TIMEOUT_MAX:
            raise ValueError(f"trainer.stall_seconds={self.stall_seconds} is longer than a clock can wait; set null")
        if self.mp is not None:
            self.precision  # noqa: B018  (raises if it cannot be parsed)
        if self.id is not None:
            _check_id(self.id)
        if is_url(self.log_dir):
            raise ValueError(
                f"trainer.log_dir={self.log_dir!r} must be a folder of this machine; only checkpoints can go to a "
                "bucket: set trainer.checkpointer.base_path"
            )
        check_trackers(self.tracker)
        self._check_choice()

    def _check_choice(self) -> None:
        self.check_evaluations(self.num_train_steps)
        if self.best.metric is None and self.early_stopping.patience is not None:
            raise ValueError(
                f"trainer.early_stopping.patience={self.early_stopping.patience} counts evaluations without an "
                "improvement of trainer.best.metric, which is null. Set it, such as to eval/loss"
            )

    def check_evaluations(self, num_steps: int | None) -> None:
        """Raises ValueError if trainer.best has nothing to choose from in a run of so many steps; None: of any."""
        every = self.steps_per_eval
        if self.best.metric is not None and (every is None or (num_steps is not None and every >= num_steps)):
            of = "" if num_steps is None else f" of the run's {num_steps}"
            raise ValueError(
                f"trainer.best.metric={self.best.metric} chooses among evaluations, and trainer.steps_per_eval="
                f"{'null' if every is None else every} makes none between the first and the last step{of}. Set "
                "trainer.steps_per_eval to fewer steps"
            )

    @property
    def precision(self) -> jmp.Policy:
        """Dtypes of adapters (param) and of computation (compute)."""
        # Asks for the backend only if needed: it has no devices before the processes of a run are connected.
        return self.precision_on("" if self.mp else jax.default_backend())

    def precision_on(self, platform: str) -> jmp.Policy:
        """The same for devices of a platform (cpu, gpu, tpu), which this machine may lack."""
        return precision_of("trainer.mp", self.mp or ("f32" if platform == "cpu" else "p=f32,c=bfloat16"))

    @property
    def has_short_batches(self) -> bool:
        """Whether the last batch of an epoch holds the remaining pairs, however few."""
        return self.last_batch == "short" or (self.last_batch is None and self.num_train_steps is None)

    def steps(self, num_pairs: int) -> int:
        """The number of steps of the run, if an epoch has `num_pairs` pairs."""
        if self.num_train_steps is not None:
            return self.num_train_steps
        epochs = self.num_train_epochs or 1
        if self.has_short_batches:
            return math.ceil(epochs * math.ceil(num_pairs / self.train_batch_size))
        return math.ceil(epochs * num_pairs / self.train_batch_size)

    def run_id(self) -> str:
        """The id of the run, the same on all processes. All of them must call this."""
        return from_first_process(self.id or f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}")

    def run_dir(self, run_id: str) -> Path:
        return Path(self.log_dir).expanduser() / run_id


def _check_id(name: str) -> None:
    """Raises ValueError unless the id can be the name of one folder, in log_dir and perhaps in a bucket."""
    if name in (".", "..") or set(name) & set("/\\") or not name.isprintable() or name != name.strip():
        raise ValueError(f"trainer.id={name!r} must be the name of one folder in trainer.log_dir, without slashes")
    if len(name.encode()) > LONGEST_ID:
        raise ValueError(
            f"trainer.id={name[:20]!r}... has {len(name.encode())} bytes; it must have at most {LONGEST_ID}"
        )


@dataclass(frozen=True)
class StepInfo(Generic[S]):
    """The argument of a hook: the state after `step` steps."""

    step: int
    state: S
    is_last: bool = False  # whether the run ends here


@dataclass(frozen=True)
class Hook:
    """Calls `function` before the first step if `at_start`, after every `every` steps, and after the last if `at_end`.

    Also after each step for which `when` returns true; `when` is called at most once per step. A run that is asked to
    stop calls only the hooks with `at_stop`. In a run that ends early, the hooks that find `StepInfo.is_last` are those
    that had not been called after that step.
    """

    function: Callable[[StepInfo], None]
    name: str = "hook"  # for the log
    every: int | None = None
    at_start: bool = False
    at_end: bool = True
    at_stop: bool = False
    when: Callable[[int], bool] = lambda step: False

    def is_due(self, step: int, num_steps: int) -> bool:
        if step == 0:
            return self.at_start
        if step == num_steps and self.at_end:
            return True
        return (self.every is not None and step % self.every == 0) or self.when(step)


class NonFiniteLossError(RuntimeError):
    """Training stopped because a loss or gradient was not finite. The message names the step and its examples."""


def train(
    state: S,
    step_fn: Callable[[S, Any], tuple[S, Any]],
    batches: Iterable[Any],
    *,
    num_steps: int,
    tracker: Tracker,
    first_step: int = 0,
    hooks: Sequence[Hook] = (),
    log_every: int = 1,
    peak_flops: float | None = None,
    check: Callable[[int, Any, dict[str, float]], None] = lambda step, metrics, values: None,
    stop: Callable[[], signal.Signals | None] = lambda: None,
    is_complete: Callable[[], bool] = lambda: False,
    compile_step: Callable[[S, Any], Any] | None = None,
    began: float | None = None,
    stalls: StallMonitor | None = None,
) -> S:
    """Runs `step_fn` over `batches` and returns the last state. Raises ValueError if there are too few batches.

    A resumed run passes the state after `first_step` steps, and the `batches` of the steps that follow. It first calls
    the hooks that are due after `first_step` steps: the earlier run may have stopped before these hooks finished.

    The metrics of a step (their `values`: scalars by name) are fetched after the next step is dispatched.
    `check(step, metrics, values)` gets those of every step and may raise. `mfu` is logged if the devices' `peak_flops`
    (FLOP/s) are given. The time to the first step is measured from `began` (of time.perf_counter), or from this call.
    `stop` is called after each step but the last. If it returns a signal, the hooks with `at_stop` are called and
    StoppedBySignalError is raised. `is_complete` is called after each hook: where it returns true, the step is the last
    one, and the other hooks with `at_end` are called. `compile_step(state, batch)` is called with the first batch, in a
    thread of its own, while the hooks before the first step run. `stalls` records what the loop waits for.
    """
    began = time.perf_counter() if began is None else began
    pending: deque[tuple[int, Any]] = deque()
    with ProgressBar(num_steps, initial=first_step) as progress, stalls or StallMonitor(None) as stalls:
        log = _MetricsLog(tracker, progress, log_every, num_steps, peak_flops, check, stalls)
        is_last = first_step == num_steps
        due = [hook for hook in hooks if hook.is_due(first_step, num_steps)]
        steps = range(first_step, num_steps)
        with _compiling(compile_step, state, iter(batches), steps, stalls) as batches:
            ends_here = _run(hooks, due, StepInfo(first_step, state, is_last), is_complete, stalls)
        if ends_here:
            logger.info("the run is complete after %d of %d steps: nothing is left to train", first_step, num_steps)
            return state
        log.start_clock()
        for step in steps:
            with stalls.waiting_for(INPUT, step):
                batch = _next(batches, step, num_steps)
            with stalls.waiting_for(SENDING, step):
                state, metrics = step_fn(state, batch)
            pending.append((step, metrics))
            if step == first_step:
                log.take(*pending.popleft())
                seconds = time.perf_counter() - began
                logger.info("the first step was done %.1f s after the start", seconds)
                if step == 0:
                    tracker.log_summary({"seconds_to_first_step": seconds})
            if len(pending) > METRICS_LAG:
                log.take(*pending.popleft())
            done = step + 1
            stopped_by = stop() if done < num_steps else None
            due = [hook for hook in hooks if (hook.at_stop if stopped_by else hook.is_due(done, num_steps))]
            if due:
                while pending:
                    log.take(*pending.popleft())
                with log.paused_clock():
                    is_last = _run(hooks, due, StepInfo(done, state, done == num_steps), is_complete, stalls)
            stalls.end_step(step)
            if stopped_by:
                raise StoppedBySignalError(stopped_by, done, num_steps)
            if is_last:
                break
        while pending:
            log.take(*pending.popleft())
    return state


def _next(batches: Iterator[Any], step: int, num_steps: int) -> Any:
    try:
        return next(batches)
    except StopIteration:
        raise ValueError(f"the batches ended after {step} of {num_steps} steps") from None


@contextmanager
def _compiling(
    compile_step: Callable[[S, Any], Any] | None,
    state: S,
    batches: Iterator[Any],
    steps: range,
    stalls: StallMonitor,
) -> Iterator[Iterator[Any]]:
    """Compiles the first of the steps that are left while the block runs. Yields the batches of all of them."""
    if compile_step is None or not steps:
        yield batches
        return
    with stalls.waiting_for(INPUT, steps.start):
        first = _next(batches, steps.start, steps.stop)
    with ThreadPoolExecutor(1, "compilation") as pool:
        compilation = pool.submit(compile_step, state, first)
        yield chain([first], batches)
        with stalls.waiting_for(SENDING, steps.start, is_step=False):
            compilation.result()


def _run(
    hooks: Sequence[Hook], due: Sequence[Hook], info: StepInfo, is_complete: Callable[[], bool], stalls: StallMonitor
) -> bool:
    """Calls the hooks that are `due`. Returns whether the run ends here, where all with `at_end` have been called."""

    def call(hook: Hook, info: StepInfo) -> None:
        with stalls.waiting_for(f"the hook {hook.name}", info.step, is_step=False):
            hook.function(info)

    called = []
    for hook in due:
        call(hook, info)
        called.append(hook)
        if not info.is_last and is_complete():
            break
    if info.is_last or not is_complete():
        return info.is_last
    for hook in hooks:
        if hook.at_end and not any(hook is other for other in called):
            call(hook, dataclasses.replace(info, is_last=True))
    return True


class _MetricsLog:
    """Fetches metrics, adds rates, and passes them to tracker and progress bar."""

    def __init__(
        self,
        tracker: Tracker,
        progress: ProgressBar,
        log_every: int,
        num_steps: int,
        peak_flops: float | None,
        check: Callable,
        stalls: StallMonitor,
    ):
        self.tracker, self.progress, self.check, self.stalls = tracker, progress, check, stalls
        self.log_every, self.num_steps, self.peak_flops = log_every, num_steps, peak_flops
        self.counts: dict[str, float] = {}
        self.since = time.perf_counter()

    def start_clock(self) -> None:
        self.since = time.perf_counter()

    def paused_clock(self):
        return _PausedClock(self)

    def take(self, step: int, metrics: Any) -> None:
        with self.stalls.waiting_for(FINISHING, step):
            values = {name: float(value) for name, value in jax.device_get(metrics.values).items()}
        self.check(step, metrics, values)
        for name in (name for name in COUNTS if name in values):
            self.counts[name] = self.counts.get(name, 0.0) + values.pop(name)
        if step % self.log_every and step + 1 != self.num_steps:
            self.progress.update(step)
            return
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        rates = {name: count / seconds for name, count in self.counts.items()}
        flops = rates.pop("flops", 0.0)
        values |= {f"{name}_per_second": rate for name, rate in rates.items()}
        if self.peak_flops is not None:
            values["mfu"] = flops / self.peak_flops
        self.counts = {}
        logged = {f"train/{name}": value for name, value in values.items()}
        self.tracker.log(logged, step=step)
        self.progress.update(step, logged)


class _PausedClock:
    """A context whose time does not count in the rates."""

    def __init__(self, log: _MetricsLog):
        self.log = log

    def __enter__(self) -> None:
        self.entered = time.perf_counter()

    def __exit__(self, *_) -> None:
        self.log.since += time.perf_counter() - self.entered
