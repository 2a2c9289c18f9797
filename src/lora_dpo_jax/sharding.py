"""Which mesh axis each array axis is split over. Layers never mention devices; these mappings do."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
from haliax import Axis, NamedArray
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_dpo_jax.axes import EMBED, KV_HEAD, MLP, ROW, SPLITTABLE

AxisMapping = Mapping[str, Any]
MeshAxes = str | list[str] | None  # the mesh axes that an array axis is split over


@dataclass(frozen=True)
class MeshConfig:
    """A mesh of devices, and the array axes that its axes split.

    `replica` and `data` split the rows of a batch; `data` splits the weights too (fully sharded data parallelism) and
    `model` splits the inside of each layer (tensor parallelism). `replica_dcn` is `replica` across slices.
    """

    # Sizes within a slice, whose devices a fast network joins. -1 takes the remaining devices.
    axes: dict[str, int] = field(default_factory=lambda: {"replica": 1, "data": -1, "model": 1})
    # Sizes across slices. An axis that is also in `axes` gets the product of both sizes; -1 takes the remaining slices.
    dcn_axes: dict[str, int] = field(default_factory=lambda: {"replica_dcn": -1})
    # From array axes to the mesh axes that split them, in weights and activations.
    shared_mapping: dict[str, MeshAxes] = field(default_factory=lambda: {MLP: "model", KV_HEAD: "model"})
    # Likewise, in activations.
    compute_mapping: dict[str, MeshAxes] = field(default_factory=lambda: {ROW: ["replica_dcn", "replica", "data"]})
    param_mapping: dict[str, MeshAxes] = field(default_factory=lambda: {EMBED: "data"})  # likewise, in weights

    def __post_init__(self):
        object.__setattr__(self, "axes", _with_defaults("axes", self.axes, {"replica": 1, "data": -1, "model": 1}))
        object.__setattr__(self, "dcn_axes", _with_defaults("dcn_axes", self.dcn_axes, {"replica_dcn": -1}))
        for name in ("shared_mapping", "compute_mapping", "param_mapping"):
            mapping = getattr(self, name)
            if unknown := {axis for value in mapping.values() for axis in _as_tuple(value)} - set(self._names):
                raise ValueError(
                    f"trainer.mesh.{name}={mapping}: the mesh has {sorted(self._names)}, no {sorted(unknown)}"
                )
            if unknown := mapping.keys() - SPLITTABLE:
                raise ValueError(
                    f"trainer.mesh.{name}={mapping}: {sorted(unknown)} cannot be split, only {sorted(SPLITTABLE)}"
                )

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*self.dcn_axes, *self.axes]))

    def mesh(self, devices: list | None = None) -> Mesh:
        """The mesh; its neighbours are neighbours in the network. Raises ValueError if the devices do not fill it."""
        devices = devices if devices is not None else jax.devices()
        num_slices = len({_slice_of(device) for device in devices})
        dcn = _filled("dcn_axes", self.dcn_axes, num_slices, f"{num_slices} slices")
        where = f"{len(devices)} devices" + (f" in {num_slices} slices" if num_slices > 1 else "")
        inner = _filled("axes", self.axes, len(devices) / num_slices, where)
        sizes = [inner.get(name, 1) for name in self._names]
        if num_slices > 1:
            across = [dcn.get(name, 1) for name in self._names]
            arranged = mesh_utils.create_hybrid_device_mesh(sizes, across, devices, allow_split_physical_axes=True)
        else:
            arranged = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(arranged, self._names)

    @property
    def compute(self) -> AxisMapping:
        """The mapping of activations."""
        return self._mapping(self.compute_mapping)

    @property
    def parameters(self) -> AxisMapping:
        """The mapping of weights and adapters."""
        return self._mapping(self.param_mapping)

    def _mapping(self, own: dict[str, Any]) -> AxisMapping:
        return {name: _mesh_axes(axes) for name, axes in (self.shared_mapping | own).items()}


def split_evenly(axes: Sequence[Axis], mapping: AxisMapping, mesh: Mesh | None = None) -> NamedSharding:
    """The sharding of an array with `axes`, by default over the mesh in scope.

    Raises ValueError if an axis cannot be cut into equal parts, or if two axes would be split over the same mesh axis.
    """
    sizes = hax.partitioning.sharding_for_axis((), mapping, mesh).mesh.shape
    shape = ", ".join(f"{axis.name}: {axis.size}" for axis in axes)
    taken: dict[str, str] = {}
    for axis in axes:
        names = _as_tuple(mapping.get(axis.name))
        for name in names:
            if name in taken:
                raise ValueError(
                    f"trainer.mesh splits both {taken[name]} and {axis.name} over {name}, but an array has both "
                    f"({{{shape}}}): leave one of them out of trainer.mesh's mappings"
                )
            taken[name] = axis.name
        if axis.size % math.prod(sizes[name] for name in names):
            over = " x ".join(f"{name} ({sizes[name]})" for name in names)
            raise ValueError(
                f"trainer.mesh splits {axis.name} over {over}, which does not divide the {axis.size} of an array "
                f"{{{shape}}}. Change trainer.mesh.axes, or leave {axis.name} out of trainer.mesh's mappings, so that "
                "every device has it whole."
            )
    return hax.partitioning.sharding_for_axis(tuple(axes), mapping, mesh)


def row_shards() -> int:
    """The number of groups of devices that the mesh in scope splits the rows of a batch over; 1 without a mesh."""
    mesh, mapping = jax.sharding.get_abstract_mesh(), hax.partitioning.current_thread_local_mapping()
    if mesh.empty or mapping is None:
        return 1
    return math.prod(mesh.shape[axis] for axis in _as_tuple(mapping.get(ROW)))


def zeros(axes: Sequence[Axis], dtype: Any) -> NamedArray:
    """Zeros on the devices, split as the scope splits activations. Made without a program."""
    array, mapping = np.zeros([axis.size for axis in axes], dtype), hax.partitioning.current_thread_local_mapping()
    if jax.sharding.get_abstract_mesh().empty or mapping is None:
        return NamedArray(jax.device_put(array), tuple(axis.name for axis in axes))
    return NamedArray(_put(array, split_evenly(axes, mapping)), tuple(axis.name for axis in axes))


def gathered(tree: Any) -> Any:
    """Gathers weights for a computation, once and at this point of the program, not where XLA would choose.

    Without a mesh in scope, returns the tree itself.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return tree

    def constrain(leaf: Any) -> Any:
        if not isinstance(leaf, NamedArray) or leaf.array is None:
            return leaf
        # hax.auto_sharded adds no constraint if the array should be whole on every device.
        whole = jax.lax.with_sharding_constraint(leaf.array, hax.partitioning.pspec_for_axis(leaf.axes))
        return NamedArray(jax.lax.optimization_barrier(whole), leaf.axis_names)

    return jax.tree.map(constrain, tree, is_leaf=lambda leaf: isinstance(leaf, NamedArray))


def _with_defaults(setting: str, given: dict[str, int], default: dict[str, int]) -> dict[str, int]:
    """Adds the axes that are not given. The default's -1 takes the remaining devices only if no given axis does."""
    if -1 in given.values():
        default = {name: 1 for name in default}
    axes = default | given
    if any(size < 1 and size != -1 for size in axes.values()) or list(axes.values()).count(-1) > 1:
        raise ValueError(f"trainer.mesh.{setting}={axes}: sizes are positive, and at most one is -1 (the rest)")
    return axes


def _filled(setting: str, axes: dict[str, int], count: float, what: str) -> dict[str, int]:
    """Sizes whose product is `count`."""
    rest = int(count) // math.prod(size for size in axes.values() if size != -1)
    sizes = {name: rest if size == -1 else size for name, size in axes.items()}
    if math.prod(sizes.values()) != count:
        raise ValueError(f"trainer.mesh.{setting}={axes} cannot be filled by {what}")
    return sizes


def _slice_of(device: Any) -> int:
    return getattr(device, "slice_index", 0) or 0


def _mesh_axes(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_tuple(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


class Placement:
    """A mesh, and how arrays are placed on it."""

    def __init__(self, config: MeshConfig, devices: list | None = None):
        """Raises ValueError if the devices do not fill the mesh."""
        self.mesh = config.mesh(devices)
        self.compute, self.parameters = config.compute, config.parameters
        # The number of groups of devices that the rows of a batch are split over.
        self.row_shards = math.prod(self.mesh.shape[axis] for axis in _as_tuple(self.compute.get(ROW)))

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Inside, haliax splits activations over the mesh."""
        with hax.partitioning.set_mesh(self.mesh), hax.axis_mapping(self.compute):
            yield

    def put_batch(self, batch: Any) -> Any:
        """Each process must have the whole batch. It puts on its devices their rows of the batch."""
        return self._place(batch, self.compute, _put)

    def put_parameters(self, tree: Any) -> Any:
        return self._place(tree, self.parameters, _put)

    def abstract_batch(self, batch: Any) -> Any:
        """The result of `put_batch` as ShapeDtypeStructs, for compiling without arrays or without the devices."""
        return self._place(batch, self.compute, _abstract)

    def abstract_parameters(self, tree: Any) -> Any:
        return self._place(tree, self.parameters, _abstract)

    def _place(self, tree: Any, mapping: AxisMapping, place: Callable[[Any, NamedSharding], Any]) -> Any:
        """NamedArrays are split by `mapping`, other arrays are whole on every device."""

        def put(leaf):
            if isinstance(leaf, NamedArray):
                if leaf.array is None:  # the other part of a partitioned tree
                    return leaf
                return NamedArray(place(leaf.array, split_evenly(leaf.axes, mapping, self.mesh)), leaf.axis_names)
            return place(leaf, NamedSharding(self.mesh, PartitionSpec()))

        return jax.tree.map(put, tree, is_leaf=lambda leaf: isinstance(leaf, NamedArray))


def whole(tree: Any) -> Any:
    """In a program: its arrays, whole on every device of the mesh in scope."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, jax.tree.map(lambda _: PartitionSpec(), tree))


def on_host(array: jax.Array) -> np.ndarray:
    """The whole array. All processes must call this, because it fetches the parts on other processes."""
    if not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def _put(array: Any, sharding: NamedSharding) -> jax.Array:
    is_here = not isinstance(array, jax.Array) or array.is_fully_addressable
    if sharding.is_fully_addressable or not is_here:
        return jax.device_put(array, sharding)
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(array), sharding), impl=jax.random.key_impl(array))
    # Not device_put, which makes all processes compare their values, and waits for them.
    values = np.asarray(array)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def _abstract(array: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
