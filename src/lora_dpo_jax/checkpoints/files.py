"""Whether a checkpoint on disk is whole: what was said of it when it was written, and sums of all its files.

    step-<n>/
      checkpoint.json       the description, and the size and CRC-32 of every file below
      _METADATA, d/, ...    the arrays by name: see arrays.py

checkpoint.json is the last file to be written: a folder without it is half a checkpoint. (In a bucket, where nothing is
renamed, Orbax writes commit_success.txt after it.)
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
VERSION = 1  # raise it when the files get another layout
COMMITTED = "commit_success.txt"  # what Orbax takes no checkpoint without that has no folder of another name before
UNCHECKED = ("_CHECKPOINT_METADATA", COMMITTED)  # written by Orbax later still; no array depends on them
# What a checkpoint has right in its folder; of one that was deleted by half, something is left.
NAMES = (DESCRIPTION, *UNCHECKED, "_METADATA", "_sharding", "array_metadatas", "d", "manifest.ocdbt")
OURS = re.compile("|".join(map(re.escape, NAMES)) + r"|ocdbt\.process_\d+")

# Orbax writes arrays past fsspec, which would not see them in the listings that it keeps.
for protocol in ("gs", "gcs"):
    fsspec_settings.setdefault(protocol, {}).setdefault("use_listings_cache", False)


class DamagedCheckpointError(ValueError):
    """A checkpoint is not all of what was written; the message says where."""


def describe(folder: epath.Path, description: Mapping[str, Any]) -> None:
    """Writes checkpoint.json, when all other files are written. `description` must serialize to JSON."""
    files = {
        path.relative_to(folder).as_posix(): size_and_crc32(path)
        for path in _files(folder)
        if path.name not in UNCHECKED
    }
    content = {"version": VERSION, "description": description, "files": files}
    (folder / DESCRIPTION).write_text(json.dumps({"checksum": _checksum_of_json(content), **content}, indent=1))


def read_description(folder: epath.Path) -> dict[str, Any]:
    """What `describe` was given. Raises DamagedCheckpointError if it cannot be read."""
    return _read(folder)["description"]


def check_files(folder: epath.Path) -> None:
    """Reads all files of a checkpoint through. Raises DamagedCheckpointError if one is not as it was written."""
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
    """Raises FileExistsError for a folder that has the name of a checkpoint alone: a new one would replace it."""
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
            raise ValueError("its checksum is another")
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
