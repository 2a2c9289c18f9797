"""Digests of the files that hold a model's or an adapter's tensors: different tensors have different digests.

A file is read once. Its digest is then stored with its path, size, modification time and inode. While all four are the
same, the content is assumed to be the same.
"""

import hashlib
import json
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lora_dpo_jax.files import replace_file
from lora_dpo_jax.huggingface.tensors import TensorFiles

CHUNK_BYTES = 2**24
# A file changed so recently may change again within the resolution of its modification time.
SETTLED_SECONDS = 2.0


def tensor_digests(folder: Path, stem: str = "model", *, memory: Path) -> dict[str, str]:
    """The digests of the files that `TensorFiles(folder, stem)` reads, by file name. `memory` is their folder."""
    return {path.name: file_digest(path, memory=memory) for path in TensorFiles(folder, stem).files}


def file_digest(path: Path, *, memory: Path) -> str:
    """The hex digest of a file's content alone."""
    before = _state(path)
    remembered = memory / f"{hashlib.sha256(before['path'].encode()).hexdigest()[:32]}.json"
    try:
        known = json.loads(remembered.read_text(encoding="utf-8"))
        if known["file"] == before:
            return known["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no stored digest, or a damaged one: the file itself is read
    digest = _digest(path)
    is_settled = time.time_ns() - before["mtime_ns"] > SETTLED_SECONDS * 1e9
    if is_settled and _state(path) == before:
        memory.mkdir(parents=True, exist_ok=True)
        replace_file(remembered, json.dumps({"file": before, "digest": digest}).encode())
    return digest


def _state(path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {
        "path": str(path.resolve()),
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "inode": stat.st_ino,
    }


def _digest(path: Path) -> str:
    """SHA-256 of the SHA-256s of its chunks, which threads compute in parallel."""
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        memoryview(content) as view,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads,
    ):

        def chunk_digest(start: int) -> bytes:
            with view[start : start + CHUNK_BYTES] as chunk:
                return hashlib.sha256(chunk).digest()

        digests = threads.map(chunk_digest, range(0, len(view), CHUNK_BYTES))
        return hashlib.sha256(b"".join(digests)).hexdigest()
