"""The places where a run writes. Each is tried before the work, so that no training fails at an export.

A place must hold no input of the run, and no file that another program or run wrote.
"""

import logging
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import fsspec

from lora_dpo_jax.files import cache_folder
from lora_dpo_jax.huggingface.folders import check_export_target
from lora_dpo_jax.places import is_url, is_within, leads_nowhere, parent_of, place_of, same_place
from lora_dpo_jax.runs.config import TrainConfig

logger = logging.getLogger("lora_dpo_jax")

PROBE_BYTES = 4096
STEP_FOLDER = re.compile(r"step-(\d+)")


def check_outputs(config: TrainConfig) -> None:
    """Raises an error that names the setting, for the first place that cannot be written or must not be replaced.

    The trial leaves nothing behind. A preview writes only to the cache.
    """
    check_writable("data.cache_dir", cache_folder(config.data.cache_dir))
    if config.preview:
        return
    trainer = config.trainer
    # A run without an id gets a folder of its own later; trying the folder above is enough.
    run_dir = trainer.run_dir(trainer.id or "")
    check_writable("trainer.log_dir", run_dir)
    if trainer.id and (run_dir / "config.yaml").exists() and not (run_dir / "metrics.jsonl").exists():
        raise FileExistsError(
            f"trainer.log_dir, trainer.id: {run_dir} holds a config.yaml but no metrics.jsonl, so it is no run's "
            "folder, and that file would be replaced. Choose another trainer.id, or move it away"
        )
    base_path = trainer.checkpointer.base_path
    if base_path is not None and not is_url(base_path):  # Checkpoints tries URLs itself
        check_writable("trainer.checkpointer.base_path", base_path)
    for setting, path in exports_of(config):
        _check_other_uses(config, setting, path)
        check_writable(setting, path)
        try:
            for target in (path, *_former_steps(config, path)):
                _check_inputs(config, setting, target)
                check_export_target(target, run=trainer.id, overwrite=config.overwrite)
        except FileExistsError as error:
            raise FileExistsError(f"{setting}: {error}") from error
        except OSError as error:
            raise OSError(f"{setting}: what is at {path} cannot be read ({error}). Choose another path") from error


def exports_of(config: TrainConfig) -> list[tuple[str, str]]:
    """(setting, path) of each export that is set."""
    return [*config.export_paths.items()]


def step_target(path: str, step: int) -> str:
    """The path of the export after `step` steps, if it is not the last one."""
    return f"{path.rstrip('/')}/step-{step}"


def check_writable(setting: str, folder: str | Path) -> None:
    """Raises OSError unless a small file can be written in the folder or URL, or where the folder would be made."""
    place = place_of(folder)
    try:
        if is_url(place):
            _try_url(place)
        else:
            if leads_nowhere(place):
                raise OSError("it is a link that leads back to itself")
            with tempfile.TemporaryFile(dir=existing_part(Path(place))) as file:
                file.write(bytes(PROBE_BYTES))  # a full disk still takes empty files
    # Stores have errors of their own: a missing bucket, a rejected key, a package that is not installed.
    except Exception as error:
        raise OSError(
            f"{setting}: nothing can be written to {folder} ({error}). Set it to a place where it can"
        ) from error


def check_free_space(setting: str, path: str, needed: int, count: int) -> None:
    """Raises OSError if a local `path` has no room for an export of `needed` bytes; warns if not for all `count`."""
    if is_url(path):
        return
    free = shutil.disk_usage(existing_part(Path(path))).free
    room = f"{setting}: a merged model is of about {needed / 1e9:.3f} GB, and {path} has {free / 1e9:.3f} GB free"
    if free < needed:
        raise OSError(f"{room}. Make room, or set another path")
    if free < needed * count:
        logger.warning("%s: that is not enough for the %d that the run will write, as hf_save_steps says", room, count)


def existing_part(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists, with links resolved."""
    folder = Path(place_of(folder))
    return next(path for path in (folder, *folder.parents) if path.exists())


def _check_other_uses(config: TrainConfig, setting: str, path: str) -> None:
    """Raises ValueError for a path that has another use, whether or not it exists."""
    if not path.strip():
        raise ValueError(f"{setting}={path!r} names no folder; null exports none")
    if same_place(path, "."):
        raise ValueError(f"{setting}={path!r} is the working folder: name one in it, such as out")
    _check_inputs(config, setting, path)
    for other, occupied in exports_of(config):
        if other != setting and config.hf_save_steps and same_place(parent_of(path), occupied):
            if STEP_FOLDER.fullmatch(PurePosixPath(place_of(path)).name):
                raise ValueError(f"{setting}={path!r} is where {other} exports on the way. Choose another path")
    trainer, run_id = config.trainer, config.trainer.id or ""
    run_dir = trainer.run_dir(run_id)
    if run_id and same_place(path, run_dir):
        raise ValueError(f"{setting}={path!r} is the run's own folder: name one in it, such as {run_dir / 'export'}")
    # Without an id, the folder has no name yet, so no setting can name it.
    is_known = run_id or not trainer.checkpointer.append_run_id_to_base_path
    if is_known and is_within(path, str(trainer.checkpointer.folder(run_dir, run_id))):
        raise ValueError(f"{setting}={path!r} is where the run's checkpoints are. Choose another path")


def _check_inputs(config: TrainConfig, setting: str, target: str) -> None:
    """Raises ValueError if the run reads the target: a restarted run would read its own export."""
    inputs = {
        "initialize_from_hf": config.initialize_from_hf,
        "initialize_from_peft": config.initialize_from_peft,
        "data.tokenizer": config.data.tokenizer,
    }
    for name, given in inputs.items():
        if given is not None and same_place(target, given):
            raise ValueError(f"{setting}: an export to {target} would replace {name}={given!r}. Choose another path")


def _former_steps(config: TrainConfig, path: str) -> Iterator[str]:
    """The existing folders among those of the intermediate exports that the run will make."""
    if config.hf_save_steps is None:
        return
    store, root = fsspec.core.url_to_fs(place_of(path))
    names = [PurePosixPath(name).name for name in store.ls(root, detail=False)] if store.isdir(root) else []
    steps = sorted(int(match[1]) for match in map(STEP_FOLDER.fullmatch, names) if match)
    yield from (step_target(path, step) for step in steps if step % config.hf_save_steps == 0)


def _try_url(url: str) -> None:
    store, root = fsspec.core.url_to_fs(url)
    probe = f"{root.rstrip('/')}/.writable-{uuid.uuid4().hex}"
    # No folder is made: some stores would make a missing bucket.
    store.pipe_file(probe, bytes(PROBE_BYTES))
    store.rm_file(probe)
