import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from hostile_values import how_it_ends
from huggingface_hub.utils import filter_repo_objects

from lora_dpo_jax.huggingface.folders import export_folder, local_folder
from lora_dpo_jax.main.setup import TOKENIZER_FILES


def write_export(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def bucket():
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield files
    files.store.clear()


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_an_export_replaces_the_former_one_and_keeps_subfolders(scheme, bucket, tmp_path):
    target = scheme + str(tmp_path / "out")
    for place in (target, f"{target}/step-10"):
        with export_folder(place) as folder:
            write_export(folder, config__json="old", stale__safetensors="old")
    with export_folder(target) as folder:
        write_export(folder, config__json="new", new__safetensors="new")
    names = {"config.json": "new", "new.safetensors": "new"}
    names |= {"step-10/config.json": "old", "step-10/stale.safetensors": "old"}
    if scheme:
        bucket.get(target, str(tmp_path / "fetched"), recursive=True)
    assert tree(tmp_path / ("fetched" if scheme else "out")) == names


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_a_failed_export_leaves_the_former_one(scheme, bucket, tmp_path):
    target = scheme + str(tmp_path / "out")
    with export_folder(target) as folder:
        write_export(folder, config__json="whole")
    with pytest.raises(RuntimeError, match="disk full"), export_folder(target) as folder:
        write_export(folder, config__json="half")
        raise RuntimeError("disk full")
    with fsspec.open(f"{target}/config.json", "r") as file:
        assert file.read() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ([] if scheme else ["out"])


def test_a_killed_export_leaves_nothing_at_its_target(tmp_path):
    program = f"""
import os
from lora_dpo_jax.huggingface.folders import export_folder
with export_folder({str(tmp_path / "out")!r}) as folder:
    (folder / "config.json").write_text("half")
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 9
    assert not (tmp_path / "out").exists()
    assert all(path.name.startswith(".tmp-out-") for path in tmp_path.iterdir())


MOMENTS = ["after the former one was moved", "after the new one was moved", "after a subfolder was moved"]


@pytest.mark.parametrize("moves", range(len(MOMENTS)), ids=MOMENTS)
def test_an_export_that_was_killed_while_it_was_put_in_place_is_mended_by_the_next(moves, tmp_path):
    target = tmp_path / "out"
    for place, text in ((target, "old"), (target / "step-2", "old"), (target / "step-4", "old")):
        with export_folder(place) as folder:
            write_export(folder, config__json=text)
    program = f"""
import os
from lora_dpo_jax.huggingface import folders
replace, moved = os.replace, []
def replace_and_die(*paths):
    replace(*paths)
    moved.append(paths)
    if len(moved) == {moves + 1}:
        os._exit(9)
os.replace = replace_and_die
with folders.export_folder({str(target)!r}) as folder:
    (folder / "config.json").write_text("new")
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 9
    assert target.exists() == (moves > 0)
    with export_folder(target) as folder:
        write_export(folder, config__json="newer")
    assert tree(target) == {"config.json": "newer", "step-2/config.json": "old", "step-4/config.json": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_export_left_is_removed_by_the_next_to_its_target_alone(tmp_path):
    left = [tmp_path / f".tmp-{name}-0123abcd" for name in ("out", "out-2")]
    for folder in left:
        folder.mkdir()
        write_export(folder, config__json="half")
    with export_folder(tmp_path / "out") as folder:
        write_export(folder, config__json="new")
    assert [folder.exists() for folder in left] == [False, True]


def test_an_upload_ends_with_the_file_that_makes_it_whole(bucket, monkeypatch):
    written, removed = [], []
    put, rm = type(bucket).put_file, type(bucket).rm_file
    monkeypatch.setattr(
        type(bucket), "put_file", lambda self, a, b, **k: (written.append(b.rpartition("/")[2]), put(self, a, b, **k))
    )
    monkeypatch.setattr(type(bucket), "rm_file", lambda self, a: (removed.append(a.rpartition("/")[2]), rm(self, a)))
    for _ in range(2):
        with export_folder("memory://bucket/out") as folder:
            write_export(folder, adapter_config__json="x", adapter_model__safetensors="x", tokenizer__json="x")
    assert written[2] == written[5] == "adapter_config.json"
    assert removed[0] == "adapter_config.json"


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_files_that_are_no_export_are_not_replaced(scheme, bucket, tmp_path):
    target = scheme + str(tmp_path / "home")
    with fsspec.open(f"{target}/letter.txt", "w", auto_mkdir=True) as file:
        file.write("dear")
    with pytest.raises(FileExistsError, match=r"no former export.*letter\.txt"), export_folder(target):
        pytest.fail("the work began")
    with fsspec.open(f"{target}/letter.txt", "r") as file:
        assert file.read() == "dear"


def test_a_url_is_downloaded_once_and_again_when_it_changes(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bucket.pipe({"/model/config.json": b"first", "/model/optimizer.pt": b"no", "/model/deeper/config.json": b"no"})
    first = local_folder("memory://model")
    assert tree(first) == {"config.json": "first"}
    with monkeypatch.context() as patch:
        patch.setattr(type(bucket), "get_file", lambda *_, **__: pytest.fail("downloaded again"))
        assert local_folder("memory://model") == first
    bucket.pipe("/model/config.json", b"second")
    assert tree(local_folder("memory://model")) == {"config.json": "second"}


REPOSITORY = ["config.json", "model.safetensors", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"]
NOT_FETCHED = [
    "onnx/config.json",
    "additional/x.json",
    "additional_chat_templates2/x.jinja",
    "consolidated.safetensors",
]
NOT_FETCHED += ["additional_chat_templates/deeper/x.jinja", "pytorch_model.bin", "a/additional_chat_templates/x.jinja"]


def test_named_chat_templates_are_fetched_from_the_hub_and_no_other_folder(tmp_path, monkeypatch):
    fetched = []

    def hub(name, *, allow_patterns, ignore_patterns, **_):
        files = filter_repo_objects(
            REPOSITORY + NOT_FETCHED, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        fetched.append([*files])
        return str(tmp_path)

    monkeypatch.setattr("lora_dpo_jax.huggingface.folders.snapshot_download", hub)
    local_folder("org/model")
    local_folder("org/model", patterns=TOKENIZER_FILES)
    templates = ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"]
    assert fetched == [REPOSITORY, ["config.json", *templates]]


def test_named_chat_templates_are_fetched_from_a_url_and_no_other_folder(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bucket.pipe({f"/bucket/model/{name}": name.encode() for name in REPOSITORY + NOT_FETCHED})
    fetched = local_folder("memory://bucket/model")
    assert tree(fetched) == {name: name for name in REPOSITORY}
    bucket.pipe("/bucket/model/additional_chat_templates/tool_use.jinja", b"changed")
    assert (local_folder("memory://bucket/model") / REPOSITORY[-1]).read_text() == "changed"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "'' names no folder"),
        ("  ", "'  ' names no folder"),
        ("x" * 300, "neither a folder here"),
        ("a\x00b", "neither a folder here"),
        ("~no_such_user/x", "no such folder"),
        ("nothing://x/y", "nothing://x/y: Protocol not known"),
        ("model.gguf", "model.gguf is a file; needed: a folder with config.json and safetensors"),
    ],
)
def test_a_name_of_no_folder_ends_in_a_line(name, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").touch()
    line = how_it_ends(lambda: local_folder(name))
    assert line is not None and says in line


def test_a_folder_that_is_here_needs_no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_dpo_jax.huggingface.folders.snapshot_download", lambda *_, **__: pytest.fail("hub"))
    assert local_folder(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path.parent)
    assert local_folder(tmp_path.name) == Path(tmp_path.name)


def test_what_the_hub_does_not_give_is_named(monkeypatch):
    def refuse(*_, **__):
        raise OSError("401 for this repository")

    monkeypatch.setattr("lora_dpo_jax.huggingface.folders.snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match="'org/gated' is neither a folder here nor .*401"):
        local_folder("org/gated")


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c", "memory://nothing"])
def test_a_folder_that_is_nowhere_is_named(name, bucket):
    with pytest.raises(FileNotFoundError, match=f"{name}: no such folder"):
        local_folder(name)
