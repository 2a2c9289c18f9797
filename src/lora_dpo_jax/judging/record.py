"""JSON lines by the key of their content, appended as they come: what a killed command did need not be done again."""

import fcntl
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

KEY = "key"


class Record:
    """A file of JSON objects, each with a `key`. No other process writes it while this one has it open."""

    def __init__(self, path: Path, names: Collection[str]):
        """Each line has these `names`, with KEY among them.

        Raises ValueError that names the first other line, and OSError if another process has the file open. A process
        that was killed may have left a part of a line at the end, which is removed.
        """
        self.path, self._names = path, {*names}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._lines = {line[KEY]: line for line in self._read()}
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *_) -> None:
        os.close(self._descriptor)

    def __contains__(self, key: str) -> bool:
        return key in self._lines

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._lines[key]

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Appends those lines whose key is new. The operating system has them when this returns."""
        new = {line[KEY]: dict(line) for line in lines if line[KEY] not in self._lines}
        # With escapes, because half of a surrogate pair has no bytes.
        content = "".join(json.dumps(line) + "\n" for line in new.values()).encode()
        while content:  # a write may be short, as on a full disk
            content = content[os.write(self._descriptor, content) :]
        self._lines |= new

    def _read(self) -> list[dict[str, Any]]:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(f"{self.path} is open in another process that writes it. Wait until it ends") from error
        content = self.path.read_bytes()
        size = content.rfind(b"\n") + 1
        lines = [self._line(number, text) for number, text in enumerate(content[:size].splitlines(), start=1)]
        if size < len(content):
            if not lines and not content.startswith(b'{"key"'[: len(content)]):
                raise self._not_mine(1)
            os.ftruncate(self._descriptor, size)
        return lines

    def _line(self, number: int, text: bytes) -> dict[str, Any]:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._not_mine(number) from error
        if not isinstance(line, dict) or {*line} != self._names or not isinstance(line[KEY], str):
            raise self._not_mine(number)
        return line

    def _not_mine(self, number: int) -> ValueError:
        return ValueError(f"{self.path}, line {number}: is not what this command writes. Choose another file")
