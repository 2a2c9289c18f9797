"""What a run exports is what its best evaluation saw, and a run that gets no better ends; whatever happens to it."""

import dataclasses
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import draccus
import jax
import numpy as np
import optax
import pytest
from many_processes import ended, start
from tiny_pairs import moved, new_adapters
from tiny_runs import preference_rows, read_metrics, run_config, write_rows

from lora_dpo_jax.lora import trainable_filter
from lora_dpo_jax.main.setup import load_tables, load_tokenizer
from lora_dpo_jax.main.train import main
from lora_dpo_jax.runs.best import BestAdapters
from lora_dpo_jax.runs.config import TrainConfig
from lora_dpo_jax.runs.held_out import metric_names
from lora_dpo_jax.tracking.metrics_file import MetricsFile
from lora_dpo_jax.training.choice import BestConfig, EarlyStoppingConfig, Standing
from lora_dpo_jax.training.loop import StepInfo, TrainerConfig
from lora_dpo_jax.training.step import TrainState

pytestmark = pytest.mark.usefixtures("two_devices")

STEPS, PATIENCE = 6, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("best")


def config_of(folder: Path, name: str, **settings) -> TrainConfig:
    folder.mkdir(exist_ok=True)
    rows = folder / "train.jsonl"
    if not rows.exists():
        write_rows(rows, preference_rows(16))
    return run_config(
        folder,
        rows,
        data__shuffle=True,
        lora__dropout=0.3,
        validation_split_fraction=0.5,
        optimizer={"learning_rate": 1e-2},
        peft_save_path=str(folder / name),
        trainer__id=name,
        trainer__num_train_steps=STEPS,
        trainer__steps_per_eval=1,
        trainer__token_metrics=True,  # so that evaluations are of tokens
        **settings,
    )


def adapter_of(config: TrainConfig, step: str = "") -> bytes:
    return (Path(config.peft_save_path or "") / step / "adapter_model.safetensors").read_bytes()


def lines_of(config: TrainConfig) -> list[dict[str, float]]:
    """What is logged, but for what the clock decides."""
    lines = [{k: v for k, v in line.items() if "second" not in k} for line in read_metrics(config)]
    return [line for line in lines if len(line) > 1]


@pytest.fixture(scope="module")
def plain(folder) -> TrainConfig:
    """A run without a choice, which exports every step."""
    config = config_of(folder, "plain", hf_save_steps=1)
    main(config)
    return config


def choice_in_the_middle(config: TrainConfig) -> tuple[BestConfig, int, int]:
    """A metric of a run by which neither its first nor its last evaluation is the best: (its settings, the step of the
    best evaluation, the step after which a run with PATIENCE ends)."""
    evaluations = [line for line in read_metrics(config) if "eval/loss" in line]
    assert [line["step"] for line in evaluations] == [*range(STEPS + 1)]
    for name in evaluations[0]:
        for mode in ("min", "max"):
            if name == "step":
                continue
            best = standing = BestConfig(name, mode)
            standing = Standing(best)
            for line in evaluations:
                standing = best(standing, int(line["step"]), line[name], min_delta=0.0)
                if standing.waited == PATIENCE:
                    break
            if standing.step and standing.last_step is not None and standing.last_step < STEPS:
                return best, standing.step, standing.last_step
    raise AssertionError("no metric of the run has its best value in the middle")


def test_a_run_that_was_killed_chooses_and_stops_as_one_that_never_was(folder, plain, monkeypatch, caplog, capsys):
    """The adapters are those of the step in the run without a choice, whose metrics are the same until the end."""
    best, best_step, last_step = choice_in_the_middle(plain)
    settings = {"trainer__best": vars(best), "trainer__early_stopping": {"patience": PATIENCE}}
    config = config_of(folder, "chosen", **settings, trainer__checkpointer={"keep": [{"every": 1}]})
    log = MetricsFile.log

    def log_and_die(self, metrics, *, step):
        log(self, metrics, step=step)
        if step == best_step + 1 and "train/loss" in metrics:
            raise SystemExit("killed")

    with monkeypatch.context() as patched, pytest.raises(SystemExit, match="killed"):
        patched.setattr(MetricsFile, "log", log_and_die)
        main(config)
    assert not Path(config.peft_save_path or "").exists()
    assert [*config.trainer.run_dir("chosen").glob("checkpoints/step-*")], "in which the best adapters are kept"
    state = main(config)

    assert state is not None and int(state.step) == last_step, "the last state is returned"
    assert adapter_of(config) == adapter_of(plain, f"step-{best_step}") != adapter_of(plain)
    *logged, summary = lines_of(config)
    assert logged == lines_of(plain)[: len(logged)]
    (value,) = (line[best.metric] for line in logged if line["step"] == best_step and best.metric in line)
    assert summary == {
        "step": 0,
        "best/step": best_step,
        f"best/{best.metric}": value,
        "stopped_early/step": last_step,
    }
    told = capsys.readouterr().out
    chosen = f"the adapters after step {best_step}, whose {best.metric} of {value:.6g} is the {best.word} of"
    stopped = f"after step {last_step} of {STEPS}: 2 evaluations in a row did not improve {best.metric}"
    card = (Path(config.peft_save_path or "") / "README.md").read_text().replace("\\", "")  # which escapes
    for text in (chosen, stopped):
        assert text in told and text in card
    assert f"after step {best_step} " in told and f"after step {last_step}\n" in told, "the table has both"

    before = (lines_of(config), adapter_of(config))
    caplog.set_level(logging.INFO)
    main(config)
    assert f"the run is complete after {last_step} of {STEPS} steps: nothing is left to train" in caplog.text
    assert (lines_of(config), adapter_of(config)) == before


def test_the_names_that_evaluations_log_are_known_without_a_model(plain):
    (line, *_) = (line for line in read_metrics(plain) if "eval/loss" in line)
    _, held_out = load_tables(plain, load_tokenizer(plain))
    assert {f"eval/{name}" for name in metric_names(plain.objective, held_out)} == line.keys() - {"step"}


def test_a_metric_that_no_evaluation_logs_is_an_error_that_lists_those_that_are(folder):
    config = config_of(folder, "unknown", trainer__best={"metric": "eval/accuracy", "mode": "max"})
    with pytest.raises(
        ValueError, match=r"trainer\.best\.metric=eval/accuracy is not logged .*: eval/loss, .*eval/dpo_"
    ):
        main(config)
    assert not config.trainer.run_dir("unknown").exists() or not read_metrics(config)


def test_a_choice_needs_held_out_data_and_evaluations_on_the_way(folder):
    best = {"trainer__best": {"metric": "eval/loss"}}
    with pytest.raises(
        ValueError, match=r"metric=eval/loss is of held-out data, and there are none: set validation_spl"
    ):
        run_config(folder, folder / "train.jsonl", trainer__steps_per_eval=1, **best)
    one_prompt = write_rows(folder / "one.jsonl", [{**row, "prompt": "why?"} for row in texts(8)])
    config = run_config(folder, one_prompt, trainer__steps_per_eval=1, validation_split_fraction=0.5, **best)
    with pytest.raises(ValueError, match="of held-out data, and there are none: all have the same prompt"):
        main(config)
    config = config_of(folder, "epoch", **best)
    trainer = dataclasses.replace(config.trainer, num_train_steps=None, steps_per_eval=2)  # of eight pairs
    with pytest.raises(ValueError, match="makes none between the first and the last step of the run's 2"):
        main(dataclasses.replace(config, trainer=trainer))


def texts(count: int) -> list[dict[str, str]]:
    return [{"chosen": f"yes {number}", "rejected": f"no {number}"} for number in range(count)]


class Logged:
    """A tracker that remembers its summary."""

    def __init__(self):
        self.summary: dict[str, float] = {}

    def log_summary(self, metrics) -> None:
        self.summary |= metrics


def followed(values: list[float], *, num_steps: int = 10, notes: dict[str, Any] | None = None, adapters: Any = None):
    """(the hook after evaluations with these values after 0, 1, ... steps, the last one ending the run; the models)."""
    trainer = TrainerConfig(
        steps_per_eval=1,
        best=BestConfig("eval/loss"),
        early_stopping=EarlyStoppingConfig(patience=3),
        num_train_steps=num_steps,
    )
    scores: Any = SimpleNamespace(latest={})
    tracker: Any = Logged()
    hook = BestAdapters(trainer, num_steps, scores, {} if notes is None else notes, adapters, tracker)
    states = []
    for step, value in enumerate(values):
        scores.latest = {"loss": value}
        model = moved(new_adapters(), seed=step)
        states.append(TrainState.init(model, optax.sgd(0.1), key=jax.random.key(0)))
        hook(StepInfo(step, states[-1], is_last=step == len(values) - 1))
    return hook, states


def trained(state: TrainState) -> list[np.ndarray]:
    marks = jax.tree.leaves(trainable_filter(state.model))
    return [np.asarray(x) for x, mark in zip(jax.tree.leaves(state.model), marks, strict=True) if mark]


def test_where_no_evaluation_is_a_number_the_last_adapters_count(caplog):
    hook, states = followed([math.nan, math.nan])
    last = StepInfo(1, states[-1], is_last=True)
    assert hook.chosen(last) is last
    assert "eval/loss was a number in no evaluation; the last adapters count" in caplog.text
    assert hook.words() == {"chosen": "the last adapters: eval/loss was a number in none of 2 evaluations"}
    assert hook.tracker.summary == {"stopped_early/step": 1}  # pyright: ignore


def test_a_run_that_only_gets_worse_exports_what_it_began_with_and_warns(caplog):
    hook, states = followed([0.5, 0.7, math.nan])
    chosen = hook.chosen(StepInfo(2, states[-1], is_last=True)).state
    assert all(np.array_equal(a, b) for a, b in zip(trained(chosen), trained(states[0]), strict=True))
    assert hook.chosen(StepInfo(2, states[-1])).state is states[-1], "exports on the way are what they are"
    assert "no evaluation was better than the one before the first step" in caplog.text
    assert hook.words()["chosen"].startswith("the adapters before the first step, whose eval/loss of 0.5 is the lowest")


def test_a_choice_that_is_new_to_a_checkpoint_begins_there(caplog):
    """And so does one whose adapters the checkpoint lacks."""
    assert followed([0.5], notes={"reference_log_probs": "live"})[0].standing.evaluations == 1
    note = Standing(BestConfig("eval/loss"), 3, 0.1, 4, 0, 3).note()
    notes = {"best": note}
    hook, _ = followed([], notes=notes)
    assert hook.standing == Standing(BestConfig("eval/loss")) and notes["best"]["step"] is None
    assert "holds no adapters of the best evaluation" in caplog.text


def test_processes_stop_together_and_export_what_they_kept(folder):
    """On two processes, and again when they are started again and find that the run is complete."""
    config = config_of(
        folder / "two",
        "two",
        hf_save_steps=1,
        trainer__best={"metric": "eval/dpo_accuracy", "mode": "min"},  # 1/2 before the first step, then 1/8 twice
        trainer__early_stopping={"patience": 2, "min_delta": 1e6},  # never reached, so that the end is known
    )
    path = folder / "two" / "run.yaml"
    path.write_text(str(draccus.dump(config)))
    found = []
    for _ in range(2):
        outcomes = ended(start(["-m", "lora_dpo_jax.main", "--config_path", str(path)], count=2))
        assert [status for status, _, _ in outcomes] == [0, 0], [told[-2000:] for _, _, told in outcomes]
        assert "after step 2 of 6: 2 evaluations in a row" in outcomes[0][1] and "2 eval" not in outcomes[1][1]
        found.append((lines_of(config), adapter_of(config)))
    assert "the run is complete after 2 of 6 steps" in outcomes[0][2]
    assert found[0] == found[1]
    summary = found[0][0][-1]
    assert (summary["best/step"], summary["stopped_early/step"]) == (1, 2)
    assert adapter_of(config) == adapter_of(config, "step-1")
