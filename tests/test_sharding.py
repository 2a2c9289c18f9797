"""Meshes: what configurations mean, and what cannot be."""

import draccus
import haliax as hax
import jax
import numpy as np
import pytest
from tiny_pairs import named

from lora_dpo_jax.sharding import MeshConfig, Placement


@pytest.mark.parametrize(
    "text, shape",
    [
        ("{}", {"replica": 1, "data": 8, "model": 1}),
        ("axes: {model: 2}", {"replica": 1, "data": 4, "model": 2}),
        ("axes: {data: 4, model: 2}", {"replica": 1, "data": 4, "model": 2}),
        ("axes: {data: 2, model: -1}", {"replica": 1, "data": 2, "model": 4}),
        ("axes: {model: -1}", {"replica": 1, "data": 1, "model": 8}),
        ("axes: {replica: -1}", {"replica": 8, "data": 1, "model": 1}),
        ("axes: {replica: 2, data: 2, model: 2}", {"replica": 2, "data": 2, "model": 2}),
    ],
)
def test_a_mesh_takes_all_devices(text, shape):
    config = draccus.loads(MeshConfig, text)
    assert dict(config.mesh().shape) == {"replica_dcn": 1} | shape
    assert list(config.mesh().devices.flat) == jax.devices()


@pytest.mark.parametrize(
    "axes",
    [{"data": 3}, {"data": 4}, {"model": 3}, {"model": 16}, {"replica": 8, "data": 2}],
    ids=str,
)
def test_devices_that_do_not_fill_the_mesh_are_an_error(axes):
    with pytest.raises(ValueError, match=r"trainer\.mesh\.axes=.* cannot be filled by 8 devices"):
        Placement(MeshConfig(axes))


@pytest.mark.parametrize("axes", [{"data": 0}, {"model": -2}, {"data": -1, "model": -1}], ids=str)
def test_impossible_sizes_are_errors(axes):
    with pytest.raises(ValueError, match=r"trainer\.mesh\.axes=.*: sizes are positive, and at most one is -1"):
        MeshConfig(axes)


@pytest.mark.parametrize("mapping", ["shared_mapping", "compute_mapping", "param_mapping"])
def test_mappings_name_axes_of_the_mesh(mapping):
    with pytest.raises(ValueError, match=rf"trainer\.mesh\.{mapping}={{'row': 'date'}}.*\['data', 'model'.*'date'"):
        MeshConfig(**{mapping: {"row": "date"}})


def test_a_mesh_can_have_fewer_devices():
    assert MeshConfig({"model": 2}).mesh(jax.devices()[:2]).shape == {
        "replica_dcn": 1,
        "replica": 1,
        "data": 1,
        "model": 2,
    }


class SlicedDevice:
    """Stands for a device of a machine with several slices."""

    platform = device_kind = "gpu"

    def __init__(self, number: int, of_slice: int):
        self.id, self.slice_index, self.process_index = number, of_slice, of_slice


TWO_SLICES = [SlicedDevice(number, number // 4) for number in range(8)]


@pytest.mark.parametrize(
    "config, sizes, between_slices",
    [
        (MeshConfig(), {"replica_dcn": 2, "data": 4}, "replica_dcn"),
        (MeshConfig({"model": 2}), {"replica_dcn": 2, "data": 2, "model": 2}, "replica_dcn"),
        (MeshConfig({"model": 2}, dcn_axes={"data": 2}), {"data": 4, "model": 2}, "data"),
        (MeshConfig({"data": 4}, dcn_axes={"replica": -1}), {"replica": 2, "data": 4}, "replica"),
    ],
)
def test_only_the_axes_named_for_it_lead_from_slice_to_slice(config, sizes, between_slices):
    mesh = config.mesh(TWO_SLICES)
    assert {name: size for name, size in mesh.shape.items() if size > 1} == sizes
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    for index, name in enumerate(mesh.axis_names):
        assert np.any(np.diff(slices, axis=index)) == (name == between_slices), name


@pytest.mark.parametrize(
    "config, message",
    [
        (MeshConfig({"data": 8}), r"trainer\.mesh\.axes=.* cannot be filled by 8 devices in 2 slices"),
        (MeshConfig(dcn_axes={"replica_dcn": 1}), r"trainer\.mesh\.dcn_axes=.* cannot be filled by 2 slices"),
        (MeshConfig(dcn_axes={"data": 3}), r"trainer\.mesh\.dcn_axes=.* cannot be filled by 2 slices"),
    ],
)
def test_slices_that_do_not_fill_the_mesh_are_an_error(config, message):
    with pytest.raises(ValueError, match=message):
        config.mesh(TWO_SLICES)


def test_attention_is_not_cut_within_a_head_or_a_row():
    with pytest.raises(ValueError, match=r"shared_mapping={'heads': 'model'}: \['heads'\] cannot be split, only"):
        MeshConfig(shared_mapping={"heads": "model"})
    with pytest.raises(ValueError, match=r"\['position'\] cannot be split"):
        MeshConfig(compute_mapping={"position": "data"})


def test_sizes_that_do_not_divide_are_named():
    placement = Placement(MeshConfig({"model": 8}))
    weight = named(np.ones((4, 8), np.float32), "kv_head", "embed")
    with pytest.raises(ValueError, match=r"splits kv_head over model \(8\), .* the 4 of .*\{kv_head: 4, embed: 8\}"):
        placement.put_parameters({"q_proj": weight})
    rows = named(np.ones((6, 8), np.int32), "row", "position")
    with pytest.raises(ValueError, match=r"row over replica_dcn \(1\) x replica \(2\) x data \(4\), .* the 6 of"):
        Placement(MeshConfig({"replica": 2})).put_batch(rows)


def test_no_array_is_split_twice_over_the_same_devices():
    config = MeshConfig({"model": 2}, param_mapping={"embed": "data", "vocab": "data"})
    with pytest.raises(ValueError, match=r"splits both vocab and embed over data, but an array has both \({vocab: 8, "):
        Placement(config).put_parameters(named(np.ones((8, 8), np.float32), "vocab", "embed"))


@pytest.mark.parametrize(
    "axes, shards", [({}, 8), ({"model": 2}, 4), ({"replica": 2, "model": 2}, 4), ({"data": 1, "model": 8}, 1)]
)
def test_rows_are_shared_by_the_devices_of_replica_and_data(axes, shards):
    assert Placement(MeshConfig(axes)).row_shards == shards


def test_weights_are_split_over_data_and_model_and_rows_over_replica_and_data():
    placement = Placement(MeshConfig({"replica": 2, "data": 2, "model": 2}))
    weight = placement.put_parameters(named(np.ones((8, 4, 6), np.float32), "embed", "mlp", "other"))
    assert weight.array.sharding.shard_shape(weight.array.shape) == (4, 2, 6)
    rows = placement.put_batch(named(np.ones((8, 5), np.int32), "row", "position"))
    assert rows.array.sharding.shard_shape(rows.array.shape) == (2, 5)
    assert len(rows.array.sharding.device_set) == 8


def test_what_has_no_axes_is_whole_on_every_device_and_holes_stay_holes():
    placement = Placement(MeshConfig())
    tree = {"key": jax.random.key(0), "step": np.int32(3), "hole": None}
    placed = placement.put_parameters(tree)
    assert placed["hole"] is None
    assert placed["step"].sharding.is_fully_replicated and placed["key"].sharding.is_fully_replicated
    emptied = jax.tree.map(lambda _: None, named(np.ones(8), "embed"))
    assert jax.tree.structure(placement.put_parameters(emptied)) == jax.tree.structure(emptied)


def test_inside_its_scope_activations_are_split():
    placement = Placement(MeshConfig({"model": 2}))
    with placement.scope():
        out = jax.jit(lambda: hax.auto_sharded(hax.ones((hax.Axis("row", 8), hax.Axis("mlp", 6)))))()
    assert out.array.sharding.shard_shape(out.array.shape) == (2, 3)
