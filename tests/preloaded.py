"""Python processes that begin where their imports are done, which takes a process of its own two seconds.

`start` forks them from one that has imported the commands and has no backend and no thread yet. A process has its own
environment, arguments and pipes; what is read while JAX is imported must be as here.
"""

import array
import atexit
import functools
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MODULES = ("train", "evaluate", "generate")


class Preloaded:
    """As far as tests need it, a subprocess.Popen of `python <arguments>` with pipes of text."""

    def __init__(self, arguments: Sequence[str], env: Mapping[str, str]):
        self.returncode: int | None = None
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        self._texts = [open(out), open(err)]  # closed by communicate
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(_server())
        request = json.dumps({"arguments": list(arguments), "env": dict(env), "cwd": os.getcwd()}).encode()
        ends = array.array("i", [out_end, err_end])
        header = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, ends)]
        self._connection.sendmsg([len(request).to_bytes(8, "big")], header)
        self._connection.sendall(request)
        os.close(out_end)
        os.close(err_end)
        self.pid = int.from_bytes(_received(self._connection, 8), "big")

    def poll(self) -> int | None:
        """The exit status, negative if a signal ended it, or None if it still runs."""
        try:
            return self.wait(timeout=1e-3)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                self.returncode = int.from_bytes(_received(self._connection, 8), "big", signed=True)
            except TimeoutError:
                raise subprocess.TimeoutExpired(["python"], timeout or 0.0) from None
            self._connection.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote to stdout and to stderr, once it has ended."""
        with ThreadPoolExecutor(2) as pool:
            texts = pool.map(lambda pipe: pipe.read(), self._texts)
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
            written, told = texts
        for pipe in self._texts:
            pipe.close()
        return written, told

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def run(arguments: Sequence[str], env: Mapping[str, str]) -> subprocess.CompletedProcess:
    process = Preloaded(arguments, env)
    written, told = process.communicate()
    return subprocess.CompletedProcess(["python", *arguments], process.returncode or 0, written, told)


@functools.cache
def _server() -> str:
    """The address of the process that forks; it ends with this one."""
    folder = tempfile.mkdtemp(prefix="preloaded_")
    address = str(Path(folder) / "socket")
    command = [sys.executable, __file__, address]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    atexit.register(server.kill)
    assert server.stdout is not None and server.stdout.readline() == b"ready\n", "its imports failed"
    return address


def _received(connection: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        more = connection.recv(count - len(found))
        if not more:
            raise EOFError("the process that forks has ended")
        found += more
    return found


def _serve(address: str) -> dict[str, Any]:
    """Forks a process for each request. Returns the request in that process; never in this one."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    wake, wakes = socket.socketpair()
    wakes.setblocking(False)
    signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda signum, frame: None)
    print("ready", flush=True)
    running: dict[int, socket.socket] = {}

    while True:
        ready, _, _ = select.select([listening, wake, sys.stdin], [], [])
        if sys.stdin in ready:
            sys.exit()  # the tests have ended
        if wake in ready:
            wake.recv(4096)
            _report_ended(running)
        if listening in ready:
            connection, _ = listening.accept()
            request, ends = _request(connection)
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for ours in (listening, wake, wakes, connection, *running.values()):
                    ours.close()
                for end, place in zip(ends, (1, 2), strict=True):
                    os.dup2(end, place)
                    os.close(end)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                return request
            for end in ends:
                os.close(end)
            connection.sendall(pid.to_bytes(8, "big"))
            running[pid] = connection


def _request(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """(the request, the descriptors of its stdout and stderr)."""
    ends = array.array("i")
    size, found, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(2 * ends.itemsize))
    ends.frombytes(found[0][2])
    return json.loads(_received(connection, int.from_bytes(size, "big"))), list(ends)


def _report_ended(running: dict[int, socket.socket]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        with running.pop(pid) as connection:
            connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(8, "big", signed=True))


def _become(request: dict[str, Any]) -> None:
    """Runs `python <arguments>` in this process."""
    option, program, *rest = request["arguments"]
    changed = {name for name in {*os.environ, *request["env"]} if os.environ.get(name) != request["env"].get(name)}
    if late := sorted(name for name in changed if name.startswith(("JAX_", "HF_", "PYTHON"))):
        raise ValueError(f"{late} are others than when JAX and the like were imported: start a process of its own")
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.orig_argv = [sys.executable, *request["arguments"]]
    sys.argv = [option, *rest] if option == "-c" else [program, *rest]
    if option == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    for name in MODULES:
        importlib.import_module(f"lora_dpo_jax.main.{name}")
    _become(_serve(sys.argv[1]))
