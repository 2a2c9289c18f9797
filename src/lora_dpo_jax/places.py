"""Places, which are paths or URLs: one spelling for each, so two names of one folder never count as two folders."""

import difflib
import itertools
import os
import posixpath
from collections.abc import Mapping
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

MOST_NAMES = 10_000  # so many names of a folder, at most, are compared with a missing one
LONGEST_NAME, LONGEST_PATH = 255, 4096  # bytes; Linux's


def is_url(path: str | Path) -> bool:
    """Whether fsspec must fetch it: gs://, s3://, memory://, ..."""
    return "://" in str(path)


def place_of(path: str | Path) -> str:
    """One spelling for all names of a path or URL: `out`, `./out/`, `out/../out` and links to it have the same.

    A path (also given as file://) becomes absolute, with its links followed; it need not exist. Contacts no store.
    """
    text = str(path)
    if not is_url(text):
        return os.path.realpath(os.path.expanduser(text))
    protocol, _, rest = text.partition("://")
    try:
        store = fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError):  # reported when something is written there
        return f"{protocol}://{posixpath.normpath(rest)}"
    if issubclass(store, LocalFileSystem):
        return os.path.realpath(store._strip_protocol(text))
    rest = str(store._strip_protocol(text)).strip("/")
    if is_url(rest):  # a web address, of which the protocol is a part
        return rest
    names = (store.protocol,) if isinstance(store.protocol, str) else store.protocol  # gs and gcs are one store
    return f"{names[0]}://{posixpath.normpath(rest) if rest else ''}"


def same_place(one: str | Path, other: str | Path) -> bool:
    """Whether two paths or URLs name one file or folder, or will when it is made."""
    one, other = place_of(one), place_of(other)
    try:
        # samefile also covers bind mounts, and names that differ only in case on a disk that ignores case.
        return one == other or os.path.samefile(one, other)
    except (OSError, ValueError):  # one of them is not there, or is a URL
        return False


def is_within(inner: str | Path, outer: str | Path) -> bool:
    """Whether `inner` is `outer`, or lies somewhere below it."""
    inner, outer = place_of(inner), place_of(outer)
    if is_url(inner) or is_url(outer):
        return inner == outer or inner.startswith(outer.rstrip("/") + "/")
    return any(same_place(path, outer) for path in (Path(inner), *Path(inner).parents))


def spelled_alike(path: str | Path) -> str:
    """The end of a message about a path that does not exist: "; did you mean data/rows.jsonl?", or nothing.

    Compares the first missing name of the path with the names in its folder.
    """
    if is_url(path):
        return ""
    try:
        whole = Path(path).expanduser()
        parent = next(parent for parent in whole.parents if parent.is_dir())
        name, *below = whole.relative_to(parent).parts
        with os.scandir(parent) as entries:
            names = [entry.name for entry in itertools.islice(entries, MOST_NAMES)]
    except (OSError, RuntimeError, ValueError, StopIteration):  # not a valid path, or a folder that may not be read
        return ""
    near = difflib.get_close_matches(name, sorted(names), 1, 0.75)
    if not near or name in names:
        return ""
    found = parent / near[0]
    return f"; did you mean {found.joinpath(*below) if found.joinpath(*below).exists() else found}?"


def leads_nowhere(path: str | Path) -> bool:
    """Whether a path is or contains a link that leads back to itself, so that nothing can ever be there."""
    place = place_of(path)
    return not is_url(place) and any(os.path.islink(part) for part in (place, *Path(place).parents))


def parent_of(path: str | Path) -> str:
    """The folder or URL that contains `path`."""
    place = place_of(path)
    if not is_url(place):
        return str(Path(place).parent)
    protocol, _, rest = place.partition("://")
    return f"{protocol}://{rest.rpartition('/')[0]}"


def refuse_impossible_paths(settings: Mapping[str, str | None]) -> None:
    """Raises ValueError for an impossible path. `settings`: paths, URLs or hub ids by setting; None where not set."""
    for setting, path in settings.items():
        if path is None or is_url(path):
            continue
        try:
            whole = Path(path).expanduser()
        except RuntimeError as error:
            raise ValueError(f"{setting}={path!r}: {path.split('/')[0]} is no user of this machine") from error
        if any(len(os.fsencode(part)) > LONGEST_NAME for part in whole.parts) or len(os.fsencode(whole)) > LONGEST_PATH:
            raise ValueError(f"{setting}={path[:40]!r}... is too long for a path")
