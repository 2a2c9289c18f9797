"""Reports a mistake in a config, path or row in one line. Only a possible fault of this library shows a trace."""

import io
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_dpo_jax.printable import printable
from lora_dpo_jax.processes.exchange import is_first_process
from lora_dpo_jax.processes.signals import StoppedBySignalError
from lora_dpo_jax.redaction import redact
from lora_dpo_jax.settings.launched import resuming_command

READER_GONE = 128 + 13  # as a shell reports SIGPIPE
TRACEBACK = "LORA_DPO_JAX_TRACEBACK"  # set it to see where an error comes from
FOR_USERS = Path(__file__).parents[1]  # the folder whose code raises errors for users to read


@contextmanager
def told_in_a_line() -> Iterator[None]:
    """Wraps a whole command: prints each error that users can fix in one line, and exits with status 1.

    A run that a signal stopped exits with StoppedBySignalError.exit_code. A command whose reader has gone (as in
    `| head`) exits silently with READER_GONE. Secrets are hidden in traces too.
    """
    sys.excepthook = print_trace
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # like stderr, so that no character fails
    try:
        yield
    except StoppedBySignalError as stopped:
        print(stopped, file=sys.stderr)
        if is_first_process():
            print(f"To resume it:\n{_shown(resuming_command(stopped.resume_with))}", file=sys.stderr)
        raise SystemExit(stopped.exit_code) from stopped
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get(TRACEBACK) or not _is_for_users(error):
            raise
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python prints an error at exit
            raise SystemExit(READER_GONE) from error
        print(f"error: {_shown(str(error).strip())}\n({TRACEBACK}=1 shows where it comes from)", file=sys.stderr)
        raise SystemExit(1) from error


def print_trace(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """As Python prints it, but without secrets and control characters."""
    sys.stderr.write(_shown("".join(traceback.format_exception(kind, error, trace))))


def _shown(text: str) -> str:
    return printable(redact(text))


def _is_for_users(error: BaseException) -> bool:
    """Whether code of this package raised it. Errors of other packages do not name the user's settings."""
    return Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(FOR_USERS)
