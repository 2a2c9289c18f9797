"""Where models come from, and how exports are put in place whole or not at all."""

import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import fsspec
from huggingface_hub import snapshot_download

MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "*.txt", "LICENSE*", "NOTICE*"]
TEMPLATES = "additional_chat_templates"  # where tokenizers keep all but the first of their chat templates
# Repositories hold more than the model in Hugging Face's format: other formats in folders, Mistral's own beside it.
# These patterns are of every folder but TEMPLATES: whose name has another letter, ends before its end, or goes on.
NOT_MODEL_FILES = [
    *(f"{TEMPLATES[:i]}[!{letter}]*/*" for i, letter in enumerate(TEMPLATES)),
    *(f"{TEMPLATES[:i]}/*" for i in range(1, len(TEMPLATES))),
    f"{TEMPLATES}?*/*",
    "consolidated*",
]
# An export without one of these is not whole: no reader takes it for a model or an adapter.
MARKERS = ("config.json", "adapter_config.json")


def local_folder(name_or_path: str | Path, *, revision: str | None = None, patterns: list[str] | None = None) -> Path:
    """The folder itself if it exists, else a copy of what a URL (gs://...) or a hub id names, downloaded once.

    `patterns` are the file names to fetch, of the folder itself and of its chat templates. Raises FileNotFoundError if
    there is no such thing.
    """
    name = str(name_or_path)
    if is_url(name):
        return _download(name, patterns or MODEL_FILES)
    if not name.strip():
        raise FileNotFoundError(f"{name!r} names no folder")
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):
        return path
    if os.path.isfile(path):
        raise FileNotFoundError(f"{name} is a file; needed: a folder with config.json and safetensors, or a hub id")
    if name.count("/") > 1 or name.startswith((".", "~", "/")):
        raise FileNotFoundError(f"{name}: no such folder")
    try:
        files = snapshot_download(
            name, revision=revision, allow_patterns=patterns or MODEL_FILES, ignore_patterns=NOT_MODEL_FILES
        )
    except Exception as error:  # of its HTTP client too
        raise FileNotFoundError(
            f"{name!r} is neither a folder here nor a repository that the Hugging Face hub gave: {error}"
        ) from error
    return Path(files)


def check_export_target(target: str | Path) -> None:
    """Raises FileExistsError where an export would: for runs that should fail before their work, not after."""
    if is_url(target):
        _remote_files(str(target))
        return
    target = Path(target).expanduser().absolute()
    if target.is_file():
        raise FileExistsError(f"{target} is a file; an export is a folder")
    _refuse_foreign_files(target, [child.name for child in _children(target) if child.is_file()])


@contextmanager
def export_folder(target: str | Path) -> Iterator[Path]:
    """Yields a local folder to write an export into; it is put at `target`, a path or a URL, when the block ends.

    A former export at `target` is replaced, subfolders stay. Raises FileExistsError if files of another kind are there.
    Only one process may export to a target at a time.
    """
    if not is_url(target):
        _clear_leftovers(Path(target).expanduser().absolute())
        with atomic_folder(Path(target)) as folder:
            yield folder
        return
    with tempfile.TemporaryDirectory() as folder:
        check_export_target(target)
        yield Path(folder)
        _upload(Path(folder), str(target))


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yields a new folder to write into; it takes `target`'s name only when the block ends without an error.

    A killed run leaves a `.tmp-*` or `.old-*` folder beside the target, never half an export. What was at `target` is
    treated as `export_folder` says.
    """
    target = target.expanduser().absolute()
    check_export_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".tmp-{target.name}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    former = target.parent / f".old-{target.name}-{uuid.uuid4().hex[:8]}"
    if target.exists():
        os.replace(target, former)
    os.replace(temporary, target)
    _give_subfolders(former, target)


def _give_subfolders(former: Path, target: Path) -> None:
    """Those of a former export go to the one that took its place; the rest of it is removed."""
    for child in _children(former):
        if child.is_dir() and not child.name.startswith((".tmp-", ".old-")) and not (target / child.name).exists():
            os.replace(child, target / child.name)
    shutil.rmtree(former, ignore_errors=True)


def _clear_leftovers(target: Path) -> None:
    """Of exports that were killed: what they had written goes, what they had moved away comes back."""
    for path in _children(target.parent):
        kind = re.fullmatch(rf"\.(tmp|old)-{re.escape(target.name)}-[0-9a-f]{{8}}", path.name)
        if kind is None:
            continue
        if kind[1] == "tmp":
            shutil.rmtree(path, ignore_errors=True)
        elif target.exists():
            _give_subfolders(path, target)
        else:
            os.replace(path, target)


def is_url(name_or_path: str | Path) -> bool:
    """Whether fsspec must fetch it: gs://, s3://, memory://, ..."""
    return "://" in str(name_or_path)


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _refuse_foreign_files(target: str | Path, names: list[str]) -> None:
    if names and not any(marker in names for marker in MARKERS):
        raise FileExistsError(
            f"{target} holds files, but none of {', '.join(MARKERS)}: it is no former export, so it is not replaced. "
            f"Choose another path. Found: {names[:5]}"
        )


def _download(url: str, patterns: list[str]) -> Path:
    try:
        return _fetched(url, patterns)
    except Exception as error:  # whatever the store's own client raises
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
    # Sizes, times and checksums are in the entries: a changed folder is another one.
    described = [url, *(str(sorted(entry.items())) for _, entry in sorted(wanted.items()))]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = cache / "lora_dpo_jax" / hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]
    if not target.exists():
        with atomic_folder(target) as folder:
            for name, entry in wanted.items():
                (folder / name).parent.mkdir(exist_ok=True)
                files.get_file(entry["name"], str(folder / name))
    return target


def _is_wanted(name: str, patterns: list[str]) -> bool:
    """As the hub's client decides."""
    return any(fnmatch(name, of) for of in patterns) and not any(fnmatch(name, of) for of in NOT_MODEL_FILES)


def _remote_files(url: str) -> list[str]:
    """Paths of the files at `url`; FileExistsError if they are no former export."""
    files, root = fsspec.core.url_to_fs(url)
    if not files.isdir(root):
        return []
    found = [entry["name"] for entry in files.ls(root, detail=True) if entry["type"] == "file"]
    _refuse_foreign_files(url, [PurePosixPath(path).name for path in found])
    return found


def _upload(folder: Path, url: str) -> None:
    """Replaces the files at `url`, the marker going first and coming last."""
    files, root = fsspec.core.url_to_fs(url)
    for path in sorted(_remote_files(url), key=lambda path: PurePosixPath(path).name not in MARKERS):
        files.rm_file(path)
    local = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in sorted(local, key=lambda path: path.name in MARKERS):
        remote = f"{root}/{path.relative_to(folder).as_posix()}"
        files.makedirs(remote.rpartition("/")[0], exist_ok=True)
        files.put_file(str(path), remote)
