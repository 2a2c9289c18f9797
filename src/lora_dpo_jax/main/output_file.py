"""The JSON lines that `evaluate` and `generate` write: whole or not at all, and never over an input."""

import json
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import fsspec

from lora_dpo_jax.files import replace_file
from lora_dpo_jax.places import is_url, leads_nowhere, parent_of, place_of, same_place
from lora_dpo_jax.runs.outputs import check_writable

STREAMS = ("/dev/std", "/dev/fd/", "/proc/")  # beginnings of names of pipes, and of files that a shell opened
LONGEST_LINE = 2**24  # bytes; the first line of a file that is no output may be the whole file


def check_output(
    output: str, *, lines: Iterable[Iterable[str]], inputs: Mapping[str, Iterable[str]], setting: str = "output"
) -> None:
    """Raises OSError if `output` cannot be written, or if that would replace anything other than a former output.

    `lines`: the keys of a line, in each of its forms. `inputs`: the files that the command reads, by setting.
    `setting`: the one that names `output`.
    """
    if not output.strip() or (not is_url(output) and Path(place_of(output)).is_dir()):
        raise IsADirectoryError(f"{setting}={output!r} is no file; name a .jsonl file")
    for source, files in inputs.items():
        if any(same_place(output, file) for file in files):
            raise FileExistsError(f"{setting}={output!r} would replace a file of {source}. Choose another file")
    if _is_stream(output):
        return
    check_writable(setting, output if leads_nowhere(output) else parent_of(output))
    if not _may_be_replaced(place_of(output), [set(keys) for keys in lines]):
        raise FileExistsError(
            f"{setting}={output!r} exists and is not what this command writes, so it is not replaced. Choose another "
            "file"
        )


def write_output(output: str, lines: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line. A former output stays until all lines are written."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    content = text.encode("utf-8", "backslashreplace")  # half a surrogate pair becomes its JSON escape
    place = place_of(output)
    if is_url(place):
        store, path = fsspec.core.url_to_fs(place)
        store.pipe_file(path, content)
    elif _is_stream(output):
        with Path(output).open("ab") as stream:
            stream.write(content)
    else:
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        replace_file(Path(place), content)


def _is_stream(output: str) -> bool:
    """Whether it is a pipe or a device, which is written to directly."""
    if is_url(output) or not os.path.exists(output):
        return False
    return output.startswith(STREAMS) or not stat.S_ISREG(os.stat(output).st_mode)


def _may_be_replaced(place: str, lines: list[set[str]]) -> bool:
    """Whether nothing is there, or an empty file, or lines like those that will be written."""
    store, path = fsspec.core.url_to_fs(place)
    if not store.exists(path):
        return True
    if not is_url(place) and not os.access(place, os.W_OK):
        return False
    with store.open(path, "rb") as file:
        first = file.readline(LONGEST_LINE)
    try:
        return not first or set(json.loads(first)) in lines
    except (ValueError, TypeError, RecursionError):
        return False
