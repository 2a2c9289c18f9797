"""JSON lines by the key of their content, appended as they come: what a killed command did need not be done again."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_dpo_jax.judging.appended_lines import AppendedLines

KEY = "key"


class Record:
    """A file of JSON objects, each with a `key`. No other process writes it while this one has it open."""

    def __init__(self, path: Path, names: Collection[str]):
        """Each line has these `names`, with KEY among them.

        Raises ValueError that names the first other line, and OSError if another process has the file open. A process
        that was killed may have left a part of a line at the end, which is removed.
        """
        self.path, self._names = path, {*names}
        self._lines: dict[str, dict[str, Any]] = {}
        self._file = AppendedLines(path, self._take, busy="that writes it. Wait until it ends", foreign=self._not_mine)

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self._lines

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._lines[key]

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Appends those lines whose key is new. The operating system has them when this returns."""
        new = {line[KEY]: dict(line) for line in lines if line[KEY] not in self._lines}
        # With escapes, because half of a surrogate pair has no bytes.
        self._file.append("".join(json.dumps(line) + "\n" for line in new.values()).encode())
        self._lines |= new

    def _take(self, number: int, text: bytes) -> None:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._not_mine(number) from error
        if not isinstance(line, dict) or {*line} != self._names or not isinstance(line[KEY], str):
            raise self._not_mine(number)
        self._lines[line[KEY]] = line

    def _not_mine(self, number: int) -> ValueError:
        return ValueError(f"{self.path}, line {number}: is not what this command writes. Choose another file")
