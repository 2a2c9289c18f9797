"""Hides secrets in texts that others may read: logs, config.yaml, checkpoints, exports, trackers.

A secret is recognized in three ways: by its name (`?token=`, `api_key: ...`, HF_TOKEN in the environment), by its place
(`https://user:password@host`, an Authorization header), and by its shape (hf_..., a private key). Hashes, run ids and
paths look random too, so a text that merely looks random is no secret.
"""

import functools
import logging
import os
import re
import sys
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import quote

from lora_dpo_jax.printable import printable

HIDDEN = "***"
SHORTEST = 8  # characters of an environment variable's value; shorter values would match parts of innocent words
SHORTEST_KEY = 16  # random-looking characters in the value of a variable such as SORT_KEY, which is rarely a secret

# Names are in lower case, with underscores between their words. Under such a name, any value is a secret...
_SECRET_NAME = re.compile(
    r"(?:password|passwd|passphrase|secret|token|signature|credentials?|(?:^|_)(?:pwd|pass|pat|sig|sas|jwt)"
    r"|(?:api|access|secret|private|account|shared|auth|encryption|signing|subscription|storage)_?key)$"
)
_PASSWORD_NAME = re.compile(r"(?:password|passwd|passphrase|(?:^|_)(?:pwd|pass))$")
# ...unless the name is that of a tokenizer's token or of a count of tokens.
_TOKEN_OF_A_TEXT = re.compile(
    r"(?:^|_)(?:pad|eos|bos|unk|sep|cls|mask|stop|start|end|first|next|last|image|special|max|min|per)_token$"
)
# Names that occur only in settings, not in prose: at the end of a line, the text after their colon is a value.
_SETTING_NAME = re.compile(
    r"(?:password|passwd|passphrase|_secret|(?:api|access|secret|private|account|shared|auth)_?key"
    r"|(?:access|api|auth|bearer|bot|github|gitlab|hf|hub|refresh|security|session)_?token)$"
)
# Under such a name, a value is a secret only if it looks like one.
_DOUBTFUL_NAME = re.compile(r"(?:^|_)(?:key|auth|authorization|bearer|cookie|session(?:_?id)?)$")
_CREDENTIAL = ("key", "auth")  # secret if this is the whole name of a setting or of a query parameter
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_NAMED_NUMBER = re.compile(r"[A-Za-z]+\d{1,4}|\d{1,4}[A-Za-z]+")
_PLACEHOLDER = re.compile(
    r"(?i)none|null|true|false|\d{1,5}|\*{3}.*|\W*|\$.*|<.*>|(?:any|bool|bytes|int|optional|str)\b.*"
)
_KEY = re.compile(r"(?=.*[a-z])(?=.*[A-Z])(?=.*\d)[\w+/=-]{32,}")  # in Base64; its signs may split it into words
_PATHS = ("/", "~", "./", "../")  # beginnings of paths
_PATH_OR_ID = re.compile(r"[\w.~@:+=,*-]*(?:/[\w.~@+=,*-]*)+")  # a local path or the id of a hub repository; no URL

# All repetitions are bounded, so that no text takes long.
_USER_OF_URL = re.compile(
    r"(?<![A-Za-z0-9+.-])([A-Za-z][A-Za-z0-9+.-]{0,20}://)(?:"
    # user:password@host, up to the last @ before a query, but not host:port/path@version; a quote may be inside a word
    r"(?:[^/\s:?#'\"<>,\[\]]|['\"](?=\w)){0,200}:(?!\d{1,5}(?:[/?#\s,;)'\"]|$))"
    r"(?:(?!://|[?&][\w.-]{1,40}=)[^\s'\"<>]|['\"](?=\w)){0,1000}@"
    # token@host, only on the web: elsewhere a part without a colon is a name, as in abfss://container@account
    r"|(?<=http://)[^/\s@?#'\"]{1,500}@|(?<=https://)[^/\s@?#'\"]{1,500}@)"
)
_OF_QUERY = re.compile(r"([?&;#])([\w.%-]{1,64})=([^&;#\s'\"]+)")
_ASSIGNED = re.compile(
    r"(?<![\w.-])(?P<flag>--)?(?=[\w.-]{0,60}(?i:pass|pwd|secret|token|signature|credential|key|sig|sas|jwt))"
    r"(?P<name>[A-Za-z][\w.-]{0,63})(?P<sign>\\?['\"]?\s{0,2}[=:]\s{0,2}|(?(flag)\s|(?!)))"
    r"(?:b?(?P<quote>\\?['\"])(?P<quoted>(?:(?!(?P=quote)).){1,2000})"
    # the value is not an assignment itself
    r"|(?P<bare>(?![\w.-]{1,64}(?:\s{0,2}=\s{0,2}[^=\s]|:\s))[^\s'\",;&)}\]]{4,2000}))"
    r"(?P<end>(?=\s{0,3}(?:$|[\r\n,;)}\]'\"])))?"
)
_COOKIE = re.compile(r"(?i)(?<!\w)(cookie['\"]?\s{0,2}:\s{0,2}b?['\"]?)(?=[\w.-]{1,64}=)[^\r\n'\"]+")
_HEADER = re.compile(
    r"(?i)(authorization\\?['\"]?\s{0,2}[=:]\s{0,2}(?:b?\\?['\"])?)"
    r"(?:((?:basic|bearer|token|key|apikey|negotiate)\s{1,3})([^\s'\",;]+)"
    r"|((?:digest|hmac|aws4-hmac-sha256|sharedkey|sharedkeylite|sharedaccesssignature)\s{1,3})"
    r"(?:=\\?['\"][^\r\n'\"]*['\"]|[^\r\n'\"])+"  # with the quotes around its parts
    r"|([^\s'\",;]+))"
)
_BEARER = re.compile(r"(?i)(?<![\w-])(bearer\s{1,3}|basic\s{1,3})([\w.~+/=-]{8,})")
_PRIVATE_KEY = re.compile(
    r"(-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----).*?(-----END [A-Z0-9 ]{0,40}KEY(?: BLOCK)?-----|\Z)",
    re.DOTALL,
)
_SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    + "|".join(
        (
            r"hf_(?:oauth_)?[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}",  # Hugging Face
            r"wandb_v\d_[A-Za-z0-9_]{20,}",
            r"(?=sk-[\w-]{0,40}\d)sk-[\w-]{0,40}?[A-Za-z0-9]{16}[\w-]*",  # OpenAI, Anthropic, OpenRouter
            r"gsk_[A-Za-z0-9]{30,}|nvapi-[\w-]{40,}|xai-[A-Za-z0-9]{40,}|(?:r8_|pplx-)[A-Za-z0-9]{30,}",  # servers
            r"gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{22,}|gl[a-z]{2,5}-[\w-]{20,}",  # GitHub, GitLab
            r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}(?![A-Za-z0-9])",  # Amazon
            r"AIza[\w-]{35,}|ya29\.[\w-]{20,}|GOCSPX-[\w-]{20,}|GOOG[A-Z0-9]{20,}",  # Google
            r"xox[a-z]-[\w-]{10,}|xapp-[\w-]{10,}",  # Slack
            r"(?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{16,}|SG\.[\w-]{16,}\.[\w-]{16,}|dckr_pat_[\w-]{20,}",
            r"(?:lin_api|dop_v1|shp(?:at|ca|pa|ss)|whsec)_[A-Za-z0-9]{30,}|tskey-[a-z]{2,10}-[\w-]{16,}",
            r"npm_[A-Za-z0-9]{30,}|pypi-AgEI[\w-]{20,}|dapi[0-9a-f]{32}(?![0-9a-z])",
            r"eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*",  # a JSON web token
        )
    )
    + ")"
)
# Paths that are secrets: everyone who knows them may write there.
_HOOK = re.compile(
    r"(hooks\.slack\.com/(?:services|workflows)/|discord(?:app)?\.com/api/webhooks/|api\.telegram\.org/bot)[\w/:-]{8,}"
)
_NETRC = re.compile(r"(\blogin\s{1,3}\S{1,100}\s{1,3}password\s{1,3})\S+")
# Old keys of Weights & Biases are 40 hexadecimal digits, like commits. Only the text around them distinguishes them.
_WANDB_KEY = re.compile(
    r"(?i)((?:password|api[ _-]?key|wandb\b[^\n]{0,40}?(?:login|key))(?: --\w{1,20})?\W{1,4}(?:key=\W?)?)"
    r"[0-9a-f]{40}(?![0-9a-z])"
)


def redact(text: str) -> str:
    """`text` without tokens, keys and passwords: those in URLs, headers, settings and environment variables."""
    variables = _pattern_of(_secret_variables())
    return _without_patterns(text if variables is None else variables.sub(HIDDEN, text))


def redacted(tree: Any) -> Any:
    """`redact` for nested mappings and lists. Any text under the name of a secret is hidden.

    Values of environment variables stay in paths and ids of repositories, which would not work without them.
    """
    if isinstance(tree, Mapping):
        return {name: HIDDEN if _is_secret(str(name), value) else redacted(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map(redacted, tree))
    if not isinstance(tree, str):
        return tree
    is_place = _PATH_OR_ID.fullmatch(tree) and all(tree != value for value, _ in _secret_variables())
    return _without_patterns(tree) if is_place else redact(tree)


def without_secrets(url: str) -> str:
    """`url` without user and password, and without its query if that has a secret, so that others can use the URL."""
    shown = _without_patterns(url).replace(f"{HIDDEN}@", "")
    return re.split(r"[?#]", shown)[0] if HIDDEN in shown else shown


class RedactingFormatter(logging.Formatter):
    """Formats messages and tracebacks without secrets and without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        level = "warning: " if record.levelno >= logging.WARNING else ""
        return level + printable(redact(super().format(record)))


def log_to_stderr(level: int) -> None:
    """Sets up the log of a command. It includes the libraries that would otherwise write their own log."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(RedactingFormatter("%(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    for library in ("transformers", "huggingface_hub", "datasets"):
        logging.getLogger(library).handlers.clear()
        logging.getLogger(library).propagate = True


def _without_patterns(text: str) -> str:
    text = _PRIVATE_KEY.sub(rf"\1{HIDDEN}\2", text)
    text = _USER_OF_URL.sub(rf"\1{HIDDEN}@", text)
    text = _OF_QUERY.sub(_hide_in_query, text)
    text = _HEADER.sub(_hide_in_header, text)
    text = _COOKIE.sub(rf"\1{HIDDEN}", text)
    text = _BEARER.sub(lambda m: m[1] + (HIDDEN if _is_no_word(m[2]) else m[2]), text)
    text = _WANDB_KEY.sub(rf"\1{HIDDEN}", text)
    text = _ASSIGNED.sub(_hide_assigned, text)
    text = _HOOK.sub(rf"\1{HIDDEN}", text)
    text = _NETRC.sub(rf"\1{HIDDEN}", text)
    return _SHAPES.sub(HIDDEN, text)


def _hide_in_query(found: re.Match) -> str:
    mark, name, value = found.groups()
    return f"{mark}{name}={HIDDEN if _is_secret(name, value) else value}"


def _hide_in_header(found: re.Match) -> str:
    header, scheme, _, long_scheme, bare = found.groups()
    if bare is not None:
        return header + (HIDDEN if _looks_secret(bare, SHORTEST) else bare)
    return f"{header}{scheme or long_scheme}{HIDDEN}"


def _hide_assigned(found: re.Match) -> str:
    part = "bare" if found["quoted"] is None else "quoted"
    name, value = found["name"], found[part]
    if _kind(name) != "secret" or _PLACEHOLDER.fullmatch(value) or value.startswith(_PATHS):
        return found[0]
    # Prose and source code contain names of secrets too: "token: the one of ...", f(token=self.token).
    is_code = _words(value).endswith(_words(name).rpartition("_")[2])
    is_setting = found["end"] is not None and ("-" in name or _SETTING_NAME.search(_words(name)))
    is_folder = found.string[: found.start()].endswith("/")  # of a partitioned table: /token=abc/
    is_meant = part == "quoted" or found["flag"] or (not is_code and (found["sign"] == "=" or is_setting))
    if (is_folder or not is_meant) and not _looks_secret(value.split("/")[0] if is_folder else value, SHORTEST):
        return found[0]
    start, end = (position - found.start() for position in found.span(part))
    return found[0][:start] + HIDDEN + found[0][end:]


@functools.lru_cache(4096)
def _words(name: str) -> str:
    """accessToken, X-Access-Token and ACCESS_TOKEN: all are ..access_token."""
    return "_".join(_WORDS.findall(name)).lower()


@functools.lru_cache(4096)
def _kind(name: str) -> Literal["secret", "doubtful", "innocent"]:
    words = _words(name)
    if _SECRET_NAME.search(words):
        return "innocent" if _TOKEN_OF_A_TEXT.search(words) else "secret"
    return "doubtful" if _DOUBTFUL_NAME.search(words) else "innocent"


def _is_secret(name: str, value: Any) -> bool:
    if not isinstance(value, str):
        return False
    kind = _kind(name)
    return kind == "secret" or name in _CREDENTIAL or (kind == "doubtful" and _looks_secret(value, SHORTEST))


def _looks_secret(value: str, shortest: int) -> bool:
    """Whether at least `shortest` characters in a row mix letters and digits, but not as a word with a number does."""
    return any(
        len(run) >= 2 * SHORTEST_KEY
        or (len(run) >= shortest and not run.isdigit() and not run.isalpha() and not _NAMED_NUMBER.fullmatch(run))
        for run in re.findall(r"[A-Za-z0-9]+", value)
    )


def _is_no_word(text: str) -> bool:
    return len(text) >= 20 or not text.isalpha()


def _secret_variables() -> frozenset[tuple[str, bool]]:
    """(value, whether it may be a plain word, as passwords may) of environment variables that are secrets."""
    found = set()
    for name, value in os.environ.items():
        kind, value = _kind(name), value.strip().strip("'\"")  # files of secrets end in a line end
        if kind == "innocent" or len(value) < SHORTEST or value.startswith(_PATHS) or "://" in value:
            continue
        is_key = kind == "secret" and _KEY.fullmatch(value)
        if is_key or _looks_secret(value, SHORTEST if kind == "secret" else SHORTEST_KEY):
            found.add((value, False))
        elif _PASSWORD_NAME.search(_words(name)):
            found.add((value, True))
    return frozenset(found)


@functools.lru_cache(16)
def _pattern_of(variables: frozenset[tuple[str, bool]]) -> re.Pattern | None:
    """A pattern of the values, plain or percent-encoded. Values that may be words must match a whole word."""
    forms = {(form, is_word) for value, is_word in variables for form in (value, quote(value, safe=""))}
    each = [
        rf"(?<![A-Za-z0-9]){re.escape(form)}(?![A-Za-z0-9])" if is_word else re.escape(form)
        for form, is_word in sorted(forms, key=lambda form: -len(form[0]))
    ]
    return re.compile("|".join(each)) if each else None
