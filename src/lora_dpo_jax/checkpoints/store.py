"""The checkpoints of a run: saved in the background, deleted when they are no longer needed, restored."""

import json
import logging
import re
import time
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from lora_dpo_jax.checkpoints.clock import SaveClock
from lora_dpo_jax.checkpoints.config import CheckpointerConfig
from lora_dpo_jax.checkpoints.differences import differences, listed
from lora_dpo_jax.checkpoints.files import (
    DamagedCheckpointError,
    check_files,
    read_description,
    refuse_foreign_files,
)
from lora_dpo_jax.processes.exchange import (
    from_each_process,
    from_first_process,
    is_first_process,
    wait_for_all,
)

logger = logging.getLogger("lora_dpo_jax")

T = TypeVar("T")  # a tree of arrays
STEP_FOLDER = re.compile(r"step-(\d+)")
UNFINISHED_FOLDER = re.compile(r"step-\d+\.orbax-checkpoint-tmp.*")  # Orbax writes into it, then renames it
SECONDS_TO_SEE = 10.0  # how long a network file system may take to show one host what another wrote
NONE_FOUND, REFUSED = -1, -2  # sent by the first process instead of a step
KEPT = "kept"


@dataclass(frozen=True)
class Restored(Generic[T]):
    """A checkpoint that was read: the arrays after `step` updates, and what was saved with them."""

    step: int
    arrays: T
    notes: dict[str, Any]
    kept: Any = None  # see Checkpoints.restore


class Checkpoints:
    """The checkpoints of one run, as `step-<n>` in one folder. With several processes, all must make the same calls.

    A context manager, which waits for pending writes at its end.
    """

    def __init__(
        self,
        folder: epath.Path,
        config: CheckpointerConfig,
        *,
        identity: Mapping[str, Any],
        settings: Mapping[str, Any],
    ):
        """`identity`: facts that a run and its checkpoints share. `settings`: all settings of the run, for the log.

        Both are nested mappings that serialize to JSON. Those of the first process are used.
        """
        self.folder, self.config = folder, config
        self.identity, self.settings = _as_json(identity), _as_json(settings)
        self._at_hand: int | None = None  # the step of the newest checkpoint
        self._clock = SaveClock(config.interval_seconds)
        self._storage: Any = None
        self._finishing: Future | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoints")

    def restore(self, like: T, *, kept: Any = None, wanted: bool | None = None) -> Restored[T] | None:
        """The newest complete checkpoint of this run, as a tree like `like`, with each array sharded as its namesake.

        `kept` is a tree like the one that was saved under this name. It is None in the result if it is None here, or if
        the checkpoint has none, or another one.

        Damaged checkpoints are skipped and logged. Returns None if there is none, which is an error if `wanted` is
        true. If `wanted` is false, any checkpoint is an error. Raises ValueError with the differences if the newest
        checkpoint is of another run.
        """
        arrays = _named(like)
        step, error = NONE_FOUND, None
        if jax.process_index() == 0:
            try:
                step = self._find(arrays, wanted)
            except Exception as found:  # raised below, once the other processes know of it
                step, error = REFUSED, found
        step = int(multihost_utils.broadcast_one_to_all(np.int64(step)))
        if error is not None:
            raise error
        if step == REFUSED:
            raise ValueError(f"{self.folder}: the first process rejected it; its log says why")
        self._check_shared_folder()
        if step == NONE_FOUND:
            return None
        path = self._path(step)
        description = read_description(path)
        kept_arrays = _named(kept, KEPT)
        if description.get(KEPT) != _shapes(kept_arrays):
            kept, kept_arrays = None, {}
        values = self._open().read(path, arrays | kept_arrays)
        self._at_hand = step
        logger.info("resuming from %s", path)
        return Restored(step, _filled(like, arrays, values), description["notes"], _filled(kept, kept_arrays, values))

    def is_due(self, step: int) -> bool:
        """Whether to save after `step` updates, by the rules or the clock. Call it once per step."""
        if self._finishing is not None and self._finishing.done():
            self.wait()  # raises if the writing failed
        return self.config.keeps(step) or self._clock.is_due(step)

    def save(
        self, step: int, arrays: Any, *, notes: Mapping[str, Any], kept: Any = None, is_last: bool = False
    ) -> None:
        """Saves in the background; the arrays may be donated as soon as this returns. `notes` serialize to JSON.

        `kept`: a tree of more arrays, without which a run can resume too.
        """
        if step == self._at_hand:
            return
        self.wait()
        description = {
            "step": step,
            "is_temporary": not (is_last or self.config.keeps(step)),
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "notes": _as_json(notes),
            "identity": {**self.identity, "arrays": _shapes(_named(arrays))},
            **({KEPT: _shapes(_named(kept, KEPT))} if kept is not None else {}),
            "settings": self.settings,
        }
        try:
            self._open().write(self._path(step), _named(arrays) | _named(kept, KEPT), description)
        except Exception as error:
            raise self._not_written(step, error) from error
        self._at_hand = step
        self._clock.restart()
        self._finishing = self._thread.submit(self._finish, step)

    def wait(self) -> None:
        """Waits until the last save is on disk. Raises OSError if it could not be written."""
        finishing, self._finishing = self._finishing, None
        if finishing is not None:
            finishing.result()

    def __enter__(self) -> "Checkpoints":
        self._clock.restart()
        return self

    def __exit__(self, exception_type, exception, traceback) -> None:
        try:
            self.wait()
        except OSError as error:
            if exception_type is None:
                raise
            logger.error("%s", error)  # the block's own error is raised
        finally:
            self._thread.shutdown()
            if self._storage is not None:
                self._storage.close()

    def _find(self, arrays: Mapping[str, jax.Array], wanted: bool | None) -> int:
        """The step to resume from, or NONE_FOUND."""
        self._make_folder()
        steps = sorted(self._steps(), reverse=True)
        if wanted is False and steps:
            raise ValueError(
                f"trainer.load_checkpoint=false, but {self.folder} holds checkpoints of steps {steps[::-1]}, which the "
                "next run of this id would take for its own: choose another trainer.id, or remove them"
            )
        for step in steps:
            path = self._path(step)
            try:
                description = read_description(path)
                check_files(path)
            except DamagedCheckpointError as error:
                refuse_foreign_files(path)
                logger.warning("the checkpoint %s is damaged and is left out: %s", path, error)
                continue
            self._check_same_run(path, description, arrays)
            return step
        if wanted:
            raise FileNotFoundError(f"trainer.load_checkpoint=true, but {self.folder} holds no whole checkpoint")
        return NONE_FOUND

    def _check_same_run(self, path: epath.Path, found: dict[str, Any], arrays: Mapping[str, jax.Array]) -> None:
        theirs = dict(found["identity"])
        shapes = theirs.pop("arrays")
        # If settings differ, they explain more than the arrays that they change.
        if different := differences(theirs, self.identity) or differences(shapes, _shapes(arrays)):
            raise ValueError(
                f"{path} is a checkpoint of another run:\n{listed(different)}\n"
                "Set these back to resume from it, or choose another trainer.id to begin anew."
            )
        if changed := differences(found["settings"], self.settings):
            logger.warning("since the checkpoint %s these settings have changed:\n%s", path, listed(changed))

    def _make_folder(self) -> None:
        """Makes the folder, checks that it is writable (before training), and removes unfinished checkpoints."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".writable-{uuid.uuid4().hex}"
            probe.write_text("")
            probe.unlink()
            for path in self._entries():
                if UNFINISHED_FOLDER.fullmatch(path.name):
                    logger.warning("the checkpoint %s was not finished and is left out", path)
                    path.rmtree()
        except OSError as error:
            raise OSError(
                f"{self.folder}: checkpoints cannot be written there ({error}). Set trainer.checkpointer.base_path, or "
                "trainer.log_dir, to a place where they can"
            ) from error

    def _check_shared_folder(self) -> None:
        """Raises ValueError unless all processes see one folder: each writes its part of a checkpoint there."""
        probe = self.folder / from_first_process(f".seen-by-all-{uuid.uuid4().hex}")
        if is_first_process():
            probe.write_text("")
        wait_for_all()
        deadline = time.monotonic() + SECONDS_TO_SEE
        while not (is_seen := probe.exists()) and time.monotonic() < deadline:
            time.sleep(0.5)
        seen = from_each_process("seen" if is_seen else "")
        if is_first_process():
            probe.unlink()
        if not all(seen):
            raise ValueError(
                f"{self.folder} is not the same folder on all processes: {[i for i, x in enumerate(seen) if not x]} do "
                "not see what process 0 writes there. Set trainer.checkpointer.base_path to one that all see, such as "
                "a gs:// URL"
            )

    def _finish(self, step: int) -> None:
        """In the background: waits until the checkpoint is complete, then deletes earlier temporary ones."""
        try:
            self._storage.wait()
        except Exception as error:
            raise self._not_written(step, error) from error
        logger.info("saved %s", self._path(step))
        if jax.process_index() == 0:
            for earlier in self._steps():
                if earlier < step and self._is_temporary(earlier):
                    self._path(earlier).rmtree()

    def _not_written(self, step: int, error: Exception) -> OSError:
        return OSError(f"the checkpoint {self._path(step)} could not be written; earlier ones are whole. {error}")

    def _is_temporary(self, step: int) -> bool:
        """False if its description cannot be read, so that it is not deleted."""
        try:
            return read_description(self._path(step))["is_temporary"]
        except DamagedCheckpointError:
            return False

    def _entries(self) -> list[epath.Path]:
        try:
            return list(self.folder.iterdir())
        except FileNotFoundError:  # in an object store, a folder without files does not exist
            return []

    def _steps(self) -> list[int]:
        names = (STEP_FOLDER.fullmatch(path.name) for path in self._entries())
        return [int(name[1]) for name in names if name]

    def _path(self, step: int) -> epath.Path:
        return self.folder / f"step-{step}"

    def _open(self) -> Any:
        if self._storage is None:
            # Not with the other imports: code that only needs the settings need not wait for Orbax.
            from lora_dpo_jax.checkpoints.arrays import CheckpointArrays

            self._storage = CheckpointArrays()
        return self._storage


def _named(arrays: Any, root: str = "") -> dict[str, jax.Array]:
    """The leaves by their dotted paths from the `root`, in the order of the tree."""
    leaves = jax.tree_util.tree_leaves_with_path({root: arrays} if root else arrays)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _filled(tree: T, names: Iterable[str], values: Mapping[str, jax.Array]) -> T:
    """The tree with the values of these names as its leaves."""
    return jax.tree.unflatten(jax.tree.structure(tree), [values[name] for name in names])


def _shapes(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    return {name: f"{array.dtype}{list(array.shape)}" for name, array in arrays.items()}


def _as_json(tree: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(tree, default=str))
