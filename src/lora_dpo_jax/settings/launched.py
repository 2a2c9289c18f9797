"""The command that started this process, as a user would type it."""

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path


def launched_as() -> list[str]:
    """The words before the settings: `python -m lora_dpo_jax.main`, or a script's name."""
    settings, words = sys.argv[1:], sys.orig_argv
    script = Path(sys.argv[0]).name
    if shutil.which(script):
        return [script]
    before = words[: len(words) - len(settings)]
    return before if before and words[len(before) :] == settings else [script]


def resuming_command(settings: Sequence[str]) -> str:
    """This process's command with more settings, in a shell's quotes."""
    return shlex.join([*launched_as(), *sys.argv[1:], *settings])
