"""The list of an export's files, which lies in its folder. Only these files may ever be replaced.

    {"version": 1, "run": "20260801-120000-a1b2c3", "files": {"adapter_config.json": {"bytes": 731, "sha256": "..."}}}

A file that was changed later belongs to the user. Its size or SHA-256 (as `sha256sum` prints it) shows the change.
"""

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import fsspec

from lora_dpo_jax.files import sha256_of

MANIFEST = "lora_dpo_export.json"
VERSION = 1  # increase it when the layout of the file changes


@dataclass(frozen=True)
class Manifest:
    """The files of one export, by their paths in its folder."""

    run: str | None  # the id of the run that wrote it; None: a script
    files: Mapping[str, Mapping[str, Any]]  # `bytes` and `sha256` of each

    @staticmethod
    def of(folder: Path, run: str | None) -> "Manifest":
        """The manifest of all files in a local folder."""
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            described = list(threads.map(_described, paths))
        names = [path.relative_to(folder).as_posix() for path in paths]
        return Manifest(run, dict(zip(names, described, strict=True)))

    @staticmethod
    def read(store: fsspec.AbstractFileSystem, root: str) -> "Manifest | None":
        """The manifest in the folder `root`; None if there is none. Raises ValueError if it cannot be used."""
        path = f"{root}/{MANIFEST}"
        if not store.isfile(path):
            return None
        try:
            content = json.loads(store.cat_file(path))
            if content["version"] != VERSION:
                raise ValueError(f"it is of version {content['version']}, and this program reads {VERSION}")
            files = {
                str(name): {"bytes": int(x["bytes"]), "sha256": str(x["sha256"])}
                for name, x in content["files"].items()
            }
            if outside := [name for name in files if not _is_inside(name)]:
                raise ValueError(f"it names files outside of its folder: {outside[:5]}")
            return Manifest(content["run"], files)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"its {MANIFEST} cannot be used: {error}") from error

    def write(self, path: Path) -> None:
        path.write_text(json.dumps({"version": VERSION, "run": self.run, "files": self.files}, indent=1) + "\n")

    def split(self, store: fsspec.AbstractFileSystem, root: str) -> tuple[list[str], list[str]]:
        """(unchanged files, changed files) of those that still exist."""
        there = [name for name in self.files if store.exists(f"{root}/{name}")]
        changed = [name for name in there if not self._is_unchanged(store, root, name)]
        return [name for name in there if name not in changed], changed

    def _is_unchanged(self, store: fsspec.AbstractFileSystem, root: str, name: str) -> bool:
        path, wanted = f"{root}/{name}", self.files[name]
        if not store.isfile(path) or store.size(path) != wanted["bytes"]:
            return False
        with store.open(path, "rb") as file:
            return sha256_of(cast(BinaryIO, file)) == wanted["sha256"]


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": sha256_of(file)}


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts
