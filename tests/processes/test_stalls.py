"""What a run waits for is told while it waits, and slow steps afterwards; nothing else is told."""

import logging
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora_dpo_jax.data.batches import prefetch
from lora_dpo_jax.processes.stalls import StallMonitor
from lora_dpo_jax.tracking import NoTrackerConfig
from lora_dpo_jax.training.loop import Hook, train


class SlowNumber:
    """A metric whose value the devices are long in giving."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __float__(self) -> float:
        time.sleep(self.seconds)
        return 1.0


def run(steps: int, *, batches=None, step_seconds=lambda step: 0.0, finish_seconds=lambda step: 0.0, **kwargs):
    def step(state, batch):
        time.sleep(step_seconds(state))
        return state + 1, SimpleNamespace(values={"loss": SlowNumber(finish_seconds(state))})

    batches = range(steps) if batches is None else batches
    tracker = NoTrackerConfig().start(run_dir=Path(), run_id="", resolved_config={})
    return train(0, step, batches, num_steps=steps, tracker=tracker, **kwargs)


def messages(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_stalled_input_is_told_with_where_the_packing_is(caplog):
    def stalled_at_three(number: int) -> int:
        time.sleep(0.5 if number == 3 else 0.0)
        return number

    batches = prefetch((lambda number=number: stalled_at_three(number) for number in range(5)), ahead=1)
    run(5, batches=batches, stalls=StallMonitor(0.1, helpers=["packing"]))
    first, *_, last = messages(caplog)
    assert re.match(
        r"step 3: waiting for the input, for . s so far; 0\.. s is the median\. The next batch is not", first
    )
    assert "thread MainThread:" in first and "in prefetch: item, error = results.get()" in first
    assert "thread packing:" in first and "in stalled_at_three: time.sleep(0.5 if number == 3" in first
    assert re.fullmatch(r"step 3: waited \d\.\d s for the input; it is over", last)


def test_a_step_that_hangs_is_told(caplog):
    run(5, finish_seconds=lambda step: 0.5 if step == 2 else 0.0, stalls=StallMonitor(0.1))
    first = messages(caplog)[0]
    assert re.match(r"step 2: waiting for the devices to finish the step, for . s so far; 0\.. s is the median", first)
    assert "another process" in first and "in __float__: time.sleep(self.seconds)" in first


def test_a_first_step_that_compiles_is_told_as_such(caplog):
    run(2, step_seconds=lambda step: 0.3 if step == 0 else 0.0, stalls=StallMonitor(0.1))
    first = messages(caplog)[0]
    start = "step 0: waiting for the step to be compiled and sent to the devices, for . s so far; it is the first of"
    assert re.match(start, first)


def test_a_hook_that_hangs_is_told_by_its_name(caplog):
    hook = Hook(lambda info: time.sleep(0.4 if info.step == 2 else 0.0), "export", every=1)
    run(3, hooks=[hook], stalls=StallMonitor(0.1))
    assert re.match(r"step 2: waiting for the hook export, for . s so far; 0\.. s is the median", messages(caplog)[0])


def test_a_long_wait_is_told_ever_more_rarely(caplog):
    with StallMonitor(0.1) as stalls, stalls.waiting_for("the end", 7):
        time.sleep(1.5)
    so_far = [message for message in messages(caplog) if "so far" in message]
    assert 2 <= len(so_far) <= 4, "after about 0.1, 0.2, 0.4 and 0.8 seconds"


def test_a_step_far_slower_than_the_median_is_told_with_what_it_waited_for(caplog):
    stalls = StallMonitor(60.0, shortest_delay=0.1)
    slow = {12: 0.4}
    run(15, step_seconds=lambda step: 0.02 + slow.get(step, 0.0), stalls=stalls)
    (told,) = messages(caplog)
    parts = r"it waited \d\.\d s for the input, \d\.\d s for the step to be compiled .*, \d\.\d s for the devices"
    assert re.match(rf"step 12 took \d\.\d s, and 0\.\d s is the median; {parts}", told)


@pytest.mark.parametrize("seconds", [None, 60.0])
def test_a_run_that_goes_its_way_is_left_in_peace(caplog, seconds):
    hook = Hook(lambda info: time.sleep(0.05), every=3)
    run(12, step_seconds=lambda step: 0.2 if step == 0 else 0.01, hooks=[hook], stalls=StallMonitor(seconds))
    assert messages(caplog) == []


def test_nothing_is_told_of_waits_when_that_is_not_wanted(caplog):
    run(12, step_seconds=lambda step: 1.2 if step == 10 else 0.0, stalls=StallMonitor(None))
    assert messages(caplog) == []


def test_waits_that_are_usual_are_not_told(caplog):
    with StallMonitor(0.05) as stalls:
        for step in range(4):
            with stalls.waiting_for("the usual", step):
                time.sleep(0.2)
    assert {message.split(":")[0] for message in messages(caplog)} == {"step 0"}


def test_no_thread_stays():
    with pytest.raises(ZeroDivisionError), StallMonitor(0.1):
        assert "stall monitor" in [thread.name for thread in threading.enumerate()]
        raise ZeroDivisionError
    assert "stall monitor" not in [thread.name for thread in threading.enumerate()]
