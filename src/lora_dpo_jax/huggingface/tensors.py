"""Reads safetensors files part by part, and writes them tensor by tensor."""

import copy
import json
import math
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import ml_dtypes
import numpy as np
from haliax import Axis
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lora_dpo_jax.json_objects import REQUIRED, read_json_object
from lora_dpo_jax.sharding import split_evenly

DTYPES = {
    "F64": "f8",
    "F32": "f4",
    "F16": "f2",
    "I64": "i8",
    "I32": "i4",
    "I16": "i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}
DTYPES |= {"BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
BLOCK_BYTES = 2**24  # of whole rows that are read at once to take some of their columns
METADATA = {"format": "pt"}  # transformers rejects files that do not declare PyTorch's layout
# How to convert files of other formats (.bin, .pth, .gguf), by the stem of the result.
CONVERSIONS = {
    "model": "transformers writes them: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER); for "
    "a .gguf, give the checkpoint that it was made from",
    "adapter_model": "PEFT writes them: PeftModel.from_pretrained(BASE_MODEL, FOLDER).save_pretrained(NEW_FOLDER)",
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's type and shape, from the header of its file."""

    dtype: str  # safetensors' name: F32, BF16, F8_E4M3, I64, BOOL
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        return int(bits.group()) // 8 if bits else 1  # BOOL takes a byte

    @property
    def is_float(self) -> bool:
        return self.dtype in DTYPES and not re.match("[IU]|BOOL", self.dtype)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.item_bytes


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file. Index it with slices, one for each of its first dimensions, to read that part.

    The file is not memory-mapped: reading some columns of each row would map all its pages into this process.
    """

    path: Path
    info: TensorInfo
    offset: int  # bytes before the tensor in the file

    @property
    def dtype(self) -> np.dtype:
        named = DTYPES.get(self.info.dtype)
        if named is None:
            raise ValueError(f"{self.path}: tensors of dtype {self.info.dtype} cannot be read, only {sorted(DTYPES)}")
        return np.dtype(named)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        if not self.info.shape:
            return self._rows(0, 1)[0]
        count, *inner = self.info.shape
        rows, *cuts = index or (slice(None),)
        start, stop, _ = rows.indices(count)
        sizes = [len(range(size)[cut]) for size, cut in zip(inner, cuts, strict=False)] + inner[len(cuts) :]
        if sizes == inner:
            return self._rows(start, stop)
        part = np.empty([stop - start, *sizes], self.dtype)
        step = max(1, BLOCK_BYTES // max(1, self.info.item_bytes * math.prod(inner)))
        for first in range(start, stop, step):
            block = self._rows(first, min(first + step, stop))
            part[first - start : first - start + len(block)] = block[(slice(None), *cuts)]
        return part

    def rows_of(self, matrix: int, start: int, stop: int) -> "LazyTensor":
        """Some rows of one matrix of a tensor {matrix, row, column}: these follow each other in the file."""
        _, rows, columns = self.info.shape
        before = (matrix * rows + start) * columns * self.info.item_bytes
        return LazyTensor(self.path, TensorInfo(self.info.dtype, (stop - start, columns)), self.offset + before)

    def _rows(self, start: int, stop: int) -> np.ndarray:
        inner = self.info.shape[1:]
        num_bytes = self.info.item_bytes * math.prod(inner)
        content = np.fromfile(self.path, np.uint8, (stop - start) * num_bytes, offset=self.offset + start * num_bytes)
        return content.view(self.dtype).reshape(stop - start, *inner)


class TensorFiles:
    """The tensors of a folder, in one file `stem`.safetensors or in several with an index. Reads only headers.

    If both exist, the single file is used, as in transformers. The index must be valid all the same.
    """

    def __init__(self, folder: Path, stem: str = "model"):
        self.folder = folder
        self._single, self._index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
        self._opened: dict[str, dict[str, LazyTensor]] = {}
        file_of = _read_index(folder / self._index) if (folder / self._index).exists() else None
        self._is_sharded = not (folder / self._single).exists()
        if not self._is_sharded:
            file_of = dict.fromkeys(self._tensors_of(self._single), self._single)
        if file_of is None:
            raise FileNotFoundError(f"{folder}: neither {self._single} nor {self._index} {instead(folder, stem)}")
        self._file_of = file_of
        self._name_in_file: dict[str, str] = {}  # of renamed tensors
        self._elsewhere: Mapping[str, Any] = {}  # views

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys([*self._file_of, *self._elsewhere]))

    @property
    def files(self) -> list[Path]:
        """All that is read to find the tensors."""
        index = [self._index] if self._is_sharded else []
        return [self.folder / name for name in [*index, *sorted(set(self._file_of.values()))]]

    def renamed(self, names: Mapping[str, str]) -> "TensorFiles":
        """The same files, with each tensor in `names` under its new name."""
        other = copy.copy(self)
        other._file_of = {names.get(name, name): file for name, file in self._file_of.items()}
        other._name_in_file = {names.get(name, name): self._name_in_file.get(name, name) for name in self._file_of}
        return other

    def only(self, tensors: Mapping[str, Any]) -> "TensorFiles":
        """The same files, with nothing but these lazy tensors of them, by other names."""
        other = copy.copy(self)
        other._file_of, other._elsewhere = {}, tensors
        return other

    def without(self, names: Collection[str]) -> "TensorFiles":
        """The same files, without these tensors."""
        other = copy.copy(self)
        other._file_of = {name: file for name, file in self._file_of.items() if name not in names}
        return other

    def replaced(self, tensors: Mapping[str, Any]) -> "TensorFiles":
        """The same files, with these lazy tensors in the place of those of their names, or beside them."""
        other = copy.copy(self)
        other._elsewhere = {**self._elsewhere, **tensors}
        return other

    def shape(self, name: str) -> tuple[int, ...]:
        return self.info(name).shape

    def info(self, name: str) -> TensorInfo:
        return self.view(name).info

    def view(self, name: str) -> Any:
        """The lazy tensor: a `LazyTensor`, or one of `views`."""
        if name in self._elsewhere:
            return self._elsewhere[name]
        file, name = self._file_of[name], self._name_in_file.get(name, name)
        tensors = self._tensors_of(file)
        if name not in tensors:
            raise ValueError(f"{self.folder / file}: tensor {name} is missing, though {self._index} names it")
        return tensors[name]

    def read(self, name: str) -> np.ndarray:
        """The whole tensor, in the file's dtype."""
        return self.view(name)[()]

    def _tensors_of(self, name: str) -> dict[str, LazyTensor]:
        if name not in self._opened:
            path = self.folder / name
            if not os.path.exists(path):  # also if the name is too long for the file system
                raise FileNotFoundError(f"{path} is missing, though {self._index} names it")
            try:
                with safe_open(path, framework="numpy"):  # it checks the file against its header
                    self._opened[name] = _tensors_in(path)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is no safetensors file, or only part of one: {error}") from error
        return self._opened[name]


def instead(folder: Path, stem: str = "model") -> str:
    """The end of a message about a folder without safetensors: what to do."""
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else "no such folder"
    return f"(no other format is read). {CONVERSIONS[stem]}; found {found}"


def write_shards(
    folder: Path, tensors: Mapping[str, TensorInfo], read: Callable[[str], np.ndarray], *, max_shard_bytes: int
) -> None:
    """Writes the tensor that `read` returns for each name, and an index if there are several files.

    Only one tensor at a time is in memory. Raises ValueError if a tensor does not match `tensors`.
    """
    shards = _names_of_shards({name: info.num_bytes for name, info in tensors.items()}, max_shard_bytes)
    if len(shards) == 1:
        return _stream(folder / "model.safetensors", {name: tensors[name] for name in shards[0]}, read)
    file_of = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _stream(folder / file, {name: tensors[name] for name in names}, read)
        file_of |= dict.fromkeys(names, file)
    total = sum(info.num_bytes for info in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes one file."""
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path, metadata=METADATA)


def sharded_array(
    views: Sequence[Any], sides: Sequence[tuple[Axis, ...]], axes: tuple[Axis, ...], mapping: Any, dtype: Any
) -> jax.Array:
    """An array with `axes`, from one lazy tensor or a stack of several. Each device reads only its part.

    `sides` are the axes that each dimension of a tensor on disk combines. `axes` are the axes of the stack, if any, and
    then those of the sides in any order. `views` come in the order of the stack's axes. None as a view means zeros.
    """
    depth = len(axes) - sum(len(side) for side in sides)
    stacked = np.empty(len(views), object)
    stacked[:] = views
    stacked = stacked.reshape([axis.size for axis in axes[:depth]])

    def read(index: Any) -> np.ndarray:
        chosen, cuts = stacked[index[:depth]], index[depth:]
        shape = [len(range(axis.size)[cut]) for axis, cut in zip(axes[depth:], cuts, strict=True)]
        values = np.zeros([*np.shape(chosen), *shape], dtype)
        for at in np.ndindex(np.shape(chosen)):
            view = chosen[at] if depth else chosen
            if view is not None:
                values[at] = _read_part(view, sides, axes[depth:], cuts)
        return values

    return jax.make_array_from_callback(tuple(axis.size for axis in axes), array_sharding(axes, mapping), read)


def array_sharding(axes: tuple[Axis, ...], mapping: Any) -> jax.sharding.Sharding:
    """`mapping` goes from axis name to mesh axis. None: the whole array is on the first device."""
    if mapping is None:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return split_evenly(axes, mapping)


def abridged(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _read_part(
    view: Any, sides: Sequence[tuple[Axis, ...]], axes: Sequence[Axis], index: Sequence[slice]
) -> np.ndarray:
    """The part at `index`, one slice for each of `axes`. A side's outermost axis is cut on disk, others in memory."""
    cuts = dict(zip(axes, index, strict=True))
    on_disk, shape, in_memory = [], [], []
    for outer, *inner in sides:
        start, stop, _ = cuts[outer].indices(outer.size)
        size = math.prod(axis.size for axis in inner)
        on_disk.append(slice(start * size, stop * size))
        shape += [stop - start, *(axis.size for axis in inner)]
        in_memory += [slice(None), *(cuts[axis] for axis in inner)]
    part = view[tuple(on_disk)].reshape(shape)[tuple(in_memory)]
    order = [axis for side in sides for axis in side]
    return part.transpose([order.index(axis) for axis in axes])


def _read_index(path: Path) -> dict[str, str]:
    """The file of each tensor."""
    weight_map = read_json_object(path).object("weight_map", REQUIRED)
    assert weight_map is not None
    for name in weight_map.values:
        weight_map.taken(name, REQUIRED, _is_shard, "the path of a .safetensors file within its folder")
    return dict(weight_map.values)


def _is_shard(file: Any) -> bool:
    # Only the text of the path counts: in the hub's cache, every file is a link out of its folder.
    path = PurePosixPath(file) if isinstance(file, str) else PurePosixPath("..")
    return path.suffix == ".safetensors" and ".." not in path.parts and not path.is_absolute() and "\\" not in str(file)


def _tensors_in(path: Path) -> dict[str, LazyTensor]:
    """A file has (https://github.com/huggingface/safetensors) the header's size in 8 bytes, a JSON header, tensors."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {
        name: LazyTensor(path, TensorInfo(found["dtype"], tuple(found["shape"])), 8 + size + found["data_offsets"][0])
        for name, found in header.items()
        if name != "__metadata__"
    }


def _stream(path: Path, tensors: Mapping[str, TensorInfo], read: Callable[[str], np.ndarray]) -> None:
    """Writes one file of https://github.com/huggingface/safetensors, whose library needs all tensors at once."""
    # The widest items first, so that each tensor begins at a multiple of its item size.
    names = sorted(tensors, key=lambda name: -tensors[name].item_bytes)
    header: dict[str, Any] = {"__metadata__": METADATA}
    end = 0
    for name in names:
        info, start = tensors[name], end
        end = start + info.num_bytes
        header[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name in names:
            file.write(_content(name, read(name), tensors[name]))


def _content(name: str, tensor: np.ndarray, info: TensorInfo) -> memoryview:
    if (tensor.shape, tensor.nbytes) != (info.shape, info.num_bytes):
        raise ValueError(f"tensor {name} is {tensor.dtype} {tensor.shape}, not {info}")
    return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data


def _names_of_shards(num_bytes: dict[str, int], max_shard_bytes: int) -> list[list[str]]:
    """The tensors of each shard, in their order. A new shard begins when the next tensor would not fit."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, more in num_bytes.items():
        if shards[-1] and size + more > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += more
    return shards
