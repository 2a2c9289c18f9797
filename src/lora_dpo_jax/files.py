"""Files that are whole or absent, whenever a process ends."""

import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Writes the content under another name beside `path`, then puts it there. A former file stays until then.

    Its mode is kept. Raises OSError and leaves nothing behind if the content cannot be written in full.
    """
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_bytes(content)
        with suppress(FileNotFoundError):
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
