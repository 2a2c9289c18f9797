"""Whole runs of `python -m lora_dpo_jax.main` on a tiny random model: what they write, refuse and leave alone."""

import dataclasses
import json
import logging
import math
import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
import yaml
from safetensors.numpy import load_file, save_file
from test_config import LEVANTER_CONFIG
from tiny_models import load, logits, summed_log_probs, torch_logits
from tiny_runs import (
    VOCAB,
    instruct_folder,
    preference_rows,
    read_metrics,
    run_config,
    training_metrics,
    write_rows,
)
from xla_flags import ONE_DEVICE

from lora_dpo_jax.huggingface.adapters import load_adapter
from lora_dpo_jax.main.errors import TRACEBACK
from lora_dpo_jax.main.setup import load_tables, load_tokenizer
from lora_dpo_jax.main.train import main
from lora_dpo_jax.processes.run_lock import RunIsActiveError, RunLock
from lora_dpo_jax.runs import learner
from lora_dpo_jax.runs.checks import NonFiniteStateError
from lora_dpo_jax.runs.config import TrainConfig
from lora_dpo_jax.settings.arguments import parse
from lora_dpo_jax.training.loop import NonFiniteLossError
from lora_dpo_jax.training.step import TrainStep

# PEFT asks transformers for what transformers has renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.usefixtures("two_devices"),
]

TRAIN, HELD_OUT = preference_rows(12), preference_rows(5, seed=1)
PER_PAIR = ["dpo_loss", "dpo_margin_policy", "dpo_margin_ref", "dpo_accuracy", "dpo_chosen_reward"]
PER_PAIR += ["dpo_rejected_reward", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"]
PER_PAIR += ["logps/chosen", "logps/rejected", "loss"]
PER_STEP = ["grad_norm", "learning_rate", "pairs_per_second", "tokens_per_second", "padding_fraction", "skipped_steps"]
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 24), dtype=np.int32)


@pytest.fixture
def rows(tmp_path) -> Path:
    return write_rows(tmp_path / "train.jsonl", TRAIN)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, addresses dialled): three steps with everything that a run can write."""
    folder = tmp_path_factory.mktemp("run")
    config = run_config(
        folder,
        write_rows(folder / "train.jsonl.gz", TRAIN),
        data__components__prefs__source__validation_urls=[str(write_rows(folder / "test.jsonl", HELD_OUT))],
        data__shuffle=True,
        peft_save_path=str(folder / "adapter"),
        merged_hf_save_path=str(folder / "merged"),
        hf_save_steps=2,
        sample_prompts=["7: where sleeps the owl?"],
        generation={"max_new_tokens": 4},
        trainer__num_train_steps=3,
        trainer__steps_per_eval=2,
        optimizer={"learning_rate": 1e-2},
    )
    dialled = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", lambda self, address: dialled.append(address))
        main(config)
    return config, dialled


def test_a_run_on_local_files_dials_nobody(run):
    assert run[1] == []


def test_metrics_jsonl_holds_every_step_under_the_documented_names(run):
    lines = read_metrics(run[0])
    training = [line for line in lines if "train/loss" in line]
    evaluation = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in training] == [0, 1, 2]
    assert [line["step"] for line in evaluation] == [0, 2, 3]
    assert all(line.keys() == {"step", *(f"train/{name}" for name in PER_PAIR + PER_STEP)} for line in training)
    of_evaluation = PER_PAIR + ["dpo_accuracy_se", "rewards/margins_se"]
    of_groups = {name for name in evaluation[0] if name.startswith(("eval/chosen_longer/", "eval/chosen_shorter/"))}
    assert of_groups and all(name.endswith(("accuracy", "margins", "_se")) for name in of_groups)
    for line in evaluation:
        assert line.keys() == {"step", *(f"eval/{name}" for name in of_evaluation)} | of_groups
    (baselines,) = (line for line in lines if "eval/longer_response/accuracy" in line)
    assert baselines["step"] == 0 and "eval/reference_log_prob/accuracy_se" in baselines
    assert sum(value for name, value in baselines.items() if name.endswith("/pairs")) == len(HELD_OUT)
    assert all(math.isfinite(value) for line in lines for value in line.values())


def test_parameters_are_counted_once(run):
    (counts,) = (line for line in read_metrics(run[0]) if "parameter_count" in line)
    base = transformers.AutoModelForCausalLM.from_pretrained(instruct_folder()).num_parameters()
    trainable = sum(tensor.size for tensor in exported_adapter(run[0]).values())
    assert counts == {
        "step": 0,
        "parameter_count": base + trainable,
        "trainable_parameter_count": trainable,
        "fraction_trainable": pytest.approx(trainable / (base + trainable)),
    }


def test_a_new_adapter_starts_at_ln_2_and_half_the_pairs(run):
    lines = read_metrics(run[0])
    for name in ("train", "eval"):
        first = next(line for line in lines if f"{name}/loss" in line)
        assert first["step"] == 0
        assert first[f"{name}/loss"] == pytest.approx(math.log(2), abs=1e-6)
        # The policy is then the reference, so that every pair is a tie, whatever the rounding.
        assert (first[f"{name}/dpo_accuracy"], first[f"{name}/rewards/accuracies"]) == (0.5, 0.0)


def test_config_yaml_parses_back_to_the_same_config(run):
    config = run[0]
    written = config.trainer.run_dir(config.trainer.run_id()) / "config.yaml"
    assert parse(TrainConfig, [], config_path=written) == config
    in_order = [field.name for field in dataclasses.fields(config) if field.name != "beta"]  # which is loss.beta here
    assert [*yaml.safe_load(written.read_text())] == in_order


@pytest.mark.parametrize("step", ["", "step-2"])
def test_the_adapter_in_peft_the_merged_model_and_ours_agree(run, step):
    config = run[0]
    adapter, merged = Path(config.peft_save_path or "") / step, Path(config.merged_hf_save_path or "") / step
    base = transformers.AutoModelForCausalLM.from_pretrained(instruct_folder())
    untrained = torch_logits(base, TOKENS)
    in_peft = torch_logits(peft.PeftModel.from_pretrained(base, adapter).eval(), TOKENS)
    assert np.abs(in_peft - untrained).max() > 0.01  # it has learned something
    # Logits are about 1; three float32 implementations.
    merged_model = transformers.AutoModelForCausalLM.from_pretrained(merged)
    np.testing.assert_allclose(torch_logits(merged_model, TOKENS), in_peft, atol=1e-4)
    np.testing.assert_allclose(logits(load_adapter(load(instruct_folder()), adapter), TOKENS), in_peft, atol=1e-4)


def test_an_export_on_the_way_is_not_the_last_one(run):
    final, on_the_way = exported_adapter(run[0]), exported_adapter(run[0], "step-2")
    assert final.keys() == on_the_way.keys()
    assert any((final[name] != on_the_way[name]).any() for name in final)


def test_the_merged_model_chats_as_the_base_does(run):
    conversation = [{"role": "user", "content": "why sleeps the cat?"}]
    theirs, ours = (
        transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(conversation, tokenize=False)
        for folder in (instruct_folder(), run[0].merged_hf_save_path)
    )
    assert ours == theirs


def exported_adapter(config: TrainConfig, step: str = "") -> dict[str, np.ndarray]:
    return load_file(Path(config.peft_save_path or "") / step / "adapter_model.safetensors")


def test_the_same_config_twice_gives_the_same_bits(tmp_path, rows):
    def outcome(name: str):
        config = run_config(
            tmp_path,
            rows,
            data__shuffle=True,
            lora__dropout=0.3,
            trainer__id=name,
            peft_save_path=str(tmp_path / name),
        )
        main(config)
        # What the clock decides is left out.
        metrics = [{k: v for k, v in line.items() if "per_second" not in k} for line in training_metrics(config)]
        return metrics, (tmp_path / name / "adapter_model.safetensors").read_bytes()

    assert outcome("first") == outcome("second")


EPOCH = {"trainer__num_train_steps": None, "trainer__num_train_epochs": 1, "trainer__train_batch_size": 5}


@pytest.mark.parametrize(
    "settings, pairs, says",
    [
        ({}, [5, 5, 2], "3 steps of 5 pairs, 3 an epoch, whose last one has 2 (trainer.last_batch=short), in"),
        ({"trainer__last_batch": "fill"}, [5, 5, 5], "3 steps of 5 pairs, the last one filled up from the next epoch"),
        ({"data__train_weights": {"prefs": 1}}, [5, 5, 2], "3 steps of 5 pairs, 3 an epoch, whose last one has 2"),
        ({"trainer__train_batch_size": 6}, [6, 6], "2 steps of 6 pairs, in"),
    ],
    ids=["short", "fill", "weighted", "even"],
)
def test_the_log_says_what_becomes_of_an_epochs_last_pairs(tmp_path, rows, monkeypatch, caplog, settings, pairs, says):
    made: list[TrainStep] = []
    batches: list[int] = []

    class Recording(TrainStep):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

        def __call__(self, state, batch):
            state, metrics = super().__call__(state, batch)
            batches.append(int(metrics.values["pairs"]))
            return state, metrics

    monkeypatch.setattr(learner, "TrainStep", Recording)
    caplog.set_level(logging.INFO)
    main(run_config(tmp_path, rows, **EPOCH | settings))
    assert batches == pairs
    assert [step.num_compilations for step in made] == [1]
    (line,) = (r.getMessage() for r in caplog.records if " steps of " in r.getMessage())
    assert line.startswith(says)
    (line,) = (r.getMessage() for r in caplog.records if " held out" in r.getMessage())
    expected = "0 held out (validation_split_fraction is 0.0, and no component has validation data)"
    assert line == f"12 training pairs, {expected}"


def test_a_run_compiles_its_step_once(tmp_path, rows, monkeypatch):
    made: list[TrainStep] = []

    def make(*args, **kwargs):
        made.append(TrainStep(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(learner, "TrainStep", make)
    main(run_config(tmp_path, rows))
    assert [step.num_compilations for step in made] == [1]


@pytest.fixture(scope="module")
def given_adapter(tmp_path_factory) -> Path:
    """Made by PEFT, with a product that is not zero."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    folder = tmp_path_factory.mktemp("adapter")
    peft.get_peft_model(base_model(), config).save_pretrained(str(folder))
    return folder


def base_model():
    return transformers.AutoModelForCausalLM.from_pretrained(instruct_folder())


def test_a_given_adapter_is_its_own_reference(tmp_path, rows, given_adapter):
    config = run_config(tmp_path, rows, initialize_from_peft=str(given_adapter))
    main(config)
    line = training_metrics(config)[0]
    assert line["train/loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_given_adapter_can_be_held_to_the_base(tmp_path, rows, given_adapter):
    config = run_config(tmp_path, rows, initialize_from_peft=str(given_adapter), peft_reference="base")
    main(config)
    line = training_metrics(config)[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(instruct_folder())
    reference = base_model()
    policy = peft.PeftModel.from_pretrained(base_model(), given_adapter).eval()

    def margin(model, row) -> float:
        def log_prob(response) -> float:
            prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
            whole = tokenizer.apply_chat_template(row["prompt"] + response, return_dict=False)
            return summed_log_probs(model, prompt, whole[len(prompt) :])

        return log_prob(row["chosen"]) - log_prob(row["rejected"])

    margins = [0.1 * (margin(policy, row) - margin(reference, row)) for row in TRAIN[:4]]
    expected = np.mean(np.logaddexp(0, -np.array(margins)))
    assert abs(expected - math.log(2)) > 0.05
    assert line["train/loss"] == pytest.approx(expected, abs=1e-4)


def test_zero_init_b_false_is_set_to_true_with_a_warning(tmp_path, rows, caplog):
    config = run_config(tmp_path, rows, lora__zero_init_b=False)
    main(config)
    assert any("zero_init_b" in r.message and r.levelno == logging.WARNING for r in caplog.records)
    assert training_metrics(config)[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    written = config.trainer.run_dir(config.trainer.run_id()) / "config.yaml"
    assert parse(TrainConfig, [], config_path=written).lora.zero_init_b


def test_a_loss_that_is_not_a_number_names_its_step_and_rows(tmp_path):
    rows = [*TRAIN[:6], {**TRAIN[6], "chosen": [{"role": "assistant", "content": "#"}]}, *TRAIN[7:]]
    model = copy_with_nan_embedding(tmp_path / "model", "#")
    config = run_config(
        tmp_path,
        write_rows(tmp_path / "train.jsonl", rows),
        initialize_from_hf=str(model),
        data__tokenizer=str(instruct_folder()),
        peft_save_path=str(tmp_path / "adapter"),
    )
    with pytest.raises(NonFiniteLossError, match=r"step 1: .*train.jsonl, row 7\b"):
        main(config)
    assert [line["step"] for line in training_metrics(config)] == [0]
    assert not (tmp_path / "adapter").exists()


@pytest.fixture
def spoiled(tmp_path):
    """config_of(bad, **settings): a run of five steps of four pairs over rows of which those in `bad` give NaN."""
    model = copy_with_nan_embedding(tmp_path / "model", "#")
    bad_answer = {"chosen": [{"role": "assistant", "content": "#"}]}

    def config_of(bad: list[int], **settings) -> TrainConfig:
        rows = [row | bad_answer if number in bad else row for number, row in enumerate(preference_rows(20), start=1)]
        return run_config(
            tmp_path,
            write_rows(tmp_path / "train.jsonl", rows),
            initialize_from_hf=str(model),
            data__tokenizer=str(instruct_folder()),
            trainer__num_train_steps=5,
            **settings,
        )

    return config_of


def test_steps_that_are_not_finite_are_skipped_and_counted(spoiled, caplog):
    config = spoiled([7, 15], trainer__non_finite="skip", trainer__max_skips_in_a_row=1)
    state = main(config)
    assert state is not None and (int(state.step), int(state.skipped)) == (5, 2)
    lines = training_metrics(config)
    assert [line["train/skipped_steps"] for line in lines] == [0, 1, 1, 2, 2]
    assert [line["train/loss"] is None for line in lines] == [False, True, False, True, False]
    told = [record.getMessage() for record in caplog.records if "skip" in record.getMessage()]
    assert len(told) == 2
    assert re.match(r"step 1: the loss is nan .* not made\. .*train\.jsonl, row 7\b.* 1 updates were skipped", told[0])
    assert re.match(r"step 3: the loss is nan .* not made\. .*train\.jsonl, row 15\b.* 2 updates were skipped", told[1])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.trained["adapters"]))


def test_too_many_steps_in_a_row_that_are_not_finite_stop_the_run(spoiled):
    config = spoiled([7, 9], trainer__non_finite="skip", trainer__max_skips_in_a_row=1)
    with pytest.raises(NonFiniteLossError, match=r"step 2: .*row 9\b.* number 2 in a row, more than trainer.max_skips"):
        main(config)


def test_what_the_last_update_spoiled_is_neither_saved_nor_exported(tmp_path, rows):
    config = run_config(
        tmp_path,
        rows,
        # The first step's rate is zero; in the second, the decay of weights of about 0.1 is beyond float32.
        optimizer={"learning_rate": 1e38, "weight_decay": 1e3, "warmup": 2},
        peft_save_path=str(tmp_path / "adapter"),
        merged_hf_save_path=str(tmp_path / "merged"),
        hf_save_steps=1,
        trainer__checkpointer={"keep": [{"every": 1}]},
    )
    with pytest.raises(
        NonFiniteStateError, match="^after step 2: .* adapters infinite or NaN.* Lower optimizer.learning"
    ):
        main(config)
    written = [
        path.name for place in ("adapter", "merged", "logs/run/checkpoints") for path in (tmp_path / place).iterdir()
    ]
    assert written == ["step-1"] * 3
    main(dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-3)))
    assert all(np.isfinite(tensor).all() for tensor in exported_adapter(config).values())


def test_a_run_that_another_process_works_on_is_left_alone(tmp_path, rows):
    config = run_config(tmp_path, rows, peft_save_path=str(tmp_path / "adapter"))
    with RunLock(tmp_path / "logs" / "run", "run"):
        with pytest.raises(RunIsActiveError, match=f"^trainer.id='run': process {os.getpid()} on .* is at work"):
            main(config)
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["logs", "run", "run.lock", "train.jsonl"]


def copy_with_nan_embedding(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_bytes((instruct_folder() / "config.json").read_bytes())
    tensors = load_file(instruct_folder() / "model.safetensors")
    tokenizer = transformers.AutoTokenizer.from_pretrained(instruct_folder())
    tensors["model.embed_tokens.weight"][tokenizer.convert_tokens_to_ids(text)] = np.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_validation_files_win_over_the_split_fraction(tmp_path, rows):
    held_out = write_rows(tmp_path / "test.jsonl", HELD_OUT)
    for files, sizes in (([], (len(TRAIN) - 3, 3)), ([str(held_out)], (len(TRAIN), len(HELD_OUT)))):
        config = run_config(
            tmp_path,
            rows,
            data__components__prefs__source__validation_urls=files,
            validation_split_fraction=0.25,
        )
        assert tuple(map(len, load_tables(config, load_tokenizer(config)))) == sizes


def test_preview_shows_pairs_and_stops(tmp_path, rows, capsys):
    config = run_config(tmp_path, rows, preview=2)
    assert main(config) is None
    shown = capsys.readouterr().out
    assert "=== pair 2 of 12" in shown and "pair 3" not in shown
    assert TRAIN[0]["chosen"][0]["content"] in shown
    assert not (tmp_path / "logs").exists()


def test_beta_is_short_for_loss_beta(tmp_path, rows):
    config = run_config(tmp_path, rows, beta=0.3, loss={"type": "sigmoid_norm"})
    assert config.preference_loss == type(config.loss)(beta=0.3)
    assert run_config(tmp_path, rows, loss={"type": "sigmoid", "beta": 0.3}).preference_loss.beta == 0.3
    with pytest.raises(ValueError, match="beta=0.3 and loss.beta=0.2 disagree"):
        run_config(tmp_path, rows, beta=0.3, loss={"type": "sigmoid", "beta": 0.2})


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, rows):
    tokenizer = transformers.AutoTokenizer.from_pretrained(instruct_folder())
    tokenizer.add_tokens(["<surplus>"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = run_config(tmp_path, rows, data__tokenizer=str(tmp_path / "tokenizer"))
    with pytest.raises(ValueError, match=f"knows {VOCAB + 1} tokens.* embeds only {VOCAB}: set data.tokenizer"):
        main(config)


def test_models_that_are_not_supported_end_a_run_before_its_data_are_read(tmp_path, given_adapter, monkeypatch):
    monkeypatch.setattr("lora_dpo_jax.runs.assembly.load_tables", lambda *_: pytest.fail("the data were read"))
    config = run_config(tmp_path, tmp_path / "no_rows.jsonl", initialize_from_hf=str(given_adapter))
    with pytest.raises(FileNotFoundError, match="holds an adapter and no model.*initialize_from_peft"):
        main(config)
    config = dataclasses.replace(config, initialize_from_hf=str(instruct_folder()), initialize_from_peft=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json is missing"):
        main(config)


@pytest.mark.parametrize("attention, needed", [("pallas_tpu", "tpu"), ("pallas_gpu", "gpu")])
def test_attention_of_another_platform_is_refused(tmp_path, rows, attention, needed):
    config = run_config(tmp_path, rows, model__attention=attention)
    with pytest.raises(ValueError, match=f"model.attention={attention} needs a {needed}, and this is a cpu: set auto"):
        main(config)


def test_a_run_without_training_pairs_is_refused(tmp_path, rows):
    config = run_config(tmp_path, rows, data__components__prefs__source={"type": "url", "validation_urls": [str(rows)]})
    with pytest.raises(ValueError, match="no training pair"):
        main(config)


@pytest.mark.parametrize("setting", ["peft_save_path", "merged_hf_save_path"])
def test_an_export_over_other_files_is_refused_before_training(tmp_path, rows, setting):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").touch()
    config = run_config(tmp_path, rows, **{setting: str(tmp_path / "thesis")})
    with pytest.raises(FileExistsError, match="chapter1.tex"):
        main(config)
    assert not (tmp_path / "logs").exists() and not (tmp_path / "cache").exists()


# As if they were not installed; transformers loads torch wherever it finds it.
WITHOUT_TEST_PACKAGES = """
import runpy, sys
sys.modules |= dict.fromkeys(["torch", "peft", "trl", "accelerate"])
runpy.run_module("lora_dpo_jax.main", run_name="__main__", alter_sys=True)
"""


def test_the_config_of_levanters_guide_runs_without_torch_or_network(tmp_path):
    """As it stands but for its paths, and for the size that the command line gives."""
    for number in range(2):
        write_rows(tmp_path / f"part{number}.jsonl.gz", preference_rows(12, seed=number))
    paths = {
        "gs://path/to/preference/data/*.jsonl.gz": f"{tmp_path}/*.jsonl.gz",
        "gs://bucket": str(tmp_path),
        "meta-llama/Llama-3.1-8B": str(instruct_folder()),
        "marin-community/marin-tokenizer": str(instruct_folder()),
    }
    text = LEVANTER_CONFIG
    for theirs, ours in paths.items():
        assert theirs in text
        text = text.replace(theirs, ours)
    (tmp_path / "levanter.yaml").write_text(text)
    command = [sys.executable, "-c", WITHOUT_TEST_PACKAGES, "--config_path", "levanter.yaml"]
    command += ["--trainer.num_train_steps", "2", "--trainer.train_batch_size", "4", "--data.cache_dir", "cache"]
    # A proxy that is not there: whoever dials out fails.
    offline = {"HF_HUB_OFFLINE": "1", "https_proxy": "http://127.0.0.1:9", "XLA_FLAGS": ONE_DEVICE}
    no_cache = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(command, cwd=tmp_path, env=no_cache | offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    assert re.search(r"the first step was done [\d.]+ s after the start", done.stderr)
    assert any((tmp_path / "cache" / "programs").iterdir()), "the step is not compiled again by the next run"
    (metrics,) = tmp_path.glob("logs/*/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [0, 1]
    assert lines[1]["eval/dpo_accuracy"] == 0.5
    adapter = tmp_path / "checkpoints" / "peft"
    peft.PeftModel.from_pretrained(base_model(), adapter)
    assert load_file(adapter / "adapter_model.safetensors").popitem()[1].dtype == np.float32
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoints" / "merged")


CONFIG = """
initialize_from_hf: ./gone
data: {components: {prefs: {source: {type: url, train_urls: [./gone.jsonl]}}}}
"""


@pytest.mark.parametrize(
    ("text", "args", "says"),
    [
        (None, [], "config.yaml"),
        ("data: [", [], "config.yaml ends before the list that opens in line 1, column 7 is closed"),
        ("{}", [], "data.components and initialize_from_hf are missing"),
        (CONFIG + "trainr: {}", [], "trainr is no setting. The nearest: trainer"),
        (CONFIG + "trainer: {num_train_steps: many}", [], "trainer.num_train_steps='many' must be a whole number"),
        (CONFIG + "trainer: {num_train_steps: -1}", [], "trainer.num_train_steps=-1 must be positive"),
        (CONFIG, ["--loss.beta", "-1"], "loss.beta=-1.0 must be positive"),
        (CONFIG, ["--plugins", "[gone]"], "plugins: gone cannot be imported: there is no module gone on sys.path"),
        (CONFIG, [], "initialize_from_hf: ./gone: no such folder"),
        (
            CONFIG,
            ["--initialize_from_hf", "MODEL", "--data.tokenizer", "./lost"],
            "data.tokenizer: ./lost: no such folder",
        ),
        (CONFIG, ["--initialize_from_hf", "MODEL"], "./gone.jsonl does not exist"),
    ],
)
def test_a_mistake_is_told_in_a_line(tmp_path, monkeypatch, capsys, text, args, says):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("config.yaml").write_text(text)
    args = [str(instruct_folder()) if arg == "MODEL" else arg for arg in args]
    monkeypatch.setattr(sys, "argv", ["main", "--config_path", "config.yaml", *args])
    monkeypatch.delitem(sys.modules, "lora_dpo_jax.main.__main__", raising=False)  # else runpy warns that it is there
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("lora_dpo_jax.main", run_name="__main__")
    told = capsys.readouterr().err
    assert stopped.value.code == 1
    assert re.search(f"error: .*{says}", told)
    assert "Traceback" not in told

    monkeypatch.setenv(TRACEBACK, "1")
    with pytest.raises((OSError, ValueError)):
        runpy.run_module("lora_dpo_jax.main", run_name="__main__")
