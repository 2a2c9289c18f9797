"""Places where nothing can be written are found before any work, and named by their setting."""

import functools
import logging
import shutil
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from tiny_runs import preference_rows, run_config, write_rows

from lora_dpo_jax.main import outputs
from lora_dpo_jax.main.outputs import check_free_space, check_outputs
from lora_dpo_jax.main.train import main

SETTINGS = {
    "data.cache_dir": "data__cache_dir",
    "trainer.log_dir": "trainer__log_dir",
    "trainer.checkpointer.base_path": "trainer__checkpointer__base_path",
    "peft_save_path": "peft_save_path",
    "merged_hf_save_path": "merged_hf_save_path",
}
EXPORTS = ["peft_save_path", "merged_hf_save_path"]


@pytest.fixture
def config_of(tmp_path):
    rows = write_rows(tmp_path / "train.jsonl", preference_rows(8))
    return functools.partial(run_config, tmp_path, rows)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("place", ["file/run", "/proc/run"])  # permissions do not bind root; these bind everyone
def test_a_place_that_cannot_be_written_is_named_before_any_work(config_of, tmp_path, setting, place):
    (tmp_path / "file").touch()
    place = place if place.startswith("/") else str(tmp_path / place)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match=f"^{setting}: nothing can be written to .*Set it to a place where it can"):
        main(config_of(**{SETTINGS[setting]: place}))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_full_disk_is_named_before_any_work(config_of, monkeypatch, setting):
    """/dev/full is one: what is written to it finds no space left."""

    def on_full_disk(dir):
        full = str(dir).endswith("full")
        return open("/dev/full", "wb") if full else open("/dev/null", "wb")

    monkeypatch.setattr(outputs.tempfile, "TemporaryFile", on_full_disk)
    monkeypatch.setattr(outputs, "existing_part", lambda folder: folder)
    with pytest.raises(OSError, match=f"^{setting}: nothing can be written to .*No space left on device"):
        main(config_of(**{SETTINGS[setting]: "/full/x" if setting in EXPORTS else "/full"}, trainer__id=None))


class Store(MemoryFileSystem):
    """A store whose buckets must be made by hand."""

    protocol = "store"
    store: dict = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    buckets = {"mine"}  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).replace("store://", "memory://"))

    def pipe_file(self, path, value, **kwargs):
        if (bucket := self._strip_protocol(path).strip("/").split("/")[0]) not in self.buckets:
            raise FileNotFoundError(f"The specified bucket does not exist: {bucket}")
        return super().pipe_file(path, value, **kwargs)


@pytest.fixture
def store():
    fsspec.register_implementation("store", Store, clobber=True)
    Store.store.clear()
    return Store()


@pytest.mark.parametrize("setting", EXPORTS)
def test_a_missing_bucket_is_named_before_any_work(config_of, tmp_path, store, setting):
    with pytest.raises(
        OSError, match=f"^{setting}: nothing can be written to store://theirs/x .*does not exist: theirs"
    ):
        main(config_of(**{SETTINGS[setting]: "store://theirs/x"}))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("setting", EXPORTS)
def test_a_store_that_is_not_known_is_named(config_of, setting):
    with pytest.raises(OSError, match=f"^{setting}: nothing can be written to nowhere://x/y .*not known: nowhere"):
        check_outputs(config_of(**{SETTINGS[setting]: "nowhere://x/y"}))


def test_trying_leaves_nothing_behind(config_of, tmp_path, store):
    before = sorted(tmp_path.rglob("*"))
    check_outputs(
        config_of(
            peft_save_path="store://mine/adapter",
            merged_hf_save_path=str(tmp_path / "deep" / "in" / "merged"),
            trainer__checkpointer__base_path=str(tmp_path / "checkpoints"),
        )
    )
    assert sorted(tmp_path.rglob("*")) == before
    assert not store.store


def test_a_preview_writes_to_the_cache_alone(config_of, capsys):
    main(config_of(peft_save_path="/proc/x", preview=1))
    assert "=== pair 1" in capsys.readouterr().out


def test_merged_models_that_do_not_fit_are_told(tmp_path, caplog):
    free = shutil.disk_usage(tmp_path).free
    check_free_space("merged_hf_save_path", str(tmp_path / "x"), free // 10, 2)
    assert not caplog.records
    check_free_space("merged_hf_save_path", str(tmp_path / "x"), free // 2, 4)
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert "not enough for the 4 that the run will write" in warning.getMessage()
    with pytest.raises(OSError, match="merged_hf_save_path: a merged model is of about .* GB free. Make room, or set"):
        check_free_space("merged_hf_save_path", str(tmp_path / "x"), 2 * free, 1)
    check_free_space("merged_hf_save_path", "store://mine/x", 2 * free, 1)


def test_a_run_whose_merged_model_does_not_fit_ends_before_training(config_of, tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda path: full)
    with pytest.raises(OSError, match="^merged_hf_save_path: a merged model is of about 0.000 GB"):
        main(config_of(merged_hf_save_path=str(tmp_path / "merged")))
    assert not (tmp_path / "merged").exists()
    assert not Path(tmp_path / "logs" / "run" / "checkpoints" / "step-2").exists()
