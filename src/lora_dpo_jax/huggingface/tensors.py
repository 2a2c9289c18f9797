"""safetensors files: read tensor by tensor, part by part, and written shard by shard."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from haliax import Axis
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lora_dpo_jax.sharding import split_evenly


class TensorFiles:
    """The tensors of a folder, in one file `stem`.safetensors or in several with an index. Nothing is read yet."""

    def __init__(self, folder: Path, stem: str = "model"):
        self.folder = folder
        self._single, self._index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
        self._opened: dict[str, Any] = {}
        if (folder / self._index).exists():
            self._file_of: dict[str, str] = json.loads((folder / self._index).read_text())["weight_map"]
        elif (folder / self._single).exists():
            self._file_of = dict.fromkeys(self._file(self._single).keys(), self._single)
        else:
            found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else "no such folder"
            raise FileNotFoundError(
                f"{folder}: neither {self._single} nor {self._index} (no other format is read); found {found}"
            )

    @property
    def names(self) -> list[str]:
        return list(self._file_of)

    @property
    def files(self) -> list[Path]:
        """All that is read to find the tensors."""
        index = [self._index] if (self.folder / self._index).exists() else []
        return [self.folder / name for name in [*index, *sorted(set(self._file_of.values()))]]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.view(name).get_shape())

    def num_bytes(self, name: str) -> int:
        bits = re.search(r"\d+", self.view(name).get_dtype())  # BF16, F8_E4M3, I64; BOOL takes a byte
        return int(np.prod(self.shape(name))) * (int(bits.group()) // 8 if bits else 1)

    def view(self, name: str) -> Any:
        """A lazy tensor: index it to read just that part."""
        file = self._file(self._file_of[name])
        try:
            return file.get_slice(name)
        except SafetensorError as error:
            raise ValueError(
                f"{self.folder / self._file_of[name]}: tensor {name} is missing, though {self._index} names it"
            ) from error

    def read(self, name: str) -> np.ndarray:
        """The whole tensor, in the file's dtype."""
        self.view(name)
        return self._file(self._file_of[name]).get_tensor(name)

    def _file(self, name: str) -> Any:
        if name not in self._opened:
            path = self.folder / name
            if not path.exists():
                raise FileNotFoundError(f"{path} is missing, though {self._index} names it")
            try:
                self._opened[name] = safe_open(path, framework="numpy").__enter__()
            except SafetensorError as error:
                raise ValueError(f"{path} is no safetensors file, or only part of one: {error}") from error
        return self._opened[name]


def write_shards(
    folder: Path, num_bytes: dict[str, int], read: Callable[[str], np.ndarray], *, max_shard_bytes: int
) -> None:
    """Writes the tensors named in `num_bytes`, holding one shard at a time in memory; an index if there are several."""
    shards = _plan(num_bytes, max_shard_bytes)
    if len(shards) == 1:
        return write_tensors(folder / "model.safetensors", {name: read(name) for name in shards[0]})
    file_of = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, {name: read(name) for name in names})
        file_of |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(num_bytes.values())}, "weight_map": dict(sorted(file_of.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """One file. transformers refuses files that do not say they hold PyTorch's layout."""
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def sharded_array(axes: tuple[Axis, ...], mapping: Any, read: Callable[[Any], np.ndarray]) -> jax.Array:
    """An array with `axes`, of which each device gets the part that `read` gives for its slices, one per axis."""
    return jax.make_array_from_callback(tuple(axis.size for axis in axes), array_sharding(axes, mapping), read)


def array_sharding(axes: tuple[Axis, ...], mapping: Any) -> jax.sharding.Sharding:
    """`mapping` goes from axis name to mesh axis; None means all of it on the first device."""
    if mapping is None:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return split_evenly(axes, mapping)


def abridged(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _plan(num_bytes: dict[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Tensors in their order, a new shard beginning where the next one would not fit."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, more in num_bytes.items():
        if shards[-1] and size + more > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += more
    return shards
