"""Files and folders that are whole or absent whenever a process ends, checksums of files, and the folder of caches."""

import hashlib
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from etils import epath

BLOCK_BYTES = 2**24
LITTER_SECONDS = 24 * 3600


def replace_file(path: Path, content: bytes) -> None:
    """Writes the content to another file beside `path`, then renames it. A former file stays until then.

    The mode of a former file is kept. If the content cannot be written in full, raises OSError and leaves no file.
    """
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_bytes(content)
        with suppress(FileNotFoundError):
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(target: Path, *, is_whole: Callable[[Path], bool] = Path.is_dir) -> Iterator[Path]:
    """Yields a folder to write into. It takes the name of `target` when the block ends without an error.

    A folder that another process has put there meanwhile stays if it `is_whole`, and is replaced if not. A killed
    process leaves a folder `.building-*` beside `target`; a day later, the next call with this parent removes it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_litter(target.parent)
    building = target.parent / f".building-{uuid.uuid4().hex}"
    building.mkdir()
    try:
        yield building
        _put_in_place(building, target, is_whole)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _put_in_place(building: Path, target: Path, is_whole: Callable[[Path], bool]) -> None:
    try:
        building.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        if is_whole(target):
            return
        damaged = building.with_suffix(".damaged")
        target.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
        building.rename(target)


def _remove_litter(parent: Path) -> None:
    """Removes folders that killed processes left. A process that is still writing has written within a day."""
    for building in parent.glob(".building-*"):
        try:
            last_write = max(path.stat().st_mtime for path in (building, *building.rglob("*")))
        except OSError:  # its process has just renamed or removed it
            continue
        if time.time() - last_write > LITTER_SECONDS:
            shutil.rmtree(building, ignore_errors=True)


def size_and_crc32(path: Path | epath.Path) -> tuple[int, int]:
    """The number of bytes in a file, and their CRC-32."""
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return size, checksum


def sha256_of(file: BinaryIO) -> str:
    """The hex digest of an open file's bytes, as `sha256sum` prints it."""
    return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]


def cache_folder(cache_dir: str | os.PathLike | None = None) -> Path:
    """The folder of all caches: `cache_dir`, which is the setting `data.cache_dir`, or the default one."""
    return Path(cache_dir or default_cache_dir()).expanduser()


def default_cache_dir() -> Path:
    """$LORA_DPO_JAX_CACHE, or lora_dpo_jax in the user's cache folder."""
    if explicit := os.environ.get("LORA_DPO_JAX_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_dpo_jax"
