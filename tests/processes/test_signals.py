"""A signal lets the step at hand end; handlers are put back."""

import os
import signal
import threading

import pytest

from lora_dpo_jax.processes.signals import RESTART_STATUS, StoppedBySignalError, StopSignals


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_the_second_one_acts(signum):
    seen = []
    former = signal.signal(signum, lambda *_: seen.append("former"))
    try:
        with StopSignals() as stop:
            assert stop() is None
            os.kill(os.getpid(), signum)
            assert stop() == stop() == signum
            assert seen == []
            os.kill(os.getpid(), signum)
            assert seen == ["former"]
    finally:
        signal.signal(signum, former)


def test_a_signal_that_comes_twice_at_once_is_one():
    """From whoever ends all processes of a group, and passed on by a launcher that is one of them."""
    with StopSignals() as stop:
        again = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
        again.start()
        os.kill(os.getpid(), signal.SIGTERM)
        again.join()
        assert stop() == signal.SIGTERM


def test_handlers_are_put_back():
    before = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(ZeroDivisionError), StopSignals():
        assert signal.getsignal(signal.SIGTERM) != before[0]
        raise ZeroDivisionError
    assert [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)] == before


def test_off_the_main_thread_handlers_are_left_alone():
    before, inside, stops = signal.getsignal(signal.SIGTERM), [], []

    def work():
        with StopSignals() as stop:
            inside.append(signal.getsignal(signal.SIGTERM))
            stops.append(stop())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert (inside, stops) == ([before], [None])


def test_launchers_are_told_to_restart_after_sigterm_alone():
    assert StoppedBySignalError(signal.SIGTERM, 3, 9).exit_code == RESTART_STATUS == 75
    assert StoppedBySignalError(signal.SIGINT, 3, 9).exit_code == 130
    assert str(StoppedBySignalError(signal.SIGTERM, 3, 9)) == "stopped by SIGTERM after 3 of 9 steps"
