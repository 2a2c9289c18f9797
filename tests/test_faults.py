"""Faults in whole runs: each ends in an error that says what to do, or the run goes on and ends as without it."""

import contextlib
import dataclasses
import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from tiny_disks import flip_a_bit, no_file_larger_than
from tiny_runs import instruct_folder, preference_rows, read_metrics, run_config, write_rows

from lora_dpo_jax.data.sources import RowError
from lora_dpo_jax.main.train import main
from lora_dpo_jax.runs.config import TrainConfig

pytestmark = pytest.mark.usefixtures("two_devices")

STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("faults")


def config_of(folder: Path, name: str, *, checkpoint_every: int = 1, **settings) -> TrainConfig:
    return run_config(
        folder,
        write_rows(folder / "train.jsonl", preference_rows(8)),
        data__shuffle=True,
        lora__dropout=0.3,
        reference_log_probs="cached",
        optimizer={"learning_rate": 1e-2},
        peft_save_path=str(folder / name / "adapter"),
        merged_hf_save_path=str(folder / name / "merged"),
        hf_save_steps=3,
        trainer__id=name,
        trainer__num_train_steps=STEPS,
        trainer__checkpointer={"keep": [{"every": checkpoint_every}]},
        **settings,
    )


def outcome(config: TrainConfig) -> dict[str, object]:
    """What is logged, but for what the clock decides, and the exports."""
    lines = [{k: v for k, v in line.items() if "second" not in k} for line in read_metrics(config)]
    places = (Path(config.peft_save_path or ""), Path(config.merged_hf_save_path or ""))
    files = {str(p.relative_to(place.parent)): p.read_bytes() for place in places for p in place.rglob("*.safetensors")}
    return {"metrics": [line for line in lines if len(line) > 1], **files}


@contextlib.contextmanager
def no_programs_from_elsewhere() -> Iterator[None]:
    """Runs compile anew, and keep their programs where their config says."""
    before = jax.config.jax_compilation_cache_dir
    jax.clear_caches()
    compilation_cache.reset_cache()  # JAX opens a folder once
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def whole(folder) -> TrainConfig:
    """A run without a fault, which keeps its compiled programs too."""
    config = config_of(folder, "whole", trainer__jax_compilation_cache_dir=str(folder / "programs"))
    with no_programs_from_elsewhere():
        main(config)
    assert len(outcome(config)) == 1 + 2 * 2
    return config


def messages(caplog) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(folder, whole, caplog):
    config = config_of(folder, "damaged")
    shutil.copytree(folder / "logs" / "whole", folder / "logs" / "damaged")
    newest = folder / "logs" / "damaged" / "checkpoints" / "step-4"
    flip_a_bit(max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size))
    caplog.set_level(logging.INFO)
    main(config)
    assert "step-4 is damaged and is left out: the content of its file" in messages(caplog)
    assert "resuming from " in messages(caplog) and "damaged/checkpoints/step-3" in messages(caplog)
    assert outcome(config) == {**outcome(whole), "adapter/step-3/adapter_model.safetensors": outcome(config).get(
        "adapter/step-3/adapter_model.safetensors")}  # fmt: skip


@pytest.mark.parametrize("file", ["tokens.bin", "records.bin"])
def test_a_flipped_bit_in_a_cache_is_noticed_and_changes_nothing(folder, whole, caplog, file):
    (path,) = (folder / "cache").rglob(file)
    flip_a_bit(path)
    config = config_of(folder, f"with_damaged_{file}")
    main(config)
    assert "damaged" in messages(caplog)
    ours, theirs = outcome(config), outcome(whole)
    if file == "tokens.bin":
        assert ours == theirs
    else:  # the pair of the record is computed again by itself, so that sums are taken in another order
        assert ours.keys() == theirs.keys()
        for line, expected in zip(ours["metrics"], theirs["metrics"], strict=True):  # pyright: ignore
            assert line == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_a_compiled_program_that_was_cut_short_is_compiled_again(folder, whole):
    for path in (folder / "programs").iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    config = config_of(folder, "compiles_again", trainer__jax_compilation_cache_dir=str(folder / "programs"))
    with no_programs_from_elsewhere(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        main(config)
    assert any("Error reading persistent compilation cache entry" in str(warning.message) for warning in caught)
    assert outcome(config) == outcome(whole)


def test_a_disk_that_is_full_at_an_export_costs_no_training(folder, whole):
    config = config_of(folder, "full_at_export", checkpoint_every=100)
    size = (Path(whole.merged_hf_save_path or "") / "model.safetensors").stat().st_size
    told = (
        f"merged_hf_save_path: {folder}/full_at_export/merged/step-3 could not be written after 3 steps: .*"
        "A checkpoint of this step is saved: make room there, or set another path, and start the same command again"
    )
    with no_file_larger_than(size - 1), pytest.raises(OSError, match=told):
        main(config)
    assert (folder / "logs" / "full_at_export" / "checkpoints" / "step-3").exists()
    assert not (folder / "full_at_export" / "merged" / "step-3").exists()
    assert not list((folder / "full_at_export" / "merged").glob(".*"))
    main(config)
    assert outcome(config) == outcome(whole)


# Orbax leaves its event loops and threads when they fail.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_is_full_at_a_checkpoint_is_told_and_the_run_can_be_done_again(folder, whole):
    config = config_of(folder, "full_at_checkpoint")
    with no_file_larger_than(10_000), pytest.raises(OSError, match="step-1 could not be written; earlier ones are"):
        main(config)
    assert not (folder / "logs" / "full_at_checkpoint" / "checkpoints" / "step-1").exists()
    main(config)
    assert outcome(config) == outcome(whole)


def test_a_row_that_is_not_json_is_named(tmp_path):
    rows = write_rows(tmp_path / "train.jsonl", preference_rows(4))
    rows.write_text(rows.read_text() + "{'prompt': 'single quotes'}\n")
    with pytest.raises(RowError, match=r"train.jsonl, row 5: is not JSON: Expecting property name"):
        main(run_config(tmp_path, rows))


def test_a_shard_of_the_weights_that_was_cut_short_is_named(tmp_path):
    rows = write_rows(tmp_path / "train.jsonl", preference_rows(4))
    model = tmp_path / "model"
    shutil.copytree(instruct_folder(), model)
    shard = model / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model/model.safetensors is no safetensors file, or only part of one"):
        main(run_config(tmp_path, rows, initialize_from_hf=str(model)))
    assert not (tmp_path / "logs").exists()


def other_tokenizer(folder: Path) -> str:
    """The same but for the template, which changes the tokens of all pairs."""
    folder.mkdir()
    for path in instruct_folder().glob("*token*"):
        shutil.copyfile(path, folder / path.name)
    template = (instruct_folder() / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace("<|im_end|>", "<|im_end|>!"))
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer_config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return str(folder)


def test_another_tokenizer_takes_nothing_from_the_caches(folder, whole, tmp_path):
    """Nor does a run go on from a checkpoint of the former one's pairs."""
    tokenizer = other_tokenizer(tmp_path / "tokenizer")
    before = {path.name for path in (folder / "cache" / "examples").iterdir()}
    configs = [config_of(folder, "other", data__tokenizer=tokenizer)]
    configs += [config_of(folder, "other_anew", data__tokenizer=tokenizer)]
    configs[1] = dataclasses.replace(
        configs[1], data=dataclasses.replace(configs[1].data, cache_dir=str(tmp_path / "new"))
    )
    for config in configs:
        main(config)
    assert outcome(configs[0]) == outcome(configs[1])
    assert outcome(configs[0])["metrics"] != outcome(whole)["metrics"]
    assert len({path.name for path in (folder / "cache" / "examples").iterdir()} - before) == 1
    changed = "data.components.prefs.([a-z_]+.npy|tokens.bin): .* in the checkpoint, .* in this run"
    with pytest.raises(ValueError, match=f"step-4 is a checkpoint of another run:(.|\n)*{changed}"):
        main(config_of(folder, "whole", data__tokenizer=tokenizer))
