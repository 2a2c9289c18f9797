"""Lets one process at a time work on a run. A file in the run's folder names it, and changes as long as it lives.

    {"run": "my-run", "host": "node-1", "process": 4711, "kernel": "...", "started": 8154, "since": "2026-08-01 12:00",
     "token": "...", "sign": 12}

A process of this machine is looked up by its number and its start, so a run that was killed is taken over at once. The
file of another machine's process is watched: if it changes within SILENCE_SECONDS, that process is at work.
"""

import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from etils import epath

from lora_dpo_jax.files import replace_file

logger = logging.getLogger("lora_dpo_jax")

LOCK = "run.lock"
SIGN_SECONDS = 5.0
SILENCE_SECONDS = 60.0
SETTLE_SECONDS = 1.0  # in a bucket two processes may write at once: the last one gets the lock


class RunIsActiveError(RuntimeError):
    """Another process is at work on the run; the message names it."""


class RunLock:
    """While the block runs, no other process that takes this lock works in `folder`, a path or a gs:// URL.

    Raises RunIsActiveError if a process is at work there already. The lock of a dead process is taken over.
    """

    def __init__(self, folder: str | Path | epath.Path, run: str):
        self.folder, self.path = epath.Path(folder), epath.Path(folder) / LOCK
        self.is_local = "://" not in self.folder.as_posix()
        self.me: dict[str, Any] = {
            "run": run,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "kernel": _kernel(),
            "started": process_started(os.getpid()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "token": uuid.uuid4().hex,
        }
        self._made: list[Path] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._give_signs, daemon=True, name="run lock")

    def __enter__(self) -> "RunLock":
        if self.is_local:
            folder = Path(self.folder)
            self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            holder = self._claim()
            while holder is not None:
                self._wait_for_sign(holder)
                holder = self._claim(silent=holder)
        except BaseException:
            self._remove_empty_folders()
            raise
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._is_over.set()
        self._thread.join()
        try:
            if self._is_mine(self._read()):
                self.path.unlink(missing_ok=True)
        except Exception as error:  # the next run finds out that this process has ended
            logger.warning("%s could not be removed: %s", self.path, error)
        self._remove_empty_folders()

    def _claim(self, silent: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """Writes the file; or returns its holder if that may be alive. The holder `silent` counts as dead."""
        with self._one_at_a_time():
            holder = self._read()
            if holder is not None and holder != silent and not self._is_dead(holder):
                return holder
            self._write(sign=0)
        if self.is_local:
            return None
        time.sleep(SETTLE_SECONDS)
        holder = self._read()
        return None if self._is_mine(holder) else holder

    def _wait_for_sign(self, holder: dict[str, Any]) -> None:
        """Raises RunIsActiveError if the holder is alive. Returns if its file is gone, or stays the same for long."""
        if holder.get("kernel") == self.me["kernel"]:
            raise self._is_active(holder)
        logger.info("%s: waiting for a sign of life of %s, %.0f s at most", self.path, _name(holder), SILENCE_SECONDS)
        deadline = time.monotonic() + SILENCE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(SIGN_SECONDS / 5)
            now = self._read()
            if now is None:
                return
            if now != holder:
                raise self._is_active(now)

    def _is_active(self, holder: dict[str, Any]) -> RunIsActiveError:
        return RunIsActiveError(
            f"trainer.id={self.me['run']!r}: {_name(holder)} is at work on this run, since {holder.get('since')}. Wait "
            "until it ends, or choose another trainer.id. (The lock of a killed process is taken over by itself. "
            f"If that process is gone all the same, remove {self.path}.)"
        )

    def _is_dead(self, holder: dict[str, Any]) -> bool:
        """Whether the process is known to have ended. Of a process in another machine or container, this is unknown."""
        return holder.get("kernel") == self.me["kernel"] and not _is_running(holder["process"], holder["started"])

    def _is_mine(self, holder: dict[str, Any] | None) -> bool:
        return holder is not None and holder.get("token") == self.me["token"]

    def _give_signs(self) -> None:
        sign = 0
        while not self._is_over.wait(SIGN_SECONDS):
            sign += 1
            try:
                holder = self._read()
                if holder is not None and not self._is_mine(holder):
                    logger.error("%s: %s has taken over this run; end one of the two", self.path, _name(holder))
                    return
                self._write(sign)
            except Exception as error:  # stores have errors of their own; the next write may succeed
                logger.warning("%s: no sign of life could be written: %s", self.path, error)

    def _read(self) -> dict[str, Any] | None:
        """The holder that the file names; None if there is no file."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            holder = dict(json.loads(content))
            is_process = type(holder["process"]) is int and 0 < holder["process"] < 2**31
            if is_process and isinstance(holder["started"], int | None):
                return holder
        except (ValueError, TypeError, KeyError):
            pass
        return {"unreadable": content}

    def _write(self, sign: int) -> None:
        text = json.dumps({**self.me, "sign": sign})
        if not self.is_local:
            self.path.write_text(text)
            return
        replace_file(Path(self.path), text.encode())

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Lets one process at a time read and write the file, if the file system has locks."""
        if not self.is_local:
            yield
            return
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # as on some network file systems
                fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def _remove_empty_folders(self) -> None:
        with suppress(OSError):
            for path in self._made:
                path.rmdir()


def process_started(process: int) -> int | None:
    """The start of a process, in clock ticks since the system's boot; None if it is not known, or the process ended."""
    try:
        after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if after_name[0] in "ZX" else int(after_name[19])


def _is_running(process: int, started: int | None) -> bool:
    now = process_started(process)
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's, whose start may be hidden
        return now is None or now == started
    # Process numbers are used again, but not with the same start. A zombie has no start.
    return started is None or now == started


def _kernel() -> str:
    """The scope of process numbers: the booted system, and the container in it."""
    with suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return f"{socket.gethostname()} {uuid.getnode()}"


def _name(holder: dict[str, Any]) -> str:
    if "process" not in holder:
        return "a process without a name"
    return f"process {holder['process']} on {holder.get('host')}"
