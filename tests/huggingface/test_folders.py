"""Models come from folders, URLs and the hub; exports go in place whole, and over nothing that no run wrote."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest
from hostile_values import how_it_ends
from huggingface_hub.utils import filter_repo_objects

from lora_dpo_jax.huggingface.folders import check_export_target, export_folder, local_folder
from lora_dpo_jax.runs.base import TOKENIZER_FILES


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


SCHEMES = pytest.mark.parametrize("scheme", ["", "memory://"])
RUN = "a-run"


def listing(target: str | Path) -> dict[str, bytes]:
    """All files below a path or URL, with their bytes."""
    store, root = fsspec.core.url_to_fs(str(target))
    store.invalidate_cache()
    return {path.removeprefix(root): store.cat_file(path) for path in store.find(root)} if store.exists(root) else {}


def put(url: str, text: str) -> None:
    with fsspec.open(url, "w", auto_mkdir=True) as file:
        file.write(text)


def export(target: str | Path, run: str | None = RUN, *, overwrite: bool = False, **files: str) -> None:
    with export_folder(target, run=run, overwrite=overwrite) as folder:
        write_export(folder, **files)


@SCHEMES
def test_a_run_replaces_its_own_export_and_keeps_subfolders(scheme, bucket, tmp_path):
    target = scheme + str(tmp_path / "out")
    for place in (target, f"{target}/step-10"):
        export(place, config__json="old", stale__safetensors="old")
    put(f"{target}/notes/mine.txt", "of the user")
    export(target, config__json="new", new__safetensors="new")
    found = listing(target)
    assert json.loads(found.pop("/lora_dpo_export.json"))["files"].keys() == {"config.json", "new.safetensors"}
    assert json.loads(found.pop("/step-10/lora_dpo_export.json"))["run"] == RUN
    assert found == {
        "/config.json": b"new",
        "/new.safetensors": b"new",
        "/step-10/config.json": b"old",
        "/step-10/stale.safetensors": b"old",
        "/notes/mine.txt": b"of the user",
    }


@SCHEMES
@pytest.mark.parametrize("writer, other", [("first", "second"), ("first", None), (None, None)])
def test_the_export_of_another_run_is_replaced_if_asked_alone(scheme, bucket, tmp_path, writer, other):
    target = scheme + str(tmp_path / "out")
    export(target, writer, config__json="theirs")
    before = listing(target)
    named = "a script" if writer is None else f"the run '{writer}'"
    with pytest.raises(FileExistsError, match=f"holds the export of {named}, .*set overwrite to true to replace it"):
        export(target, other, config__json="ours")
    assert listing(target) == before
    export(target, other, overwrite=True, config__json="ours")
    assert listing(target)["/config.json"] == b"ours"


def test_a_manifest_says_what_sha256sum_says(tmp_path):
    export(tmp_path / "out", config__json="{}", model__safetensors="")
    (tmp_path / "out" / "sub").mkdir()
    written = json.loads((tmp_path / "out" / "lora_dpo_export.json").read_text())["files"]
    sums = [f"{entry['sha256']}  {name}" for name, entry in written.items()]
    check = subprocess.run(
        ["sha256sum", "-c"], input="\n".join(sums), text=True, cwd=tmp_path / "out", capture_output=True
    )
    assert check.returncode == 0 and check.stdout.count(": OK") == 2


def foreign_model(target: str) -> None:
    """As users have them, with the file by which readers know a model."""
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        put(f"{target}/{name}", "of the user")


def foreign_adapter(target: str) -> None:
    put(f"{target}/adapter_config.json", "of an earlier version")


def thesis(target: str) -> None:
    put(f"{target}/chapter1.tex", "dear reader")


def export_with_notes(target: str) -> None:
    export(target, config__json="{}")
    put(f"{target}/notes.txt", "of the user")


def export_that_was_edited(target: str) -> None:
    export(target, config__json="{}", README__md="card")
    put(f"{target}/README.md", "CARD")  # of the same length


def export_without_manifest(target: str) -> None:
    export(target, config__json="{}")
    store, root = fsspec.core.url_to_fs(target)
    store.rm_file(f"{root}/lora_dpo_export.json")


def export_with_broken_manifest(target: str) -> None:
    export(target, config__json="{}")
    put(f"{target}/lora_dpo_export.json", "{")


def manifest_that_leads_out(target: str) -> None:
    put(f"{target.rpartition('/')[0]}/letter.txt", "dear")
    digest = hashlib.sha256(b"dear").hexdigest()
    files = {"../letter.txt": {"bytes": 4, "sha256": digest}}
    put(f"{target}/lora_dpo_export.json", json.dumps({"version": 1, "run": RUN, "files": files}))


FOREIGN = {
    foreign_model: "is no former export, as it has no lora_dpo_export.json .*config.json, model.safetensors",
    foreign_adapter: r"\(those of earlier versions had none\), so its files are not replaced: adapter_config.json",
    thesis: "is no former export.*chapter1.tex. Move them away, or choose another path",
    export_with_notes: "holds files beside a former export that it did not write: notes.txt",
    export_that_was_edited: "holds a former export that was changed since: README.md",
    export_without_manifest: "is no former export.*config.json",
    export_with_broken_manifest: "its lora_dpo_export.json cannot be used",
    manifest_that_leads_out: r"names files outside of its folder: \['../letter.txt'\]",
}


@SCHEMES
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("fill", FOREIGN, ids=lambda fill: fill.__name__)
def test_what_no_run_wrote_is_never_replaced(scheme, bucket, tmp_path, fill, overwrite):
    target = scheme + str(tmp_path / "home" / "out")
    fill(target)
    before = listing(scheme + str(tmp_path))
    for attempt in (
        lambda: check_export_target(target, run=RUN, overwrite=overwrite),
        lambda: export(target, overwrite=overwrite, config__json="new"),
    ):
        with pytest.raises(FileExistsError, match=FOREIGN[fill]):
            attempt()
    assert listing(scheme + str(tmp_path)) == before


@SCHEMES
def test_files_that_come_during_an_export_are_not_replaced(scheme, bucket, tmp_path):
    target = scheme + str(tmp_path / "out")
    with pytest.raises(FileExistsError, match="has got files meanwhile that this export would replace: config.json"):
        with export_folder(target, run=RUN) as folder:
            write_export(folder, config__json="ours")
            put(f"{target}/config.json", "theirs")
    assert listing(target) == {"/config.json": b"theirs"}


@SCHEMES
def test_hidden_files_and_empty_folders_are_in_nobodys_way(scheme, bucket, tmp_path):
    target = scheme + str(tmp_path / "out")
    put(f"{target}/.gitkeep", "")
    export(target, config__json="{}")
    assert listing(target).keys() == {"/.gitkeep", "/config.json", "/lora_dpo_export.json"}


@SCHEMES
def test_a_file_is_no_place_for_an_export(scheme, bucket, tmp_path):
    put(f"{scheme}{tmp_path}/out", "a letter")
    with pytest.raises(FileExistsError, match="out is a file; an export is a folder"):
        export(f"{scheme}{tmp_path}/out", config__json="{}")
    assert listing(scheme + str(tmp_path)) == {"/out": b"a letter"}


@SCHEMES
def test_a_failed_export_leaves_the_former_one(scheme, bucket, tmp_path):
    target = scheme + str(tmp_path / "out")
    export(target, config__json="whole")
    before = listing(scheme + str(tmp_path))
    with pytest.raises(RuntimeError, match="disk full"), export_folder(target, run=RUN) as folder:
        write_export(folder, config__json="half")
        raise RuntimeError("disk full")
    assert listing(scheme + str(tmp_path)) == before


def test_a_failed_export_leaves_no_folder_that_was_not_there(tmp_path):
    with pytest.raises(RuntimeError), export_folder(tmp_path / "a" / "b" / "out", run=RUN) as folder:
        write_export(folder, config__json="half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def other_disk(tmp_path, monkeypatch):
    """A folder that nothing can be renamed into from elsewhere: on a tmpfs where there is one."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for name in ("rename", "replace"):
            move = getattr(os, name)

            def on_one_disk(source, target, move=move):
                if str(source).startswith(folder) != str(target).startswith(folder):
                    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
                move(source, target)

            monkeypatch.setattr(os, name, on_one_disk)
        yield Path(folder)


@pytest.mark.parametrize("is_there", [True, False], ids=["to a folder", "to nothing yet"])
def test_an_export_through_a_link_is_written_behind_it_on_whatever_disk(other_disk, tmp_path, is_there):
    behind, link = other_disk / "behind", tmp_path / "out"
    if is_there:
        behind.mkdir()
    link.symlink_to(behind)
    for text in ("old", "new"):
        export(link, config__json=text)
        assert link.is_symlink() and listing(behind)["/config.json"] == text.encode()
    with pytest.raises(RuntimeError), export_folder(f"{link}/", run=RUN) as folder:
        write_export(folder, config__json="half")
        raise RuntimeError
    assert listing(behind).keys() == {"/config.json", "/lora_dpo_export.json"}
    assert [path.name for path in [*tmp_path.iterdir(), *other_disk.iterdir()]] == ["out", "behind"]


def test_a_link_beside_an_export_is_not_followed_when_it_is_replaced(tmp_path):
    """A user may move a large file elsewhere and leave a link to it."""
    target, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    export(target, config__json="{}", model__safetensors="weights")
    os.replace(target / "model.safetensors", elsewhere)
    (target / "model.safetensors").symlink_to(elsewhere)
    export(target, config__json="{}", model__safetensors="new")
    assert elsewhere.read_text() == "weights" and (target / "model.safetensors").read_text() == "new"


def test_a_killed_export_leaves_nothing_at_its_target(tmp_path):
    program = f"""
import os
from lora_dpo_jax.huggingface.folders import export_folder
with export_folder({str(tmp_path / "out")!r}, run={RUN!r}) as folder:
    (folder / "config.json").write_text("half")
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 9
    assert not (tmp_path / "out").exists()
    assert [path.name.startswith(".tmp-out-") for path in tmp_path.iterdir()] == [True]
    export(tmp_path / "out", config__json="new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moves", range(5))
def test_an_export_that_was_killed_while_it_was_put_in_place_is_mended_by_the_next(moves, tmp_path):
    """It removes config.json, then the weights; then it puts the manifest, the weights and config.json."""
    target = tmp_path / "out"
    for place in (target, target / "step-2"):
        export(place, config__json="old", model__safetensors="old")
    before, made = listing(target / "step-2"), 0

    def until_killed(move):
        def moves_or_dies(*paths):
            nonlocal made
            if made == moves:
                raise Killed
            move(*paths)
            made += 1

        return moves_or_dies

    with pytest.MonkeyPatch.context() as patch, suppress(Killed):
        with export_folder(target, run=RUN) as folder:
            write_export(folder, config__json="new", model__safetensors="new")
            for name in ("replace", "remove"):
                patch.setattr(os, name, until_killed(getattr(os, name)))
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # who is killed cleans nothing up
    assert made == moves
    assert (target / "config.json").exists() == (moves == 0), "what a reader would take for a model is one"
    with pytest.raises(FileExistsError, match="the run 'a-run', and this is another run"):
        check_export_target(target, run="another")
    export(target, config__json="newer")
    found = listing(target)
    assert found["/config.json"] == b"newer"
    assert found.keys() == {"/config.json", "/lora_dpo_export.json", *(f"/step-2{name}" for name in before)}
    assert listing(target / "step-2") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_upload_ends_with_the_file_that_makes_it_whole(bucket, monkeypatch):
    written, removed = [], []
    put, rm = type(bucket).put_file, type(bucket).rm_file
    monkeypatch.setattr(
        type(bucket), "put_file", lambda self, a, b, **k: (written.append(b.rpartition("/")[2]), put(self, a, b, **k))
    )
    monkeypatch.setattr(type(bucket), "rm_file", lambda self, a: (removed.append(a.rpartition("/")[2]), rm(self, a)))
    for _ in range(2):
        export("memory://bucket/out", adapter_config__json="x", adapter_model__safetensors="x", tokenizer__json="x")
    assert written[0] == written[4] == "lora_dpo_export.json"  # whatever is there is named by it
    assert written[3] == written[7] == "adapter_config.json"
    assert removed[0] == "adapter_config.json" and len(removed) == 3


def test_a_url_is_downloaded_once_and_again_when_it_changes(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_DPO_JAX_CACHE", str(tmp_path))
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
    monkeypatch.setenv("LORA_DPO_JAX_CACHE", str(tmp_path))
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
    (tmp_path / "config.json").touch()
    assert local_folder(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path.parent)
    assert local_folder(tmp_path.name) == Path(tmp_path.name)


def test_what_the_hub_does_not_give_is_named(monkeypatch):
    def refuse(*_, **__):
        raise OSError("401 for this repository")

    monkeypatch.setattr("lora_dpo_jax.huggingface.folders.snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match="'org/gated' is neither a folder here nor .*401"):
        local_folder("org/gated")


@pytest.mark.parametrize("name", ["org/model", "no_such_model"])
def test_what_the_hub_may_not_be_asked_for_is_told_so(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    told = (
        f"'{name}' is neither a folder here nor in the local cache of the Hugging Face hub, and HF_HUB_OFFLINE=1 "
        "forbids asking the hub: check the id, or unset HF_HUB_OFFLINE"
    )
    with pytest.raises(FileNotFoundError, match=f"^{told}$"):
        local_folder(name)


def test_an_empty_folder_is_told_what_it_needs(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path} is an empty folder. Copy or download the files into it"):
        local_folder(tmp_path)


def test_a_folder_with_a_typo_is_told_the_name_that_is_there(tmp_path, monkeypatch):
    (tmp_path / "out" / "adapter").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=rf"no such folder; did you mean {tmp_path}/out/adapter\?$"):
        local_folder(tmp_path / "out" / "adaptr")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"neither a folder here .*; did you mean out/adapter\?$"):
        local_folder("out/adaptr")


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c", "memory://nothing"])
def test_a_folder_that_is_nowhere_is_named(name, bucket):
    with pytest.raises(FileNotFoundError, match=f"{name}: no such folder"):
        local_folder(name)
