"""Pushes the finished exports of a run to the Hugging Face hub.

The token is that of huggingface_hub itself: $HF_TOKEN, or the one that `hf auth login` has stored.
"""

import glob
import logging
import shlex
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import fsspec
import huggingface_hub

from lora_dpo_jax import __version__
from lora_dpo_jax.huggingface.manifest import MANIFEST, Manifest
from lora_dpo_jax.places import is_url, place_of
from lora_dpo_jax.processes.exchange import is_first_process

logger = logging.getLogger("lora_dpo_jax")

# The setting of the export that each repository holds, and the files of a former push that a reader could take for it.
EXPORTS = {"adapter": "peft_save_path", "merged": "merged_hf_save_path"}
STALE = {"adapter": ["adapter_model*"], "merged": ["model*.safetensors", "model.safetensors.index.json"]}
PAUSES = (5.0, 30.0)  # seconds before the second try of a push and before the third, after a failure that may pass
LONGEST_REASON = 300  # characters of an error of the hub
REASONS = {
    401: "the token is not valid: run `hf auth login`, or set HF_TOKEN",
    402: "the account has no storage left, or must pay for this",
    403: "the token may not write there: choose another repository, or a token with write access",
    404: "there is no such repository for this token: a private one of others, or a name that is wrong",
    409: "another change of the repository came between",
    413: "a file is too large for it",
    429: "too many requests",
}


@dataclass(frozen=True)
class HubConfig:
    """Repositories of the hub that get the finished exports; both are off by default."""

    adapter: str | None = None  # name/repo for the adapter at peft_save_path
    merged: str | None = None  # name/repo for the model at merged_hf_save_path
    private: bool = True  # a repository that has to be made is private; one that exists must then be so, too
    revision: str | None = None  # the branch, made if it is missing; null: main
    commit_message: str | None = None  # null: one with the name of this library

    def __post_init__(self):
        for setting, repo in self.repos.items():
            from huggingface_hub.utils import validate_repo_id  # late, because it is slow to import

            try:
                validate_repo_id(repo)
                is_full = repo.count("/") == 1
            except ValueError:
                is_full = False
            if not is_full:
                raise ValueError(
                    f"hub.{setting}={repo!r} must be name/repo: the user or organization and the repository, of "
                    "letters, digits, -, _ and ."
                )
        if self.adapter is not None and self.adapter == self.merged:
            raise ValueError(f"hub.adapter and hub.merged are both {self.adapter}; they must differ")

    @property
    def repos(self) -> dict[str, str]:
        """The repositories that are set, by their settings' names."""
        return {name: repo for name in EXPORTS if (repo := getattr(self, name)) is not None}

    def check_exports(self, paths: Mapping[str, str]) -> None:
        """Raises ValueError for a repository whose export is off. `paths`: of the exports, by their settings' names."""
        for name, repo in self.repos.items():
            if EXPORTS[name] not in paths:
                raise ValueError(
                    f"hub.{name}={repo} pushes the export at {EXPORTS[name]}, which is null: set {EXPORTS[name]} too, "
                    f"or leave hub.{name} out"
                )


def check_hub(config: HubConfig, base_model: str) -> None:
    """Makes the repositories, before the work. Raises OSError if they cannot be written; warns if the hub is silent.

    Also warns if the adapter will name a base that others do not have, as a folder of this machine is. Only the first
    process of a run does anything.
    """
    if not is_first_process():
        return
    if config.adapter is not None and not is_url(base_model) and Path(base_model).expanduser().is_dir():
        logger.warning(
            "hub.adapter=%s: initialize_from_hf=%s is a folder of this machine. The adapter names it as its base, so "
            "others must say where theirs is; a hub id is found by all",
            config.adapter,
            base_model,
        )
    for name, repo in config.repos.items():
        setting = f"hub.{name}={repo}"
        if huggingface_hub.is_offline_mode():
            raise OSError(f"{setting} needs the network, and HF_HUB_OFFLINE=1 forbids it: unset one of the two")
        if huggingface_hub.get_token() is None:
            raise PermissionError(f"{setting} needs a token of the hub: run `hf auth login`, or set HF_TOKEN")
        try:
            _prepare(config, repo)
        except Exception as error:  # also any error of the HTTP client
            if not _may_pass(error):
                raise OSError(f"{setting}: nothing can be pushed there: {_reason(error)}") from error
            logger.warning("%s: %s. The run begins; it tries again at its end", setting, _reason(error))


def push_exports(config: HubConfig, paths: Mapping[str, str]) -> dict[str, str]:
    """Pushes the exports; the URLs of the commits, by their settings' names. Only the first process does anything.

    A failure is a warning with the command that pushes the export by hand: the export itself is whole.
    """
    pushed: dict[str, str] = {}
    if not is_first_process():
        return pushed
    for name, repo in config.repos.items():
        path = paths[EXPORTS[name]]
        logger.info("pushing %s to %s", path, repo)
        try:
            pushed[name] = _push(config, name, repo, path)
        except BaseException as error:  # Ctrl-C too leaves a line
            reason = _reason(error) if isinstance(error, Exception) else "it was interrupted"
            logger.warning("%s", _by_hand(config, name, repo, path, reason))
            if not isinstance(error, Exception):
                raise
    return pushed


def _push(config: HubConfig, name: str, repo: str, path: str) -> str:
    for pause in (*PAUSES, None):
        try:
            _prepare(config, repo)
            return _upload(config, name, repo, path)
        except Exception as error:
            if pause is None or not _may_pass(error):
                raise
            logger.info("hub.%s=%s: %s; it is tried again in %.0f s", name, repo, _reason(error), pause)
            time.sleep(pause)
    raise AssertionError


def _prepare(config: HubConfig, repo: str) -> None:
    """Makes what is missing of a repository and its branch. Raises an error unless it can be written."""
    api = huggingface_hub.HfApi()
    api.create_repo(repo, private=config.private, exist_ok=True)
    api.auth_check(repo, write=True)  # create_repo accepts a repository that exists, whoever may write to it
    if config.private and not api.model_info(repo).private:
        raise PublicRepoError(
            "it is public, and hub.private is true: make it private in its settings on the hub, choose another one, or "
            "set hub.private to false"
        )
    if config.revision is not None:
        api.create_branch(repo, branch=config.revision, exist_ok=True)


def _upload(config: HubConfig, name: str, repo: str, path: str) -> str:
    with _local_copy(path) as (folder, files):
        commit = huggingface_hub.HfApi().upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=config.revision,
            commit_message=config.commit_message or f"Upload the export of lora_dpo_jax {__version__}",
            allow_patterns=[glob.escape(file) for file in files],
            delete_patterns=STALE[name],
        )
    return commit.commit_url


@contextmanager
def _local_copy(path: str) -> Iterator[tuple[Path, list[str]]]:
    """The folder of an export and the names of its files; of a URL, a copy while the block runs."""
    place = place_of(path)
    store, root = fsspec.core.url_to_fs(place)
    store.invalidate_cache(root)
    manifest = Manifest.read(store, root)
    if manifest is None:
        raise FileNotFoundError(f"{path} has no {MANIFEST} any more")
    files = [*manifest.files]
    if not is_url(place):
        yield Path(place), files
        return
    with tempfile.TemporaryDirectory() as copy:
        for file in files:
            (Path(copy) / file).parent.mkdir(parents=True, exist_ok=True)
            store.get_file(f"{root}/{file}", f"{copy}/{file}")
        yield Path(copy), files


class PublicRepoError(PermissionError):
    """A repository that should be private is public."""


def _told(error: BaseException) -> BaseException:
    """What the hub or its client told, among the causes of an error, or else the first cause: uploads hide both."""
    while not isinstance(error, _client_error()) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _client_error() -> type[Exception]:
    """The errors of the HTTP client, of which the hub's are. It is httpx or httpx2, as huggingface_hub has it."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__mro__[1]


def _status(error: BaseException) -> int | None:
    """The HTTP status of the hub's answer, if there was one."""
    response = getattr(_told(error), "response", None)
    return None if response is None else response.status_code


def _may_pass(error: Exception) -> bool:
    """Whether the same may work later: the hub is out of reach, or overloaded."""
    status = _status(error)
    if status is None:
        return isinstance(_told(error), (_client_error(), ConnectionError, TimeoutError))
    return status in (409, 429) or status >= 500


def _reason(error: Exception) -> str:
    status, cause = _status(error), _told(error)
    text = " ".join(str(cause).split())[:LONGEST_REASON].rstrip(".")
    if status is None:
        return f"the hub is out of reach ({type(cause).__name__}: {text})" if _may_pass(error) else text
    return f"{status}, {REASONS.get(status, 'the hub failed' if status >= 500 else 'the hub refuses it')} ({text})"


def _by_hand(config: HubConfig, name: str, repo: str, path: str, reason: str) -> str:
    folder = "FOLDER" if is_url(path) else path
    copy = f" copy {path} to a FOLDER, and" if is_url(path) else ""
    command = ["hf", "upload", repo, folder, ".", "--exclude", "step-*/*", "--exclude", MANIFEST]
    options = {"--revision": config.revision, "--commit-message": config.commit_message}
    command += [part for option, value in options.items() if value is not None for part in (option, value)]
    command += ["--private"] if config.private else []
    return (
        f"hub.{name}={repo}: the push failed, and the export at {path} is whole. {reason}. To push it by hand,{copy} "
        f"run: {shlex.join(command)}"
    )
