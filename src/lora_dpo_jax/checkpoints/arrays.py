"""The arrays of a checkpoint, written by Orbax in the background. A folder with its final name is complete.

Orbax writes into a folder with another name and renames it at the end. (On object stores, it writes a marker instead.)
"""

from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from lora_dpo_jax.checkpoints.files import describe


class CheckpointArrays:
    """Writes and reads named arrays, one set at a time. With several processes, all must make the same calls."""

    def __init__(self):
        self._handler = _DescribedArrays()
        self._orbax = ocp.AsyncCheckpointer(self._handler)

    def write(self, folder: epath.Path, arrays: Mapping[str, jax.Array], description: Mapping[str, Any]) -> None:
        """Returns once the arrays are copied to the host; `wait` returns when all are on disk.

        Replaces an existing `folder`. `description`: see `files.describe`.
        """
        self._orbax.wait_until_finished()
        self._handler.description = description  # no pending write could still use the former one
        self._orbax.save(folder, args=_Save(dict(arrays)), force=True)

    def wait(self) -> None:
        """Waits until the arrays are on disk. Raises the errors of the background."""
        self._orbax.wait_until_finished()

    def read(self, folder: epath.Path, like: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The arrays that `like` names, each sharded as its namesake, whatever devices it was written from."""
        shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in like.items()}
        places = {name: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape) for name, x in like.items()}
        return self._orbax.restore(folder, args=_Restore(item=shapes, restore_args=places, partial_restore=True))

    def close(self) -> None:
        self._orbax.close()


class _DescribedArrays(ocp.PyTreeCheckpointHandler):
    """Describes a folder of arrays before it gets its final name."""

    description: Mapping[str, Any]

    def finalize(self, directory: epath.Path) -> None:
        """Called on the first process, in the background, after all processes have written."""
        super().finalize(directory)
        describe(directory, self.description)


# Orbax finds the handler of a request by the request's type.
@ocp.args.register_with_handler(_DescribedArrays, for_save=True)
class _Save(ocp.args.PyTreeSave):
    pass


@ocp.args.register_with_handler(_DescribedArrays, for_restore=True)
class _Restore(ocp.args.PyTreeRestore):
    pass
