"""Schedules are those of transformers, step by step, and a parameter without a use is an error."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from lora_dpo_jax.training.optimizer import AdamW, ScheduleFree

NUM_STEPS = 20
RATE = 3e-4


def theirs(config: AdamW, kwargs: dict[str, Any]) -> list[float]:
    """The rates of transformers.get_scheduler, which has the same names."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    name = {"wsd": "warmup_stable_decay"}.get(config.lr_schedule, config.lr_schedule)
    scheduler = transformers.get_scheduler(
        name, optimizer, config.warmup_steps(NUM_STEPS), NUM_STEPS, scheduler_specific_kwargs=kwargs
    )
    rates = []
    for _ in range(NUM_STEPS + 2):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 4, 0.17])
@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("cosine_with_restarts", {}),
        ("cosine_with_restarts", {"num_cycles": 3}),
        ("polynomial", {}),
        ("polynomial", {"power": 2.5, "lr_end": 2e-5}),
        ("wsd", {"num_decay_steps": 6}),
        ("wsd", {"num_decay_steps": 9, "decay_type": "linear", "min_lr_ratio": 0.1}),
        ("wsd", {"num_decay_steps": 16, "decay_type": "1-sqrt"}),
        ("inverse_sqrt", {}),
        ("inverse_sqrt", {"timescale": 7}),
    ],
    ids=str,
)
def test_each_rate_is_that_of_transformers(name, kwargs, warmup):
    config = AdamW(learning_rate=RATE, lr_schedule=name, warmup=warmup, **kwargs)
    expected = theirs(config, kwargs)
    ours = jax.jit(config.schedule(NUM_STEPS))(jnp.arange(NUM_STEPS + 2))
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6 * RATE)


def test_a_restart_is_at_the_peak_where_a_rounded_fraction_would_end_a_cycle_at_zero():
    """(1 / 49 * 49) % 1 is 0.9999999999999999, of which transformers makes a rate of 0."""
    config = AdamW(learning_rate=1.0, lr_schedule="cosine_with_restarts", num_cycles=49)
    assert float(config.schedule(49)(1)) == 1.0


def test_a_decay_may_be_a_fraction_of_the_run():
    settings = {"learning_rate": 1.0, "lr_schedule": "wsd", "warmup": 2}
    by_fraction, by_count = (AdamW(num_decay_steps=length, **settings).schedule(20) for length in (0.24, 5))
    steps = jnp.arange(20)
    np.testing.assert_array_equal(by_fraction(steps), by_count(steps))
    assert by_count(jnp.asarray([14, 15]))[0] == 1.0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_cycles": 2}, "num_cycles=2 is for optimizer.lr_schedule cosine_with_restarts alone, and it is linear"),
        ({"lr_schedule": "cosine", "power": 2.0}, "power=2.0 is for optimizer.lr_schedule polynomial alone"),
        ({"lr_schedule": "polynomial", "min_lr_ratio": 0.1}, "min_lr_ratio=0.1 is for .* linear and cosine and wsd"),
        ({"lr_schedule": "constant", "timescale": 5}, "timescale=5 is for optimizer.lr_schedule inverse_sqrt alone"),
        ({"lr_schedule": "wsd"}, "num_decay_steps is missing; optimizer.lr_schedule=wsd needs"),
        ({"lr_schedule": "wsd", "num_decay_steps": 1.5}, r"num_decay_steps=1.5 must be a fraction in \(0, 1\) or"),
        ({"lr_schedule": "wsd", "num_decay_steps": 0}, r"num_decay_steps=0 must be a fraction in \(0, 1\) or"),
        ({"lr_schedule": "cosine_with_restarts", "num_cycles": 0}, "num_cycles=0 must be at least 1"),
        ({"lr_schedule": "polynomial", "power": 0.0}, "power=0.0 must be positive"),
        ({"lr_schedule": "polynomial", "lr_end": 1e-3}, "lr_end=0.001 must be below optimizer.learning_rate=5e-06"),
        ({"lr_schedule": "inverse_sqrt", "timescale": 0}, "timescale=0 must be at least 1"),
    ],
)
def test_a_parameter_of_a_schedule_without_a_use_or_out_of_range_is_an_error(settings, message):
    with pytest.raises(ValueError, match=rf"^optimizer\.{message}"):
        AdamW(**settings)


def test_a_decay_longer_than_the_run_is_an_error_as_soon_as_its_length_is_known():
    config = AdamW(lr_schedule="wsd", num_decay_steps=15, warmup=6)
    with pytest.raises(ValueError, match="optimizer.num_decay_steps=15 is 15 steps, more than the 14 that the"):
        config.schedule(20)


@pytest.mark.parametrize("settings", [{"lr_schedule": "linear"}, {"min_lr_ratio": 0.1}, {"beta1": 0.0}])
def test_schedule_free_takes_no_schedule_but_a_warmup(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=rf"^optimizer\.{name}="):
        ScheduleFree(**settings)
