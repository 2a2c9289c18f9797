"""A mistake in a config, a path or a row is told in a line; only what may be a fault of this library shows a trace."""

import io
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import draccus
from draccus.utils import DecodingError, ParsingError

from lora_dpo_jax.printable import printable
from lora_dpo_jax.redaction import redact
from lora_dpo_jax.training.interruption import InterruptedTrainingError

TRACEBACK = "LORA_DPO_JAX_TRACEBACK"  # set it to see where an error comes from
# Folders whose code raises errors for users to read.
FOR_USERS = (Path(__file__).parents[1], Path(draccus.__file__).parent)


@contextmanager
def told_in_a_line() -> Iterator[None]:
    """Around a whole command: prints what users can mend, and exits with status 1.

    A run that a signal stopped exits with InterruptedTrainingError.exit_code. Secrets are left out of traces too.
    """
    sys.excepthook = print_trace
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is: a terminal's encoding ends no command
    try:
        yield
    except InterruptedTrainingError as interruption:
        print(interruption, file=sys.stderr)
        raise SystemExit(interruption.exit_code) from interruption
    except (ValueError, OSError, ImportError, RuntimeError, ParsingError) as error:
        if os.environ.get(TRACEBACK) or not _is_for_users(error):
            raise
        print(f"error: {_shown(_message(error))}\n({TRACEBACK}=1 shows where it comes from)", file=sys.stderr)
        raise SystemExit(1) from error


def print_trace(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """As Python prints it, but for secrets and what a terminal would obey."""
    sys.stderr.write(_shown("".join(traceback.format_exception(kind, error, trace))))


def _shown(text: str) -> str:
    return printable(redact(text))


def _is_for_users(error: BaseException) -> bool:
    """Whether the line that raised it is ours or draccus's: others know nothing of the user's settings."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return any(raised_in.is_relative_to(folder) for folder in FOR_USERS)


def _message(error: BaseException) -> str:
    # What a config class says of its values, draccus puts in the cause.
    while isinstance(error, ParsingError) and not isinstance(error, DecodingError) and error.__cause__:
        error = error.__cause__
    return str(error).strip()
