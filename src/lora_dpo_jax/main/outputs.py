"""Where a run writes: tried before its work, so that no hour of training ends at a path that cannot be written."""

import logging
import shutil
import tempfile
import uuid
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lora_dpo_jax.huggingface.folders import check_export_target, is_url
from lora_dpo_jax.main.identity import cache_folder
from lora_dpo_jax.main.setup import TrainConfig

logger = logging.getLogger("lora_dpo_jax")

PROBE_BYTES = 4096


def check_outputs(config: TrainConfig) -> None:
    """Raises OSError that names the setting, for the first place of a training run where nothing can be written.

    What is tried leaves nothing behind. A preview writes to the cache alone.
    """
    check_writable("data.cache_dir", cache_folder(config))
    if config.preview:
        return
    trainer = config.trainer
    # A run without an id gets a folder of its own later; the one above it says enough.
    run_dir = trainer.run_dir(trainer.id or "")
    check_writable("trainer.log_dir", run_dir)
    base_path = trainer.checkpointer.base_path
    if base_path is not None and not is_url(base_path):  # Checkpoints tries URLs, by its own means
        check_writable("trainer.checkpointer.base_path", base_path)
    for setting, path in exports_of(config):
        # An export is written beside its target and then renamed.
        check_writable(setting, path if is_url(path) else Path(path).expanduser().absolute().parent)
        try:
            check_export_target(path)
        except FileExistsError as error:
            raise FileExistsError(f"{setting}: {error}") from error


def exports_of(config: TrainConfig) -> list[tuple[str, str]]:
    """(setting, path) of those that are set."""
    paths = {"peft_save_path": config.peft_save_path, "merged_hf_save_path": config.merged_hf_save_path}
    return [(setting, path) for setting, path in paths.items() if path is not None]


def check_writable(setting: str, folder: str | Path) -> None:
    """Writes and removes a small file in the folder or URL, or where the folder would be made."""
    try:
        if is_url(folder):
            _try_url(str(folder))
        else:
            with tempfile.TemporaryFile(dir=existing_part(Path(folder))) as file:
                file.write(bytes(PROBE_BYTES))  # a full disk still makes empty files
    # Stores have errors of their own: a bucket that is missing, a key that is refused, a package not installed.
    except Exception as error:
        raise OSError(
            f"{setting}: nothing can be written to {folder} ({error}). Set it to a place where it can"
        ) from error


def check_free_space(setting: str, path: str, needed: int, count: int) -> None:
    """Raises OSError if a local `path` has no room for an export of `needed` bytes; warns if not for all `count`."""
    if is_url(path):
        return
    free = shutil.disk_usage(existing_part(Path(path))).free
    told = f"{setting}: a merged model is of about {needed / 1e9:.3f} GB, and {path} has {free / 1e9:.3f} GB free"
    if free < needed:
        raise OSError(f"{told}. Make room, or set another path")
    if free < needed * count:
        logger.warning("%s: that is not enough for the %d that the run will write, as hf_save_steps says", told, count)


def existing_part(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    folder = folder.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _try_url(url: str) -> None:
    files, root = fsspec.core.url_to_fs(url)
    probe = f"{root.rstrip('/')}/.writable-{uuid.uuid4().hex}"
    if isinstance(files, LocalFileSystem):
        probe = str(existing_part(Path(root)) / Path(probe).name)
    # Folders are not made: some stores would make a missing bucket.
    files.pipe_file(probe, bytes(PROBE_BYTES))
    files.rm_file(probe)
