"""The loop: when hooks run, which metrics are logged and when they are fetched, and what a run may be told."""

import itertools
import signal
import threading
from types import SimpleNamespace

import draccus
import jax.numpy as jnp
import pytest

from lora_dpo_jax.processes.signals import StoppedBySignalError
from lora_dpo_jax.tracking import Tracker
from lora_dpo_jax.training import loop as trainer_module
from lora_dpo_jax.training.loop import Hook, StepInfo, TrainerConfig, train


class Recorder(Tracker):
    """Remembers what is logged, and when among all that happens."""

    def __init__(self, events: list | None = None):
        self.logged: list[tuple[int, dict]] = []
        self.summary: dict = {}
        self.events = events if events is not None else []

    def log(self, metrics, *, step):
        self.logged.append((step, dict(metrics)))
        self.events.append(("log", step))

    def log_summary(self, metrics):
        self.summary |= metrics

    def log_config(self, config):
        raise AssertionError("the loop knows no settings")

    def finish(self, *, exit_code=0):
        raise AssertionError("whoever started the tracker finishes it")


def counting_step(events: list | None = None, **values):
    """A step whose state counts updates and whose metrics tell which step they are of."""

    def step(state, batch):
        if events is not None:
            events.append(("step", state))
        metrics = {name: value(state) for name, value in values.items()}
        return state + 1, SimpleNamespace(values={"loss": jnp.asarray(10.0 * state), "batch": batch, **metrics})

    return step


def run(num_steps: int, step=None, batches=None, **kwargs):
    kwargs.setdefault("tracker", Recorder())
    batches = range(100, 100 + num_steps) if batches is None else batches
    return train(0, step or counting_step(), batches, num_steps=num_steps, **kwargs), kwargs["tracker"]


def signalled(step: int):
    """Asks to stop from the end of the step-th step on."""
    asked = itertools.count(1)
    return lambda: signal.SIGTERM if next(asked) >= step else None


@pytest.mark.parametrize(
    "hook, due",
    [
        (dict(), [7]),
        (dict(at_end=False), []),
        (dict(at_start=True), [0, 7]),
        (dict(every=3), [3, 6, 7]),
        (dict(every=3, at_start=True), [0, 3, 6, 7]),
        (dict(every=3, at_end=False), [3, 6]),
        (dict(every=7), [7]),
        (dict(every=7, at_end=False), [7]),
        (dict(every=1), [1, 2, 3, 4, 5, 6, 7]),
        (dict(every=100), [7]),
    ],
    ids=str,
)
def test_hooks_run_when_they_are_due(hook, due):
    seen: list[StepInfo] = []
    state, _ = run(7, hooks=[Hook(seen.append, **hook)])
    assert state == 7
    assert [info.step for info in seen] == due
    assert all(info.state == info.step for info in seen), "a hook sees the state after as many updates"


def test_hooks_run_in_their_order():
    seen = []
    run(2, hooks=[Hook(lambda info, name=name: seen.append((info.step, name)), every=1) for name in "ab"])
    assert seen == [(1, "a"), (1, "b"), (2, "a"), (2, "b")]


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_the_metrics_of_every_step_are_logged_once_and_in_order(num_steps):
    _, tracker = run(num_steps)
    assert [step for step, _ in tracker.logged] == list(range(num_steps))
    for step, metrics in tracker.logged:
        assert metrics["train/loss"] == 10.0 * step
        assert metrics["train/batch"] == 100 + step, "each step gets the next batch"


@pytest.mark.parametrize(
    "log_every, logged", [(1, [0, 1, 2, 3, 4, 5, 6]), (3, [0, 3, 6]), (4, [0, 4, 6]), (50, [0, 6])]
)
def test_log_every_leaves_out_all_but_every_so_many_steps_and_the_last(log_every, logged):
    checked = []
    _, tracker = run(7, log_every=log_every, check=lambda step, metrics, values: checked.append((step, values["loss"])))
    assert [step for step, _ in tracker.logged] == logged
    assert all(metrics["train/loss"] == 10.0 * step for step, metrics in tracker.logged)
    assert checked == [(step, 10.0 * step) for step in range(7)], "every step is checked, logged or not"


def test_metrics_are_fetched_after_the_next_step_is_on_its_way():
    events: list = []
    run(3, counting_step(events), tracker=Recorder(events))
    # But for the first step's: it is told how long that was in coming.
    assert events == [("step", 0), ("log", 0), ("step", 1), ("step", 2), ("log", 1), ("log", 2)]


def test_metrics_before_a_hook_are_logged_before_it_runs():
    events: list = []
    hook = Hook(lambda info: events.append(("hook", info.step)), every=2, at_start=True)
    run(3, counting_step(events), tracker=Recorder(events), hooks=[hook])
    assert events == [
        ("hook", 0),
        *(("step", 0), ("log", 0), ("step", 1), ("log", 1), ("hook", 2)),
        *(("step", 2), ("log", 2), ("hook", 3)),
    ]


def test_a_check_may_stop_the_run():
    seen, updates = [], []

    def check(step, metrics, values):
        seen.append((step, metrics.values["batch"]))
        if values["loss"] >= 20:
            raise FloatingPointError(f"step {step}")

    tracker = Recorder()
    with pytest.raises(FloatingPointError, match="step 2"):
        run(10, counting_step(updates), tracker=tracker, check=check)
    assert seen == [(0, 100), (1, 101), (2, 102)]
    assert [step for step, _ in tracker.logged] == [0, 1]
    assert len(updates) == 4, "one step was on its way"


def test_a_run_that_goes_on_takes_the_steps_that_are_left():
    seen: list[StepInfo] = []
    tracker = Recorder()
    hooks = [Hook(seen.append, every=2, at_start=True)]
    state = train(4, counting_step(), iter([104, 105, 106]), num_steps=7, first_step=4, tracker=tracker, hooks=hooks)
    assert state == 7
    assert [(step, m["train/loss"], m["train/batch"]) for step, m in tracker.logged] == [
        (4, 40.0, 104),
        (5, 50.0, 105),
        (6, 60.0, 106),
    ]
    assert [info.step for info in seen] == [4, 6, 7], "what was due after the steps so far may not have come to an end"
    assert tracker.summary == {}, "how long the first step took is the affair of the run that made it"


def test_a_run_that_is_done_only_calls_the_hooks_of_its_end():
    seen: list[StepInfo] = []
    hooks = [Hook(seen.append, every=5), Hook(seen.append, at_end=False)]
    state = train(7, counting_step(), iter([]), num_steps=7, first_step=7, tracker=Recorder(), hooks=hooks)
    assert state == 7
    assert [info.step for info in seen] == [7]


def test_a_hook_is_asked_once_a_step_when_it_is_due():
    asked, seen = [], []

    def when(step: int) -> bool:
        asked.append(step)
        return step in (2, 5)

    run(6, hooks=[Hook(lambda info: seen.append(info.step), every=3, when=when)])
    assert seen == [2, 3, 5, 6]
    assert asked == [1, 2, 4, 5]


def test_a_run_that_is_asked_to_stop_calls_the_hooks_meant_for_it_and_ends():
    events: list = []
    hooks = [
        Hook(lambda info: events.append(("save", info.step, info.state)), at_stop=True),
        Hook(lambda info: events.append(("evaluate", info.step, info.state)), every=1),
    ]
    tracker = Recorder()
    with pytest.raises(StoppedBySignalError, match="stopped by SIGTERM after 3 of 9 steps"):
        run(9, tracker=tracker, hooks=hooks, stop=signalled(3))
    assert events == [("evaluate", 1, 1), ("evaluate", 2, 2), ("save", 3, 3)]
    assert [step for step, _ in tracker.logged] == [0, 1, 2], "all that was done is logged before it is saved"


def test_a_run_at_its_last_step_is_not_stopped():
    assert run(3, stop=signalled(3))[0] == 3


def test_a_run_that_is_complete_early_ends_with_the_hooks_of_its_end():
    """Each is called once after that step, in their order; those after the decision know that it is the last."""
    seen: list = []
    asked = SimpleNamespace(complete=False)

    def record(name):
        return lambda info: seen.append((name, info.step, info.state, info.is_last))

    def decide(info):
        record("decide")(info)
        asked.complete = info.step == 4

    hooks = [
        Hook(record("save"), every=3, at_stop=True),
        Hook(decide, every=2),
        Hook(record("sample"), at_start=True),
        Hook(record("export"), every=4),
        Hook(record("start"), at_start=True, at_end=False),
    ]
    batches = iter(range(100))
    state, tracker = run(9, batches=batches, hooks=hooks, is_complete=lambda: asked.complete)
    assert state == 4 and next(batches) == 4
    assert [step for step, _ in tracker.logged] == [0, 1, 2, 3]
    at_last = [("decide", 4, 4, False), ("save", 4, 4, True), ("sample", 4, 4, True), ("export", 4, 4, True)]
    before = [("sample", 0, 0, False), ("start", 0, 0, False), ("decide", 2, 2, False), ("save", 3, 3, False)]
    assert seen == before + at_last

    seen.clear()  # started again, it knows that it is complete
    assert run(9, batches=[], first_step=4, hooks=hooks, is_complete=lambda: True)[0] == 0, "the state that it is given"
    assert [(name, is_last) for name, *_, is_last in seen] == [
        *(("decide", False), ("save", True), ("sample", True), ("export", True))
    ]


def test_a_run_that_is_complete_at_its_last_step_ends_as_any_other():
    seen: list[StepInfo] = []
    hooks = [Hook(seen.append, every=1), Hook(seen.append)]
    assert run(2, hooks=hooks, is_complete=lambda: len(seen) >= 2)[0] == 2
    assert [(info.step, info.is_last) for info in seen] == [(1, False), (2, True), (2, True)]


def test_no_batch_is_taken_that_is_not_trained_on():
    batches = iter(range(100))
    run(3, batches=batches)
    assert next(batches) == 3


def test_batches_that_end_too_early_are_an_error():
    with pytest.raises(ValueError, match="batches ended after 2 of 5 steps"):
        run(5, batches=[1, 2])


def test_the_step_is_compiled_beside_the_hooks_before_it():
    """The hook waits for the other thread: were one called after the other, neither would end."""
    compiling, events = threading.Event(), []

    def compile_step(state, batch):
        assert threading.current_thread() is not threading.main_thread()
        events.append(("compile", state, batch))
        compiling.set()

    def hook(info: StepInfo):
        assert compiling.wait(timeout=60)

    run(2, counting_step(events), hooks=[Hook(hook, at_start=True, at_end=False)], compile_step=compile_step)
    assert [event for event in events if event[0] != "log"] == [("compile", 0, 100), ("step", 0), ("step", 1)]


def test_no_step_is_taken_if_it_cannot_be_compiled():
    events: list = []

    def compile_step(state, batch):
        raise MemoryError("no room for the program")

    with pytest.raises(MemoryError, match="no room for the program"):
        run(2, counting_step(events), compile_step=compile_step)
    assert not events


def test_nothing_is_compiled_where_no_step_is_left():
    def compile_step(state, batch):
        raise AssertionError("no step is left")

    train(7, counting_step(), [], num_steps=7, first_step=7, tracker=Recorder(), compile_step=compile_step)


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(trainer_module.time, "perf_counter", lambda: clock.now)
    return clock


def timed_step(clock, seconds: float):
    step = counting_step(pairs=lambda state: 4.0, tokens=lambda state: 100.0 + state)

    def timed(state, batch):
        clock.now += seconds
        return step(state, batch)

    return timed


def test_rates_count_pairs_and_tokens_since_the_last_log(clock):
    _, tracker = run(6, timed_step(clock, 2.0), log_every=3)
    rates = {step: (m["train/pairs_per_second"], m["train/tokens_per_second"]) for step, m in tracker.logged}
    assert list(rates) == [0, 3, 5]
    # Step 0 is fetched at once, later ones when the next one is on its way: the time of the first three holds four.
    assert rates[0] == (4 / 2.0, 100 / 2.0)
    assert rates[3] == (12 / 8.0, (101 + 102 + 103) / 8.0)
    assert not [name for _, metrics in tracker.logged for name in metrics if name in ("train/pairs", "train/tokens")]


def test_time_in_hooks_does_not_count(clock):
    def hook(info):
        clock.now += 1000.0

    _, tracker = run(4, timed_step(clock, 2.0), hooks=[Hook(hook, every=1, at_start=True)])
    assert [metrics["train/pairs_per_second"] for _, metrics in tracker.logged] == [4 / 2.0] * 4


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(num_train_steps=0), r"trainer\.num_train_steps=0 must be positive"),
        (dict(num_train_epochs=-1.0), r"trainer\.num_train_epochs=-1\.0 must be positive"),
        (dict(train_batch_size=0), r"trainer\.train_batch_size=0 must be positive"),
        (dict(log_every=-5), r"trainer\.log_every=-5 must be positive"),
        (dict(steps_per_eval=0), r"trainer\.steps_per_eval=0 must be positive"),
        (dict(per_device_parallelism=0), r"trainer\.per_device_parallelism=0 must be positive, or -1"),
        (dict(per_device_eval_parallelism=-2), r"trainer\.per_device_eval_parallelism=-2 must be positive, or -1"),
        (
            dict(num_train_steps=5, num_train_epochs=1.0),
            "num_train_steps and trainer.num_train_epochs exclude each other",
        ),
        (dict(stall_seconds=0.0), r"trainer\.stall_seconds=0.0 must be positive"),
        (dict(max_skips_in_a_row=0), r"trainer\.max_skips_in_a_row=0 must be positive"),
        (dict(last_batch="drop"), r"trainer\.last_batch='drop' must be one of short, fill, or null"),
        (dict(non_finite="warn"), r"trainer\.non_finite='warn' must be one of stop, skip"),
        (dict(mp="f31"), r"trainer\.mp='f31' is no precision; for example f32"),
        (dict(mp="p=f32,q=bf16"), r"trainer\.mp='p=f32,q=bf16' is no precision"),
        (dict(mp="half"), r"trainer\.mp='half': half is float16 or bfloat16"),
        (dict(mp="p=f32,c=f64"), r"trainer\.mp='p=f32,c=f64': JAX computes in float32 instead"),
        (dict(seed=-1), r"trainer\.seed=-1 must be in \[0, 2\*\*32\)"),
        (dict(num_train_steps=2**31), r"trainer\.num_train_steps=2147483648 makes more steps"),
        (dict(num_train_epochs=float("inf")), r"trainer\.num_train_epochs=inf makes more steps"),
        (dict(stall_seconds=1e30), r"trainer\.stall_seconds=1e\+30 is longer than a clock can wait"),
        (dict(log_dir="gs://bucket"), r"trainer\.log_dir='gs://bucket' must be a folder of this machine"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainerConfig(**settings)


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "a\\b", ".", "..", "a\nb", " a", "x" * 201])
def test_an_id_is_the_name_of_one_folder(name):
    with pytest.raises(ValueError, match=r"trainer\.id="):
        TrainerConfig(id=name)
    assert TrainerConfig(id="run 1.é").run_dir("run 1.é").parent == TrainerConfig().run_dir("other").parent


@pytest.mark.parametrize(
    "mp, param, compute",
    [
        (None, jnp.float32, jnp.float32),  # on CPUs
        ("f32", jnp.float32, jnp.float32),
        ("bf16", jnp.bfloat16, jnp.bfloat16),
        ("p=f32,c=bfloat16", jnp.float32, jnp.bfloat16),
    ],
)
def test_precisions_are_levanters_strings(mp, param, compute):
    precision = draccus.decode(TrainerConfig, {"mp": mp}).precision
    assert (precision.param_dtype, precision.compute_dtype) == (param, compute)


@pytest.mark.parametrize(
    "settings, steps",
    [
        (dict(), 13),  # one epoch of 12.5 batches
        (dict(num_train_epochs=2.0), 26),
        (dict(num_train_epochs=1.5), 20),
        (dict(num_train_epochs=0.5), 7),
        (dict(num_train_epochs=0.001), 1),
        (dict(num_train_epochs=2.0, last_batch="fill"), 25),
        (dict(num_train_epochs=0.5, last_batch="fill"), 7),
        (dict(num_train_steps=7), 7),
        (dict(num_train_steps=7, last_batch="short"), 7),
    ],
    ids=str,
)
def test_a_run_has_as_many_steps_as_asked_for(settings, steps):
    assert TrainerConfig(train_batch_size=8, **settings).steps(num_pairs=100) == steps


@pytest.mark.parametrize(
    "settings, has_short_batches",
    [
        (dict(), True),
        (dict(num_train_epochs=3.0), True),
        (dict(num_train_steps=7), False),
        (dict(num_train_steps=7, last_batch="short"), True),
        (dict(last_batch="fill"), False),
    ],
    ids=str,
)
def test_epochs_end_with_a_short_batch_unless_the_run_is_given_in_steps(settings, has_short_batches):
    assert draccus.decode(TrainerConfig, settings).has_short_batches is has_short_batches


def test_a_run_has_a_folder_of_its_own(tmp_path):
    config = TrainerConfig(log_dir=str(tmp_path))
    assert config.run_id() != config.run_id()
    assert TrainerConfig(id="mine").run_id() == "mine"
    assert config.run_dir("mine") == tmp_path / "mine"


def test_the_folder_may_be_in_the_users_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert TrainerConfig(log_dir="~/logs").run_dir("mine") == tmp_path / "logs" / "mine"
