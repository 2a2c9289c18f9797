"""Ends all processes of a run, with a message, soon after one of them has ended. Else they would wait for it forever.

Each process sends a sign of life every second to JAX's service on process 0, and waits there for news of an end. A
process that ends with an error sends this news. Process 0 sends it for a process that has been silent for too long. If
the service does not answer, process 0 has ended.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from lora_dpo_jax.printable import printable
from lora_dpo_jax.processes.exchange import service, wait_for_all
from lora_dpo_jax.processes.signals import RESTART_STATUS
from lora_dpo_jax.redaction import redact

SIGNS, NEWS = "lora_dpo_jax/alive", "lora_dpo_jax/ended"
ALL_IS_DONE = "all is done"
SECONDS_BETWEEN_SIGNS = 1.0
SECONDS_TO_HEAR = 2.0  # how long the service outlives an error of process 0
GONE = (
    "it was killed, or its machine or the network is gone.\n"
    "Start the same command again on all machines: a run with a trainer.id resumes from its newest checkpoint. "
    f"This process exits with status {RESTART_STATUS}, which asks launchers for a restart."
)


class PeerMonitor:
    """Ends this process soon after another process of the run has ended, between `start` and `end` or `fail`."""

    def __init__(self, *, silence_seconds: float):
        self.client, self.silence_seconds = service(), silence_seconds
        self.me, self.count = jax.process_index(), jax.process_count()
        self.name = f"process {self.me} of {self.count} ({socket.gethostname()})"
        self._heard: dict[int, tuple[str, float]] = {}  # the last sign of each process, and when it was seen first
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True, name="liveness")

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Ends the monitor after the work: waits for the other processes, then stops all monitors."""
        wait_for_all()
        self._is_over.set()
        if self.me == 0:
            self._send(ALL_IS_DONE)
        self._thread.join()
        jax.distributed.shutdown()

    def fail(self, reason: str, status: int) -> None:
        """Sends the others the reason, and ends this process at once. JAX's own exit would wait for them."""
        self._is_over.set()
        self._send(_news(f"{self.name} {reason}", status))
        sys.stdout.flush()
        sys.stderr.flush()
        if self.me == 0:
            time.sleep(SECONDS_TO_HEAR)
        os._exit(status)

    @contextmanager
    def explaining_errors(self) -> Iterator[None]:
        """Delays an error that another process may have caused, so that the end of that process is noticed first."""
        try:
            yield
        except Exception as error:
            if _may_be_anothers(error):
                time.sleep(self.silence_seconds + 3 * SECONDS_BETWEEN_SIGNS)
            raise

    def _listen(self) -> None:
        for number in range(sys.maxsize):
            try:
                self.client.key_value_set(f"{SIGNS}/{self.me}", f"{socket.gethostname()} {number}", True)
                if self.me == 0:
                    self._look_for_silence()
                news = self.client.blocking_key_value_get(NEWS, int(1000 * SECONDS_BETWEEN_SIGNS))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" in str(error):
                    continue
                if not self._is_over.is_set():
                    self._leave(f"process 0 does not answer any more: {GONE}", RESTART_STATUS)
                return
            if news != ALL_IS_DONE and not self._is_over.is_set():
                self._leave(**json.loads(news))
            return

    def _look_for_silence(self) -> None:
        now = time.monotonic()
        signs = {key.rpartition("/")[2]: sign for key, sign in self.client.key_value_dir_get(SIGNS)}
        for process in range(1, self.count):
            sign = signs.get(str(process), "")
            if sign != self._heard.get(process, (None,))[0]:
                self._heard[process] = (sign, now)
            elif now - self._heard[process][1] > self.silence_seconds:
                host = sign.partition(" ")[0] or "it never started"
                name = f"process {process} of {self.count} ({host})"
                silence = f"has given no sign of life for {self.silence_seconds:.0f} s"
                self._send(_news(f"{name} {silence}: {GONE}", RESTART_STATUS))

    def _send(self, news: str) -> None:
        try:
            self.client.key_value_set(NEWS, news)
        except jax.errors.JaxRuntimeError:
            pass  # another process was faster, or the service is gone

    def _leave(self, text: str, status: int) -> None:
        # Not through sys.stderr, whose lock a hanging thread may hold.
        os.write(2, f"error: {self.name} ends with the others. {printable(redact(text))}\n".encode())
        if self.me == 0:
            time.sleep(SECONDS_TO_HEAR)
        os._exit(status)


def _news(text: str, status: int) -> str:
    return json.dumps({"text": text, "status": status})


def _may_be_anothers(error: BaseException | None) -> bool:
    """Whether JAX's services or collectives raised it or its cause. Gloo's errors have no type of their own."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
