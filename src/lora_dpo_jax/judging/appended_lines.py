"""A file of lines that one process at a time appends to, each line in one write.

So a killed process loses at most the line that it was writing, and the next one drops what there is of it.
"""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

BEGINNING = b'{"key"'  # of each line, which is a JSON object


class AppendedLines:
    """Such a file, open and locked until it is closed."""

    def __init__(
        self, path: Path, take: Callable[[int, bytes], None], *, busy: str, foreign: Callable[[int], ValueError]
    ):
        """Calls take(number, line) for each whole line; it may raise.

        Raises OSError that ends with `busy` if another process has the file open. Raises `foreign(number)` if what
        follows the last whole line is no beginning of one.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._lock(busy)
            self._read(take, foreign)
        except BaseException:
            self.close()
            raise

    def append(self, content: bytes) -> None:
        """Whole lines. The operating system has them when this returns."""
        while content:  # a write may be short, as on a full disk
            content = content[os.write(self._descriptor, content) :]

    def close(self) -> None:
        os.close(self._descriptor)

    def _lock(self, busy: str) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(f"{self.path} is open in another process {busy}") from error

    def _read(self, take: Callable[[int, bytes], None], foreign: Callable[[int], ValueError]) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], start=1):
            take(number, line)
        if whole < len(content):
            if not BEGINNING.startswith(content[whole:][: len(BEGINNING)]):
                raise foreign(content.count(b"\n") + 1)
            os.ftruncate(self._descriptor, whole)
