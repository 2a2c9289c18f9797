"""Which mesh axis each array axis is split over. Layers never mention devices; these mappings do."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
from haliax import NamedArray
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AxisMapping = Mapping[str, Any]


@dataclass(frozen=True)
class MeshConfig:
    """A mesh of devices, and the array axes that its axes split.

    `replica` and `data` split the rows of a batch; `data` splits the weights too (fully sharded data parallelism) and
    `model` splits the inside of each layer (tensor parallelism).
    """

    # Sizes; -1 takes the devices that are left.
    axes: dict[str, int] = field(default_factory=lambda: {"replica": 1, "data": -1, "model": 1})
    shared_mapping: dict[str, str] = field(default_factory=lambda: {"mlp": "model", "kv_head": "model"})
    compute_mapping: dict[str, Any] = field(default_factory=lambda: {"row": ["replica", "data"]})
    param_mapping: dict[str, Any] = field(default_factory=lambda: {"embed": "data"})

    def __post_init__(self):
        named = {"replica": 1, "data": -1, "model": 1} | self.axes
        if sum(size == -1 for size in named.values()) > 1 and self.axes.get("data") != -1:
            named["data"] = self.axes.get("data", 1)
        object.__setattr__(self, "axes", named)
        if any(size < 1 and size != -1 for size in named.values()) or sum(s == -1 for s in named.values()) > 1:
            raise ValueError(f"trainer.mesh.axes={named}: sizes are positive, and at most one is -1 (the rest)")
        for name in ("shared_mapping", "compute_mapping", "param_mapping"):
            mapping = getattr(self, name)
            if unknown := {axis for value in mapping.values() for axis in _as_tuple(value)} - named.keys():
                raise ValueError(f"trainer.mesh.{name}={mapping}: the mesh has {sorted(named)}, no {sorted(unknown)}")

    def mesh(self, devices: list | None = None) -> Mesh:
        """Raises ValueError if the devices do not fill the mesh."""
        devices = devices if devices is not None else jax.devices()
        given = math.prod(size for size in self.axes.values() if size != -1)
        sizes = [len(devices) // given if size == -1 else size for size in self.axes.values()]
        if math.prod(sizes) != len(devices):
            raise ValueError(f"trainer.mesh.axes={self.axes} cannot be filled by {len(devices)} devices")
        return Mesh(np.array(devices).reshape(sizes), tuple(self.axes))

    @property
    def compute(self) -> AxisMapping:
        """For activations."""
        return self.shared_mapping | {k: _mesh_axes(v) for k, v in self.compute_mapping.items()}

    @property
    def parameters(self) -> AxisMapping:
        """For weights and adapters."""
        return self.shared_mapping | {k: _mesh_axes(v) for k, v in self.param_mapping.items()}


def _mesh_axes(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_tuple(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


class Placement:
    """A mesh and what goes where on it."""

    def __init__(self, config: MeshConfig, devices: list | None = None):
        """Raises ValueError if the devices do not fill the mesh."""
        self.mesh = config.mesh(devices)
        self.compute, self.parameters = config.compute, config.parameters
        # How many groups of devices share the rows of a batch.
        self.row_shards = math.prod(self.mesh.shape[axis] for axis in _as_tuple(self.compute.get("row")))

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Inside, haliax splits activations over the mesh."""
        with hax.partitioning.set_mesh(self.mesh), hax.axis_mapping(self.compute):
            yield

    def put_batch(self, batch: Any) -> Any:
        """Of several processes, each must have the whole batch, and gives its devices their rows of it."""
        return self._place(batch, self.compute, _put)

    def put_parameters(self, tree: Any) -> Any:
        return self._place(tree, self.parameters, _put)

    def describe_batch(self, batch: Any) -> Any:
        """What `put_batch` would give, as ShapeDtypeStructs: for compiling without arrays, or without the devices."""
        return self._place(batch, self.compute, _described)

    def describe_parameters(self, tree: Any) -> Any:
        return self._place(tree, self.parameters, _described)

    def _place(self, tree: Any, mapping: AxisMapping, place: Callable[[Any, NamedSharding], Any]) -> Any:
        """NamedArrays are split by `mapping`, other arrays are whole on every device."""

        def put(leaf):
            if isinstance(leaf, NamedArray):
                if leaf.array is None:  # the other part of a partitioned tree
                    return leaf
                sharding = hax.partitioning.sharding_for_axis(leaf.axes, mapping, self.mesh)
                return NamedArray(place(leaf.array, sharding), leaf.axis_names)
            return place(leaf, NamedSharding(self.mesh, PartitionSpec()))

        return jax.tree.map(put, tree, is_leaf=lambda leaf: isinstance(leaf, NamedArray))


def on_host(array: jax.Array) -> np.ndarray:
    """All of an array. What lies with other processes is fetched: all of them must call this."""
    if not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def _put(array: Any, sharding: NamedSharding) -> jax.Array:
    is_here = not isinstance(array, jax.Array) or array.is_fully_addressable
    if sharding.is_fully_addressable or not is_here:
        return jax.device_put(array, sharding)
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(array), sharding), impl=jax.random.key_impl(array))
    # Not device_put, which lets all processes compare what they give, and waits for them.
    values = np.asarray(array)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def _described(array: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
