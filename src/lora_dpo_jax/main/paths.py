"""Settings that are places: what no file system takes is an error before anything is read or written."""

import os
from collections.abc import Mapping
from pathlib import Path

LONGEST_NAME, LONGEST_PATH = 255, 4096  # bytes; Linux's


def refuse_impossible_paths(settings: Mapping[str, str | None]) -> None:
    """Raises ValueError that names the setting. They are paths, URLs or hub ids, by name; None where one is not set."""
    for setting, path in settings.items():
        if path is None or "://" in path:
            continue
        try:
            whole = Path(path).expanduser()
        except RuntimeError as error:
            raise ValueError(f"{setting}={path!r}: {path.split('/')[0]} is no user of this machine") from error
        if any(len(os.fsencode(part)) > LONGEST_NAME for part in whole.parts) or len(os.fsencode(whole)) > LONGEST_PATH:
            raise ValueError(f"{setting}={path[:40]!r}... is too long for a path")
