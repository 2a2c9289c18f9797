"""What devices can do, from their makers' data sheets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DeviceKind:
    """One chip."""

    name: str  # what a user calls it
    jax_name: str  # a part of what JAX calls it (`device_kind`)
    flops: float  # dense bfloat16 products, FLOP/s
    memory: float  # bytes that a program can use
    memory_bandwidth: float  # bytes/s
    interconnect: float  # bytes/s to the others of its slice or host, one way, all links together

    @property
    def is_tpu(self) -> bool:
        return self.jax_name.startswith("TPU")


GIB = 2**30
# A name that begins another comes after it.
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


def kind_of(device: Any) -> DeviceKind | None:
    """Of a JAX device; None if it is not known."""
    return next((kind for kind in DEVICE_KINDS if kind.jax_name in device.device_kind), None)


def peak_flops(devices: Sequence[Any]) -> float | None:
    """FLOP/s of all devices together; None if one is not known."""
    kinds = [kind_of(device) for device in devices]
    return None if None in kinds else float(sum(kind.flops for kind in kinds if kind is not None))
