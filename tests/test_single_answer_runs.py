"""Runs over single answers: what they log, that they resume bit for bit, and what the other commands make of them."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import plain_rows, preference_rows, read_metrics, run_config, training_metrics, write_rows

from lora_dpo_jax.main import evaluate
from lora_dpo_jax.main.train import main
from lora_dpo_jax.processes.signals import StoppedBySignalError
from lora_dpo_jax.runs.assembly import load_tables
from lora_dpo_jax.runs.base import load_tokenizer
from lora_dpo_jax.runs.capacity import expected_batch
from lora_dpo_jax.runs.config import TrainConfig
from lora_dpo_jax.tracking.metrics_file import MetricsFile

pytestmark = pytest.mark.usefixtures("two_devices")

WEIGHTS = {"desirable_weight": 1.5, "undesirable_weight": 0.5}


def answers(count: int) -> list[dict]:
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if number % 3 else "rejected"], "label": number % 3 > 0}
        for number, row in enumerate(preference_rows(count))
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("answers")


@pytest.fixture(scope="module")
def rows(folder) -> Path:
    return write_rows(folder / "train.jsonl", answers(12))


def config_of(folder: Path, rows: Path, name: str, **settings) -> TrainConfig:
    """Of nine answers, steps take 4, 4 and 1; three are held out."""
    return run_config(
        folder,
        rows,
        **{
            "data__shuffle": True,
            "data__components__prefs__format": {"type": "unpaired"},
            "loss": {"type": "kto", **WEIGHTS},
            "lora__dropout": 0.3,
            "validation_split_fraction": 0.25,
            "optimizer": {"learning_rate": 1e-2},
            "peft_save_path": str(folder / name),
            "trainer__id": name,
            "trainer__num_train_steps": 4,
            "trainer__last_batch": "short",
            "trainer__checkpointer": {"keep": [{"every": 100}]},
            **settings,
        },
    )


@pytest.fixture(scope="module")
def whole(folder, rows) -> TrainConfig:
    config = config_of(folder, rows, "whole")
    main(config)
    return config


def tables_of(config: TrainConfig):
    return load_tables(config, load_tokenizer(config))


def test_a_run_begins_at_half_the_weights_and_logs_by_label(whole):
    first, *_, last = training_metrics(whole)
    chosen, rejected = first["train/count/chosen"], first["train/count/rejected"]
    assert chosen + rejected == 4
    # The reference's log-probs come from another program: sums of about -100 nats, in float32.
    assert first["train/loss"] == pytest.approx(0.5 * (1.5 * chosen + 0.5 * rejected) / 4, abs=1e-5)
    assert first["train/kl"] == pytest.approx(0.0, abs=1e-4) and last["train/loss"] != first["train/loss"]
    assert {"train/rewards/margins", "train/answers_per_second"} <= last.keys()
    assert "train/pairs_per_second" not in last
    before, after = (line for line in read_metrics(whole) if "eval/loss" in line)
    assert before["eval/dpo_accuracy"] == 0.5 and before["eval/count/chosen"] + before["eval/count/rejected"] == 3
    assert after["eval/kl"] >= 0.0 and after["eval/loss"] != before["eval/loss"]


def test_a_run_that_was_stopped_equals_one_that_never_was(folder, rows, whole, monkeypatch):
    config = config_of(folder, rows, "stopped")
    log = MetricsFile.log

    def log_and_stop(self, metrics, *, step):
        log(self, metrics, step=step)
        if step == 0 and "train/loss" in metrics:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched, pytest.raises(StoppedBySignalError):
        patched.setattr(MetricsFile, "log", log_and_stop)
        main(config)
    main(config)

    def outcome(config: TrainConfig) -> tuple[list, bytes]:
        lines = [{k: v for k, v in line.items() if "second" not in k} for line in read_metrics(config)]
        adapter = Path(config.peft_save_path or "") / "adapter_model.safetensors"
        return [line for line in lines if len(line) > 1], adapter.read_bytes()

    assert outcome(config) == outcome(whole)


def test_the_evaluate_command_scores_answers_and_not_the_mismatched_ones(folder, whole, capsys):
    fields = {field.name: getattr(whole, field.name) for field in dataclasses.fields(whole)}
    output, adapter = folder / "scores.jsonl", whole.peft_save_path
    config = evaluate.EvaluateConfig(**fields | {"output": str(output), "adapter": adapter})
    summary = evaluate.main(config)
    last = [line for line in read_metrics(whole) if "eval/loss" in line][-1]
    for name in ("loss", "kl", "rewards/margins", "dpo_accuracy"):
        assert summary[name] == pytest.approx(last[f"eval/{name}"], abs=1e-5), name
    assert "3 answers of the validation split" in capsys.readouterr().out
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    held_out = tables_of(whole)[1]
    assert [line["label"] for line in lines] == [example.columns["label"][0] == 1.0 for example in held_out]
    assert [line["completion_tokens"] for line in lines] == [len(example.responses[0]) for example in held_out]
    rewards = [0.1 * (line["logp"] - line["ref_logp"]) for line in lines if line["label"]]
    assert summary["rewards/chosen"] == pytest.approx(np.mean(rewards), abs=1e-5)
    evaluate.main(config)  # it replaces what it wrote before


def test_a_preview_shows_labels_and_mismatched_answers(whole, capsys):
    main(dataclasses.replace(whole, preview=9))
    shown = capsys.readouterr().out
    assert "=== answer 1 of 9" in shown and shown.count("--- mismatched") == 9
    assert shown.count("--- desirable") + shown.count("--- undesirable") == 9 > shown.count("--- undesirable") > 0


def test_a_component_may_have_one_label_and_pairs_are_then_answers(folder):
    rows = write_rows(folder / "pairs.jsonl", plain_rows(6))
    source = {"type": "url", "train_urls": [str(rows)]}
    formats = {
        name: {"type": "unpaired", "completion_field": name, "label": name == "chosen"}
        for name in ("chosen", "rejected")
    }
    components = {name: {"source": source, "format": format} for name, format in formats.items()}
    config = config_of(folder, rows, "halves", data__components=components, loss={"type": "apo_zero_unpaired"})
    train, held_out = tables_of(config)
    assert sum(train.counts) + sum(held_out.counts) == 12 and min(train.counts) > 0
    assert {label for example in train for label in example.columns["label"]} == {0.0, 1.0}, "and none is mismatched"
    assert [len(example.responses) for example in train] == [1] * len(train)


@pytest.mark.parametrize("loss, responses", [("kto", 2), ("apo_zero_unpaired", 1)])
def test_a_plan_is_of_answers(folder, rows, loss, responses):
    config = config_of(folder, rows, "plan", loss={"type": loss})
    batch = expected_batch(config, [20, 30, 30], row_shards=1, parallelism=-1)
    per_example = batch.examples.example_of_response.axes[-1].size / batch.examples.ids.axes[-1].size
    assert per_example == responses and batch.examples.chosen.size == 0
    assert batch.examples.column("label").axes == batch.examples.example_of_response.axes


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"loss": {"type": "sigmoid"}}, "data.components.prefs has single ones .* Set loss.type to kto"),
        (
            {"data__components__prefs__format": {"type": "preference_chat", "chosen_field": "completion",
             "rejected_field": "other"}},
            "trains on single answers with labels; data.components.prefs has others",
        ),
    ],
)  # fmt: skip
def test_a_loss_of_the_other_kind_of_rows_is_refused(folder, tmp_path, settings, message):
    rows = [row | {"other": [{"role": "assistant", "content": "?"}]} for row in answers(4)]
    config = config_of(folder, write_rows(tmp_path / "rows.jsonl", rows), "refused", **settings)
    with pytest.raises(ValueError, match=message):
        tables_of(config)


@pytest.mark.parametrize(
    "format, message",
    [
        ({"label": True}, r"format\.label=True is for format\.type=unpaired"),
        ({"type": "unpaired", "columns": ["label"]}, r"name \['label'\] twice, or as columns"),
    ],
)
def test_formats_that_contradict_themselves_are_refused(folder, rows, format, message):
    with pytest.raises(ValueError, match=message):
        config_of(folder, rows, "refused", data__components__prefs__format=format)
