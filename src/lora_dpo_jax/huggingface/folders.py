"""Where models are loaded from, and how exports are written as a whole or not at all."""

import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import fsspec
from huggingface_hub import is_offline_mode, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from lora_dpo_jax.files import cache_folder, new_folder
from lora_dpo_jax.huggingface.manifest import MANIFEST, Manifest
from lora_dpo_jax.places import is_url, place_of, spelled_alike

MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "*.txt", "LICENSE*", "NOTICE*"]
MODEL_FILES += ["README.md"]  # the card, which states the license
TEMPLATES = "additional_chat_templates"  # where tokenizers keep all but the first of their chat templates
# Repositories hold more than the model in Hugging Face's format: other formats in folders, Mistral's own beside it.
# These patterns match every folder but TEMPLATES: names with another letter, shorter names, longer names.
NOT_MODEL_FILES = [
    *(f"{TEMPLATES[:i]}[!{letter}]*/*" for i, letter in enumerate(TEMPLATES)),
    *(f"{TEMPLATES[:i]}/*" for i in range(1, len(TEMPLATES))),
    f"{TEMPLATES}?*/*",
    "consolidated*",
]
# An export without one of these is incomplete: no reader accepts it as a model or an adapter.
MARKERS = ("config.json", "adapter_config.json")


def local_folder(name_or_path: str | Path, *, revision: str | None = None, patterns: list[str] | None = None) -> Path:
    """The folder itself if it exists, else a local copy of a URL (gs://...) or a hub id, downloaded once.

    `patterns` are the names of the files to download, with those of its chat templates. Raises FileNotFoundError if
    there is no such folder, URL or id.
    """
    name = str(name_or_path)
    if is_url(name):
        return _download(name, patterns or MODEL_FILES)
    if not name.strip():
        raise FileNotFoundError(f"{name!r} names no folder")
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):
        if not os.listdir(path):
            raise FileNotFoundError(
                f"{name} is an empty folder. Copy or download the files into it, or name another folder or a hub id"
            )
        return path
    if os.path.isfile(path):
        raise FileNotFoundError(f"{name} is a file; needed: a folder with config.json and safetensors, or a hub id")
    if name.count("/") > 1 or name.startswith((".", "~", "/")):
        raise FileNotFoundError(f"{name}: no such folder{spelled_alike(name)}")
    try:
        files = snapshot_download(
            name, revision=revision, allow_patterns=patterns or MODEL_FILES, ignore_patterns=NOT_MODEL_FILES
        )
    except Exception as error:  # also any error of the HTTP client
        raise FileNotFoundError(f"{_why_not_from_the_hub(name, error)}{spelled_alike(name)}") from error
    return Path(files)


def _why_not_from_the_hub(name: str, error: Exception) -> str:
    if is_offline_mode() and isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return (
            f"{name!r} is neither a folder here nor in the local cache of the Hugging Face hub, and HF_HUB_OFFLINE=1 "
            "forbids asking the hub: check the id, or unset HF_HUB_OFFLINE"
        )
    return f"{name!r} is neither a folder here nor a repository that the Hugging Face hub returned: {error}"


def check_export_target(target: str | Path, *, run: str | None = None, overwrite: bool = False) -> None:
    """Raises FileExistsError if an export of `run` would, so that a run fails before its work, not after it."""
    _replaceable(place_of(target), run, overwrite)


@contextmanager
def export_folder(target: str | Path, *, run: str | None = None, overwrite: bool = False) -> Iterator[Path]:
    """Yields a local folder to write an export into. At the end of the block, its files move to `target`, path or URL.

    A manifest beside the files lists them. Only unchanged files in a manifest are replaced: those of an export of the
    same `run` (None is never the same), and with `overwrite` those of another run. Any other file at `target` raises
    FileExistsError; hidden files and subfolders stay as they are. A new folder appears as a whole. In an existing
    folder, config.json or adapter_config.json is written last. Only one process may export to a target at a time.
    """
    place = place_of(target)  # links are followed: the files go to the folder that they lead to
    former = _replaceable(place, run, overwrite)
    with _temporary_folder(place, run) as folder:
        yield folder
        _put_in_place(folder, place, former, run)


def _replaceable(place: str, run: str | None, overwrite: bool) -> list[str]:
    """The files of a former export that a new one replaces, as paths in its folder. May raise FileExistsError."""
    store, root = fsspec.core.url_to_fs(place)
    store.invalidate_cache(root)
    if store.isfile(root):
        raise FileExistsError(f"{place} is a file; an export is a folder")
    names = _file_names(store, root)
    advice = "Move them away, or choose another path"
    try:
        manifest = Manifest.read(store, root)
    except ValueError as error:
        raise FileExistsError(f"{place} is no export that can be replaced: {error}. {advice}") from error
    if manifest is None:
        if names:
            raise FileExistsError(
                f"{place} is no former export, as it has no {MANIFEST} (those of earlier versions had none), so its "
                f"files are not replaced: {_some(names)}. {advice}"
            )
        return []
    if not overwrite and (run is None or manifest.run != run):
        writer = "a script" if manifest.run is None else f"the run {manifest.run!r}"
        raise FileExistsError(
            f"{place} holds the export of {writer}, and this is another run. Choose another path, or set overwrite to "
            "true to replace it (to resume that run, set trainer.id to its id)"
        )
    if foreign := [name for name in names if name not in (MANIFEST, *manifest.files)]:
        raise FileExistsError(
            f"{place} holds files beside a former export that it did not write: {_some(foreign)}. {advice}"
        )
    former, changed = manifest.split(store, root)
    if changed:
        raise FileExistsError(f"{place} holds a former export that was changed since: {_some(changed)}. {advice}")
    return former


def _file_names(store: fsspec.AbstractFileSystem, root: str) -> list[str]:
    """The names of the files directly in a folder, except hidden ones, which no reader of models uses."""
    if not store.isdir(root):
        return []
    # Some stores list a folder as an empty file inside itself.
    paths = [x["name"].rstrip("/") for x in store.ls(root, detail=True) if x["type"] != "directory"]
    names = {PurePosixPath(path).name for path in paths if path != root and not store.isdir(path)}
    return sorted(name for name in names if not name.startswith("."))


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@contextmanager
def _temporary_folder(place: str, run: str | None) -> Iterator[Path]:
    """A temporary local folder to write an export in. It is always removed, unless the process is killed."""
    if is_url(place):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    target = Path(place)
    made = [path for path in (target, *target.parents) if not path.exists()]
    # The name depends on the run's, so that a resumed run removes what a killed process left.
    name = (uuid.uuid4().hex if run is None else hashlib.sha256(run.encode()).hexdigest())[:12]
    beside, inside = target.parent / f".tmp-{target.name}-{name}", target / f".tmp-{name}"
    folder = inside if target.exists() else beside  # the parent folder may be on another disk
    try:
        for left in (beside, inside):
            shutil.rmtree(left, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # after a successful export they are not empty
            for path in made:
                if path.exists():
                    path.rmdir()


def _put_in_place(folder: Path, place: str, former: list[str], run: str | None) -> None:
    """Moves or uploads the files in `folder`. The former export's marker is removed first, the new one written last.

    Whenever a process is killed, the manifest at `place` lists all files of an export there.
    """
    store, root = fsspec.core.url_to_fs(place)
    store.invalidate_cache(root)
    manifest = Manifest.of(folder, run)
    if taken := [name for name in manifest.files if name not in former and store.lexists(f"{root}/{name}")]:
        raise FileExistsError(f"{place} has got files meanwhile that this export would replace: {_some(taken)}")
    manifest.write(folder / MANIFEST)
    if not is_url(place) and not os.path.lexists(place):
        os.rename(folder, place)
        return
    for name in sorted(former, key=lambda name: name not in MARKERS):
        store.rm_file(f"{root}/{name}")
    for name in [MANIFEST, *sorted(manifest.files, key=lambda name: name in MARKERS)]:
        store.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
        if is_url(place):
            store.put_file(str(folder / name), f"{root}/{name}")
        else:
            os.replace(folder / name, f"{root}/{name}")


def _download(url: str, patterns: list[str]) -> Path:
    try:
        return _fetched(url, patterns)
    except Exception as error:  # any error of the store's own client
        raise FileNotFoundError(f"{url}: {error}") from error


def _fetched(url: str, patterns: list[str]) -> Path:
    files, root = fsspec.core.url_to_fs(url)
    if not files.isdir(root):
        raise FileNotFoundError("no such folder")
    entries = {PurePosixPath(entry["name"]).name: entry for entry in files.ls(root, detail=True)}
    if entries.get(TEMPLATES, {}).get("type") == "directory":
        templates = files.ls(entries[TEMPLATES]["name"], detail=True)
        entries |= {f"{TEMPLATES}/{PurePosixPath(entry['name']).name}": entry for entry in templates}
    wanted = {name: entry for name, entry in entries.items() if entry["type"] == "file" and _is_wanted(name, patterns)}
    # The entries hold sizes, times and checksums, so a changed folder is downloaded again.
    described = [url, *(str(sorted(entry.items())) for _, entry in sorted(wanted.items()))]
    target = cache_folder() / hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]
    if not target.exists():
        with new_folder(target) as folder:
            for name, entry in wanted.items():
                (folder / name).parent.mkdir(exist_ok=True)
                files.get_file(entry["name"], str(folder / name))
    return target


def _is_wanted(name: str, patterns: list[str]) -> bool:
    """The same decision as the hub's client makes."""
    return any(fnmatch(name, of) for of in patterns) and not any(fnmatch(name, of) for of in NOT_MODEL_FILES)
