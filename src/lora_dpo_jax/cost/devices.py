"""The performance of devices, from their makers' data sheets, and descriptions of devices that are not present."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from lora_dpo_jax.cost.gpus import GPUS, installed_plugin, target_config


@dataclass(frozen=True)
class DeviceKind:
    """One chip."""

    name: str  # the name for users
    jax_name: str  # a part of JAX's name (`device_kind`)
    flops: float  # dense bfloat16 products, FLOP/s
    memory: float  # bytes that a program can use
    memory_bandwidth: float  # bytes/s
    interconnect: float  # bytes/s to the other chips of its slice or host, one way, all links together

    @property
    def is_tpu(self) -> bool:
        return self.jax_name.startswith("TPU")


GIB = 2**30
# If a JAX name begins with another one, the longer name comes first.
DEVICE_KINDS = (
    DeviceKind("v4", "TPU v4", 275e12, 30.75 * GIB, 1228e9, 300e9),
    DeviceKind("v5e", "TPU v5 lite", 197e12, 15.75 * GIB, 819e9, 200e9),
    DeviceKind("v5p", "TPU v5", 459e12, 95.74 * GIB, 2765e9, 600e9),
    DeviceKind("v6e", "TPU v6 lite", 918e12, 31.25 * GIB, 1640e9, 448e9),
    DeviceKind("a100-40gb", "A100-SXM4-40GB", 312e12, GPUS["a100-40gb"].usable, 1555e9, 300e9),
    DeviceKind("a100", "A100", 312e12, GPUS["a100"].usable, 2039e9, 300e9),
    DeviceKind("h100", "H100", 989e12, GPUS["h100"].usable, 3350e9, 450e9),
    DeviceKind("h200", "H200", 989e12, GPUS["h200"].usable, 4800e9, 450e9),
    DeviceKind("b200", "B200", 2250e12, GPUS["b200"].usable, 8000e9, 900e9),
)


GPUS_OF_A_HOST = 8
CUDA_PLUGIN = "JAX's CUDA plugin (pip install 'lora_dpo_jax[gpu-plan]')"
# What libtpu is told where there is no TPU: not to ask Google's servers what this machine is, and not to reserve chips.
LIBTPU = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
# By kind of TPU, what libtpu is told of its chips. By default it describes each of the two cores of a v4 as a device; a
# run has both as one (megacore), with 30.75 GiB, as out-of-memory errors of such runs say.
CHIP_OPTIONS = {"v4": {"chip_config_name": "megacore"}}
# By number of GPUs, a TPU slice of at least as many chips. Its programs represent those of the GPUs.
STAND_INS = {1: "v5p:2x2x1", 2: "v5p:2x2x1", 4: "v5p:2x2x1", 8: "v5p:2x2x2", 16: "v5p:2x2x4", 32: "v5p:2x4x4"}


def kind_of(device: Any) -> DeviceKind | None:
    """The kind of a JAX device; None if it is not known."""
    return next((kind for kind in DEVICE_KINDS if kind.jax_name in device.device_kind), None)


def peak_flops(devices: Sequence[Any]) -> float | None:
    """FLOP/s of all devices together; None if one is not known."""
    kinds = [kind_of(device) for device in devices]
    return None if None in kinds else float(sum(kind.flops for kind in kinds if kind is not None))


class Described(NamedTuple):
    """Devices that are not here, to compile for. They may stand for those of `kind`."""

    kind: DeviceKind
    devices: list[Any]

    @property
    def is_stand_in(self) -> bool:
        """Whether a TPU's chips stand for GPUs, because JAX's CUDA plugin is not installed."""
        return self.devices[0].platform == "tpu" and not self.kind.is_tpu


def devices_of_topology(topology: str) -> Described:
    """The devices of a TPU slice or of hosts with GPUs, without any of them.

    GPUs need JAX's CUDA plugin. Without it the TPU chips with the most memory stand for them.
    """
    name, _, shape = topology.partition(":")
    kind = next((kind for kind in DEVICE_KINDS if kind.name == name), None)
    if kind is None or not re.fullmatch(r"\d+(x\d+)*", shape):
        kinds = ", ".join(kind.name for kind in DEVICE_KINDS)
        raise ValueError(f"topology={topology!r} must be a kind and a shape (v5e:4x4, h100:8); kinds are {kinds}")
    if kind.is_tpu:
        return Described(kind, _tpus(topology, topology))
    count = int(shape) if shape.isdigit() else 0
    if count not in STAND_INS:
        raise ValueError(f"topology={topology!r}: the number of GPUs must be one of {[*STAND_INS]}")
    if plugin := installed_plugin():
        return Described(kind, _gpus(topology, kind, count, plugin))
    return Described(kind, _tpus(topology, STAND_INS[count])[:count])


def _tpus(topology: str, name: str) -> list[Any]:
    if find_spec("libtpu") is None:
        libtpu = "libtpu (pip install 'lora_dpo_jax[tpu]')"
        needed = libtpu if name == topology else f"{CUDA_PLUGIN} or, for an estimate, {libtpu}"
        raise ValueError(f"topology={topology!r} needs {needed}")
    # libtpu only compiles here: it need not look for chips of this machine, nor reserve them for this process.
    for setting, value in LIBTPU.items():
        os.environ.setdefault(setting, value)
    chips = math.prod(map(int, name.partition(":")[2].split("x")))
    # libtpu takes a host to have four chips or more, unless it is told otherwise.
    options = {"chips_per_host_bounds": (1, 1, 1)} if chips == 1 else {}
    options |= CHIP_OPTIONS.get(name.partition(":")[0], {})
    try:
        devices = list(topologies.get_topology_desc(name, platform="tpu", **options).devices)
    except Exception as error:
        raise ValueError(f"topology={topology!r}: libtpu does not make it: {error}") from error
    if len(devices) != chips:
        raise ValueError(
            f"topology={topology!r} has {chips} chips, and libtpu describes {len(devices)} devices. A device must be a "
            "chip: choose another version of libtpu"
        )
    return devices


def _gpus(topology: str, kind: DeviceKind, count: int, plugin: str) -> list[Any]:
    target = target_config(GPUS[kind.name], plugin)
    hosts, of_a_host = max(1, count // GPUS_OF_A_HOST), min(count, GPUS_OF_A_HOST)
    try:
        described = topologies.get_topology_desc(
            platform="cuda", target_config=target, topology=f"1x{hosts}x{of_a_host}"
        )
    except Exception as error:
        raise ValueError(
            f"topology={topology!r}: {plugin}, which is installed, does not make it: {error}. It must be of the "
            f"version of jax {jax.__version__} (pip install 'lora_dpo_jax[gpu-plan]')"
        ) from error
    return list(described.devices)
