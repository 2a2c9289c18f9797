"""Places where nothing may be written are found before any work, and named by their setting."""

import functools
import logging
import shutil
from pathlib import Path

import draccus
import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from tiny_runs import instruct_folder, preference_rows, run_config, write_rows

from lora_dpo_jax.huggingface.folders import export_folder
from lora_dpo_jax.main.train import main
from lora_dpo_jax.runs import outputs
from lora_dpo_jax.runs.outputs import check_free_space, check_outputs

SETTINGS = {
    "data.cache_dir": "data__cache_dir",
    "trainer.log_dir": "trainer__log_dir",
    "trainer.checkpointer.base_path": "trainer__checkpointer__base_path",
    "peft_save_path": "peft_save_path",
    "merged_hf_save_path": "merged_hf_save_path",
    "gguf_save_path": "gguf_save_path",
}
EXPORTS = ["peft_save_path", "merged_hf_save_path", "gguf_save_path"]


@pytest.fixture
def config_of(tmp_path):
    rows = write_rows(tmp_path / "train.jsonl", preference_rows(8))
    return functools.partial(run_config, tmp_path, rows)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("place", ["file/run", "loop/run", "loop", "/proc/run"])  # these bind root too
def test_a_place_that_cannot_be_written_is_named_before_any_work(config_of, tmp_path, setting, place):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
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
        main(config_of(**{SETTINGS[setting]: "/full"}, trainer__id=None))


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


def listing(folder: Path) -> dict[str, bytes | str | None]:
    """All below a folder: the bytes of files, where links lead, None for folders."""
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """The working folder of a user, with a model, two adapters, another run's exports and some folders and links."""
    shutil.copytree(instruct_folder(), tmp_path / "model")
    for name in ("config.json", "adapter_config.json"):
        (tmp_path / f"has {name}").mkdir()
        (tmp_path / f"has {name}" / name).write_text("{}")
        (tmp_path / f"has {name}" / "thesis.tex").write_text("dear reader")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for place in ("theirs", "theirs/step-2", "ours", "steps/step-2", "steps/step-3"):
        with export_folder(tmp_path / place, run="run" if place == "ours" else "another") as folder:
            (folder / "adapter_config.json").write_text("{}")
    (tmp_path / "logs" / "run" / "checkpoints" / "step-2").mkdir(parents=True)
    (tmp_path / "link").symlink_to("model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


INPUT = "would replace {}='.*'. Choose another path"
REFUSED = {
    # the base, by all its names, and other inputs
    "model": INPUT.format("initialize_from_hf"),
    "./model/": INPUT.format("initialize_from_hf"),
    "adapter/../model": INPUT.format("initialize_from_hf"),
    "link": INPUT.format("initialize_from_hf"),
    "file://HOME/model": INPUT.format("initialize_from_hf"),
    "adapter": INPUT.format("initialize_from_peft"),
    "theirs": INPUT.format("data.tokenizer"),
    # files that no run wrote, whatever they are called
    "has config.json": "is no former export.*config.json, thesis.tex",
    "has adapter_config.json": "is no former export.*adapter_config.json, thesis.tex",
    "data": "is no former export.*train.jsonl",
    # places with another use
    ".": "is the working folder: name one in it",
    "model/..": "is the working folder: name one in it",
    "logs/run": "is the run's own folder: name one in it, such as .*logs/run/export",
    "logs/run/checkpoints": "is where the run's checkpoints are",
    "logs/run/checkpoints/step-2": "is where the run's checkpoints are",
    # another run's exports: overwrite is for others than these
    "steps": "steps/step-2 would replace .*initialize_from_peft",
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("path", REFUSED)
@pytest.mark.parametrize("setting", EXPORTS)
def test_an_export_that_would_lose_something_is_refused_before_any_work(home, setting, path, overwrite):
    (home / "data").mkdir()
    rows = write_rows(home / "data" / "train.jsonl", preference_rows(8))
    config = run_config(
        home,
        rows,
        initialize_from_hf=str(home / "model"),
        initialize_from_peft="steps/step-2" if path == "steps" else "./adapter",
        data__tokenizer="theirs",
        hf_save_steps=2,
        overwrite=overwrite,
        **{setting: path.replace("HOME", str(home))},
    )
    before = listing(home)
    with pytest.raises((FileExistsError, ValueError), match=f"^{setting}.*{REFUSED[path]}"):
        main(config)
    assert listing(home) == before


def test_another_runs_exports_are_replaced_if_asked_and_ones_own_always(home, config_of):
    for path in ("theirs", "steps"):  # the last one, and one on the way, whose step comes again
        settings = {"peft_save_path": path, "hf_save_steps": 2}
        with pytest.raises(FileExistsError, match="^peft_save_path: .*the run 'another'.* set overwrite to true"):
            check_outputs(config_of(**settings))
        check_outputs(config_of(**settings, overwrite=True))
    check_outputs(config_of(peft_save_path="steps", hf_save_steps=5))
    check_outputs(config_of(peft_save_path="ours"))
    with pytest.raises(FileExistsError, match="to resume that run, set trainer.id to its id"):
        check_outputs(config_of(peft_save_path="ours", trainer__id=None))


@pytest.mark.parametrize(
    "other", ["new", "new/", "./new", "model/../new", "link to new", "file://HOME/new", "new/step-4"]
)
def test_the_two_exports_do_not_share_a_place(home, config_of, other):
    (home / "link to new").symlink_to("new")
    paths = {"peft_save_path": "new", "merged_hf_save_path": other.replace("HOME", str(home))}
    with pytest.raises((ValueError, draccus.utils.ParsingError)) as raised:
        check_outputs(config_of(**paths, hf_save_steps=2))
    told = str(raised.value.__cause__ or raised.value)
    assert "they must differ" in told or "is where peft_save_path exports on the way" in told


def test_a_config_file_in_the_runs_folder_is_not_replaced(tmp_path, config_of):
    """As where experiments/one/config.yaml is what the run is started with."""
    (tmp_path / "logs" / "run").mkdir(parents=True)
    (tmp_path / "logs" / "run" / "config.yaml").write_text("# my notes")
    before = listing(tmp_path)
    with pytest.raises(
        FileExistsError, match="^trainer.log_dir, trainer.id: .*logs/run holds a config.yaml but no metr"
    ):
        main(config_of())
    assert listing(tmp_path) == before


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
