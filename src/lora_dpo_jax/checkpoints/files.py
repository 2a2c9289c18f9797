"""Whether a checkpoint on disk is complete: a description, and checksums of all its files.

    step-<n>/
      checkpoint.json       the description, and the size and CRC-32 of every file below
      _METADATA, d/, ...    the arrays by name: see arrays.py

checkpoint.json is the last file to be written: a folder without it is an unfinished checkpoint. (In a bucket, where
folders are not renamed, Orbax writes commit_success.txt after it.)
"""

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath
from fsspec.config import conf as fsspec_settings

from lora_dpo_jax.files import size_and_crc32

DESCRIPTION = "checkpoint.json"
VERSION = 1  # increase it when the layout of the files changes
COMMITTED = "commit_success.txt"  # Orbax's marker of a finished checkpoint, where it renames no folder
UNCHECKED = ("_CHECKPOINT_METADATA", COMMITTED)  # Orbax writes them after checkpoint.json; no array depends on them
# Names directly in a checkpoint's folder. A half-deleted checkpoint still has some of them.
NAMES = (DESCRIPTION, *UNCHECKED, "_METADATA", "_sharding", "array_metadatas", "d", "manifest.ocdbt")
OURS = re.compile("|".join(map(re.escape, NAMES)) + r"|ocdbt\.process_\d+")

# Orbax does not write arrays through fsspec, so the listings that fsspec caches would miss them.
for protocol in ("gs", "gcs"):
    fsspec_settings.setdefault(protocol, {}).setdefault("use_listings_cache", False)


class DamagedCheckpointError(ValueError):
    """A checkpoint is not complete as it was written. The message names the fault."""


def describe(folder: epath.Path, description: Mapping[str, Any]) -> None:
    """Writes checkpoint.json, after all other files are written. `description` must serialize to JSON."""
    files = {
        path.relative_to(folder).as_posix(): size_and_crc32(path)
        for path in _files(folder)
        if path.name not in UNCHECKED
    }
    content = {"version": VERSION, "description": description, "files": files}
    (folder / DESCRIPTION).write_text(json.dumps({"checksum": _checksum_of_json(content), **content}, indent=1))


def read_description(folder: epath.Path) -> dict[str, Any]:
    """The description that `describe` wrote. Raises DamagedCheckpointError if it cannot be read."""
    return _read(folder)["description"]


def check_files(folder: epath.Path) -> None:
    """Reads all files of a checkpoint. Raises DamagedCheckpointError if one is not as it was written."""
    if folder.as_posix().startswith("gs://") and not (folder / COMMITTED).exists():
        raise DamagedCheckpointError(f"it has no {COMMITTED}, so it was not finished")
    for name, (size, checksum) in _read(folder)["files"].items():
        path = folder / name
        if not path.exists():
            raise DamagedCheckpointError(f"its file {name} is missing")
        found_size, found_checksum = size_and_crc32(path)
        if found_size != size:
            raise DamagedCheckpointError(f"its file {name} has {found_size:,} bytes, not {size:,}")
        if found_checksum != checksum:
            raise DamagedCheckpointError(f"the content of its file {name} has changed")


def refuse_foreign_files(folder: epath.Path) -> None:
    """Raises FileExistsError for a folder that is no checkpoint despite its name: a new checkpoint would replace it."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else [folder.name]
    if foreign := [name for name in names if not name.startswith(".") and not OURS.fullmatch(name)]:
        raise FileExistsError(
            f"{folder} holds what no checkpoint has ({', '.join(foreign[:5])}), and a checkpoint would replace it. Set "
            "trainer.checkpointer.base_path or trainer.id to others, or move it away"
        )


def _read(folder: epath.Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    if not path.exists():
        raise DamagedCheckpointError(f"it has no {DESCRIPTION}, so it was not finished")
    try:
        content = json.loads(path.read_text())
        if content.pop("checksum") != _checksum_of_json(content):
            raise ValueError("its checksum does not match")
        if content["version"] != VERSION:
            raise ValueError(f"it is of version {content['version']}, and this program reads {VERSION}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"its {DESCRIPTION} cannot be used: {error}") from error
    return content


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _checksum_of_json(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
