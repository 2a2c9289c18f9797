"""The performance of devices, from their makers' data sheets, and descriptions of devices that are not present."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax.experimental import topologies


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
    DeviceKind("v4", "TPU v4", 275e12, 31.25 * GIB, 1228e9, 300e9),
    DeviceKind("v5e", "TPU v5 lite", 197e12, 15.75 * GIB, 819e9, 200e9),
    DeviceKind("v5p", "TPU v5", 459e12, 95.74 * GIB, 2765e9, 600e9),
    DeviceKind("v6e", "TPU v6 lite", 918e12, 31.25 * GIB, 1640e9, 448e9),
    DeviceKind("a100-40gb", "A100-SXM4-40GB", 312e12, 39 * GIB, 1555e9, 300e9),
    DeviceKind("a100", "A100", 312e12, 79 * GIB, 2039e9, 300e9),
    DeviceKind("h100", "H100", 989e12, 79 * GIB, 3350e9, 450e9),
    DeviceKind("h200", "H200", 989e12, 139 * GIB, 4800e9, 450e9),
    DeviceKind("b200", "B200", 2250e12, 178 * GIB, 8000e9, 900e9),
)


# By number of GPUs, a TPU slice of at least as many chips. Its programs represent those of the GPUs.
STAND_INS = {1: "v5p:2x2x1", 2: "v5p:2x2x1", 4: "v5p:2x2x1", 8: "v5p:2x2x2", 16: "v5p:2x2x4", 32: "v5p:2x4x4"}


def kind_of(device: Any) -> DeviceKind | None:
    """The kind of a JAX device; None if it is not known."""
    return next((kind for kind in DEVICE_KINDS if kind.jax_name in device.device_kind), None)


def peak_flops(devices: Sequence[Any]) -> float | None:
    """FLOP/s of all devices together; None if one is not known."""
    kinds = [kind_of(device) for device in devices]
    return None if None in kinds else float(sum(kind.flops for kind in kinds if kind is not None))


def devices_of_topology(topology: str) -> tuple[DeviceKind, list[Any]]:
    """The devices of a TPU slice, without any TPU. GPUs are represented by the TPU chips with the most memory."""
    name, _, shape = topology.partition(":")
    kind = next((kind for kind in DEVICE_KINDS if kind.name == name), None)
    if kind is None or not re.fullmatch(r"\d+(x\d+)*", shape):
        kinds = ", ".join(kind.name for kind in DEVICE_KINDS)
        raise ValueError(f"topology={topology!r} must be a kind and a shape (v5e:4x4, h100:8); kinds are {kinds}")
    if kind.is_tpu:
        return kind, _topology(topology)
    count = int(shape) if shape.isdigit() else 0
    if count not in STAND_INS:
        raise ValueError(f"topology={topology!r}: the number of GPUs must be one of {[*STAND_INS]}")
    return kind, _topology(STAND_INS[count])[:count]


def _topology(name: str) -> list[Any]:
    # libtpu only compiles here: it need not look for chips of this machine, nor reserve them for this process.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        return list(topologies.get_topology_desc(name, platform="tpu").devices)
    except Exception as error:
        raise ValueError(
            f"topology={name!r}: libtpu, which `pip install 'lora_dpo_jax[tpu]'` brings, does not make it: {error}"
        ) from error
