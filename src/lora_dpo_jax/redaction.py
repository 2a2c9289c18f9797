"""Secrets in texts that others may read: logs, config.yaml, checkpoints, exports, trackers."""

import logging
import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
SHORTEST = 8  # characters of an environment variable's value; shorter ones would be found in innocent words

_NAMES = r"token|key|secret|password|passwd|signature|sig|credential|auth"
_SECRET_NAME = re.compile(rf"(?i)(?:^|[_.-]|api|access)(?:{_NAMES})$")
_PATTERNS = (
    # https://user:password@host and https://token@host. Elsewhere what has no colon is a name: abfss://container@account
    (re.compile(r"(?i)(https?://)[^/\s@?#'\"]+@"), rf"\1{HIDDEN}@"),
    (re.compile(r"(?i)(\b[a-z][a-z0-9+.-]*://)[^/\s@?#'\":]+:[^/\s@?#'\"]*@"), rf"\1{HIDDEN}@"),
    # ?access_token=..., &X-Amz-Signature=..., &sig=...
    (re.compile(rf"(?i)([?&;][\w.-]*(?:{_NAMES})=)[^&;#\s'\"]+"), rf"\1{HIDDEN}"),
    (re.compile(r"(?i)(\bbearer\s+)[\w.~+/=-]{8,}"), rf"\1{HIDDEN}"),
    (re.compile(r"\bhf_[A-Za-z0-9]{20,}"), HIDDEN),  # the Hugging Face hub's
)


def redact(text: str) -> str:
    """`text` without tokens, keys and passwords, in the forms in which they are in URLs and environment variables."""
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and _SECRET_NAME.search(name):
            text = text.replace(value, HIDDEN)
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    return text


def redacted(tree: Any) -> Any:
    """The same for nested mappings and lists; what is under the name of a secret is hidden whatever it is."""
    if isinstance(tree, Mapping):
        return {
            name: HIDDEN if isinstance(value, str) and _SECRET_NAME.search(str(name)) else redacted(value)
            for name, value in tree.items()
        }
    if isinstance(tree, list | tuple):
        return type(tree)(map(redacted, tree))
    return redact(tree) if isinstance(tree, str) else tree


class RedactingFormatter(logging.Formatter):
    """Messages and tracebacks alike."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))
