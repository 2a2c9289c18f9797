"""The best evaluation, and how long the later ones have been worse, as transformers' Trainer counts both."""

import dataclasses
import json
import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState
from transformers.trainer import Trainer

from lora_dpo_jax.training.choice import BestConfig, EarlyStoppingConfig, Standing
from lora_dpo_jax.training.loop import TrainerConfig

LOSS = BestConfig("eval/loss")


def standing_after(values, best: BestConfig = LOSS, min_delta: float = 0.0) -> Standing:
    standing = Standing(best)
    for number, value in enumerate(values):
        standing = best(standing, 10 * number, value, min_delta=min_delta)
    return standing


def by_transformers(
    values, *, mode: str, patience: int, min_delta: float
) -> tuple[int | None, float | None, list[int]]:
    """(the best step, its value, how long each evaluation has waited), until the callback stops the run."""
    callback = EarlyStoppingCallback(patience, min_delta)
    args = SimpleNamespace(
        metric_for_best_model="eval_x",
        greater_is_better=mode == "max",
        save_strategy="best",
        load_best_model_at_end=True,
    )
    trainer = SimpleNamespace(args=args, state=TrainerState())
    control, waited = TrainerControl(), []
    for number, value in enumerate(values):
        trainer.state.global_step = 10 * number
        callback.on_evaluate(args, trainer.state, control, {"eval_x": value})  # pyright: ignore
        Trainer._determine_best_metric(trainer, {"eval_x": value}, None)  # pyright: ignore
        waited.append(callback.early_stopping_patience_counter)
        if control.should_training_stop:
            break
    return trainer.state.best_global_step, trainer.state.best_metric, waited


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("patience, min_delta", [(1, 0.0), (2, 0.0), (3, 0.25)])
def test_best_and_patience_are_those_of_transformers(mode, patience, min_delta):
    """Over runs with ties, slow progress and NaN. Values are quarters, so that no difference is rounded."""
    rng = np.random.default_rng(0)
    best = BestConfig("eval/x", mode)
    for _ in range(60):
        values = (rng.integers(-4, 5, size=12) / 4).tolist()
        values = [math.nan if rng.random() < 0.15 else value for value in values]
        step, value, waited = by_transformers(values, mode=mode, patience=patience, min_delta=min_delta)
        standing, ours = Standing(best), []
        for number, x in enumerate(values):
            standing = best(standing, 10 * number, x, min_delta=min_delta)
            ours.append(standing.waited)
            if standing.waited >= patience:
                break
        assert ours == waited, values
        if standing.value is not None:
            assert (standing.step, standing.value) == (step, value), values


def test_what_is_no_number_never_wins():
    assert (standing_after([math.nan, -math.inf]).step, standing_after([math.nan, 2.0, math.nan]).step) == (None, 10)
    assert standing_after([math.inf, 1.0], BestConfig("eval/x", "max")).step == 10


def test_the_first_of_equal_evaluations_stays_the_best():
    assert standing_after([3.0, 1.0, 1.0]).step == 10


def test_an_evaluation_that_was_counted_changes_nothing():
    standing = standing_after([3.0, 4.0])
    assert LOSS(standing, 10, 0.0, min_delta=0.0) == standing
    assert LOSS(standing, 20, 0.0, min_delta=0.0).step == 20


def test_a_standing_comes_back_from_json_to_the_bit(caplog):
    standing = standing_after([1 / 3, 0.1, 0.2])
    note = json.loads(json.dumps(standing.note()))
    assert Standing.read(note, LOSS) == standing
    assert Standing.read(note, BestConfig("eval/loss", "min")) == dataclasses.replace(
        standing, best=BestConfig("eval/loss", "min")
    ), "the same metric in other words"
    with caplog.at_level(logging.WARNING):
        assert Standing.read(note, BestConfig("eval/loss", "max")).evaluations == 0
    assert "compared by the lowest eval/loss, and are forgotten" in caplog.text
    assert Standing.read(None, LOSS) == Standing(LOSS)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(best=dict(metric="loss")), r"trainer\.best\.metric='loss' must be a metric of the held-out data"),
        (dict(best=dict(metric="train/loss")), r"trainer\.best\.metric='train/loss' must be a metric of the held-out"),
        (
            dict(best=dict(metric="eval/dpo_accuracy")),
            r"trainer\.best\.mode must say which eval/dpo_accuracy is",
        ),
        (dict(best=dict(mode="max")), r"trainer\.best\.mode=max does nothing without trainer\.best\.metric"),
        (dict(best=dict(metric="eval/loss", mode="least")), r"trainer\.best\.mode='least' must be one of min, max"),
        (dict(early_stopping=dict(patience=0)), r"trainer\.early_stopping\.patience=0 must be at least 1"),
        (
            dict(early_stopping=dict(patience=2)),
            r"patience=2 counts .* trainer\.best\.metric, which is null",
        ),
        (dict(early_stopping=dict(min_delta=0.1)), r"min_delta=0\.1 does nothing without trainer\.early_stopping\.pat"),
        (dict(early_stopping=dict(patience=1, min_delta=-1.0)), r"min_delta=-1\.0 must be at least 0, and finite"),
        (dict(early_stopping=dict(patience=1, min_delta=math.inf)), r"min_delta=inf must be at least 0, and finite"),
        (
            dict(best=dict(metric="eval/loss"), steps_per_eval=None),
            r"trainer\.best\.metric=eval/loss chooses among evaluations, and trainer\.steps_per_eval=null makes none "
            r"between the first and the last step\. Set",
        ),
        (
            dict(best=dict(metric="eval/loss"), steps_per_eval=6, num_train_steps=6),
            r"trainer\.steps_per_eval=6 makes none between the first and the last step of the run's 6\. Set",
        ),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        settings = {"steps_per_eval": 1} | settings
        sections = {"best": BestConfig, "early_stopping": EarlyStoppingConfig}
        TrainerConfig(**{name: sections[name](**x) if name in sections else x for name, x in settings.items()})
