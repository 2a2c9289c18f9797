"""NVIDIA's cards as XLA's compiler wants them described, so that it compiles for a card that is not here.

Numbers of a card (multiprocessors, clock, cache, memory) are those that NVIDIA's driver reports for the SXM modules, as
openxla/xla keeps them in xla/backends/gpu/target_config/specs. They agree with the data sheets of A100, H100, H200 and
B200. Limits of a multiprocessor are from the table of compute capabilities in the CUDA C++ Programming Guide.
"""

from dataclasses import dataclass
from importlib.util import find_spec

# XLA gives a program at most this share of the memory that a description states, and on a card all that its allocator
# owns (`GetSchedulerMemoryLimit` in xla/service/gpu/gpu_hlo_schedule.cc).
SHARE_OF_MEMORY = 0.8
# Shares of a card's memory that JAX takes: by itself, and at most, as the contexts of CUDA, cuBLAS and NCCL need the
# rest. XLA_PYTHON_CLIENT_MEM_FRACTION sets it.
ALLOCATED, ALLOCATABLE = 0.75, 0.95

# By plugin, in the order in which JAX looks for them: its CUDA, and a cuDNN that goes with it. XLA chooses by these
# which instructions its kernels may use.
PLUGINS = {"jax_cuda13_plugin": "13.0.0", "jax_cuda12_plugin": "12.9.0"}
CUDNN = (9, 20, 0)


@dataclass(frozen=True)
class Multiprocessor:
    """The limits of one multiprocessor, by compute capability."""

    major: int
    extension: str  # whether code may use instructions of this capability alone, as of Hopper's tensor cores
    lanes: int  # float32 operations a clock
    shared_memory: int  # bytes
    shared_memory_of_block: int  # bytes at most, if a kernel asks for them


AMPERE = Multiprocessor(8, "NONE", 64, 164 * 1024, 163 * 1024)
HOPPER = Multiprocessor(9, "ACCELERATED_FEATURES", 128, 228 * 1024, 227 * 1024)
BLACKWELL = Multiprocessor(10, "ACCELERATED_FEATURES", 128, 228 * 1024, 227 * 1024)


@dataclass(frozen=True)
class Gpu:
    """One card."""

    name: str  # the driver's name
    multiprocessor: Multiprocessor
    count: int  # of multiprocessors
    clock: float  # GHz, the highest
    cache: int  # bytes of L2
    memory: int  # bytes
    bandwidth: int  # bytes/s

    @property
    def usable(self) -> float:
        """Bytes that a program can use at most."""
        return ALLOCATABLE * self.memory


# By DeviceKind.name.
GPUS = {
    "a100-40gb": Gpu("NVIDIA A100-SXM4-40GB", AMPERE, 108, 1.41, 41_943_040, 42_298_834_944, 1_555_200_000_000),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", AMPERE, 108, 1.41, 41_943_040, 85_100_068_864, 2_039_040_000_000),
    "h100": Gpu("NVIDIA H100 80GB HBM3", HOPPER, 132, 1.98, 52_428_800, 84_942_979_072, 3_352_320_000_000),
    "h200": Gpu("NVIDIA H200", HOPPER, 132, 1.98, 52_428_800, 151_397_597_184, 4_800_000_000_000),
    "b200": Gpu("NVIDIA B200", BLACKWELL, 148, 1.965, 132_644_864, 191_514_411_008, 7_672_320_000_000),
}


def installed_plugin() -> str | None:
    """The CUDA plugin that JAX loads: jax_cuda12_plugin, jax_cuda13_plugin, or None."""
    return next((name for name in PLUGINS if find_spec(name) is not None), None)


def target_config(gpu: Gpu, plugin: str) -> str:
    """The text of XLA's GpuTargetConfigProto. Of a program that needs more than `usable`, XLA repeats computations."""
    core, cuda = gpu.multiprocessor, PLUGINS[plugin]
    major, minor, patch = CUDNN
    return f"""
gpu_device_info {{
  name: "{gpu.name}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {core.major} feature_extension: {core.extension} }}
  core_count: {gpu.count}
  fpus_per_core: {core.lanes}
  clock_rate_ghz: {gpu.clock}
  memory_bandwidth: {gpu.bandwidth}
  device_memory_size: {int(gpu.usable / SHARE_OF_MEMORY)}
  l2_cache_size: {gpu.cache}
  shared_memory_per_core: {core.shared_memory}
  shared_memory_per_block: {48 * 1024}
  shared_memory_per_block_optin: {core.shared_memory_of_block}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  device_address_bits: 64
  driver_version: "{cuda}"
  runtime_version: "{cuda}"
  compile_time_toolkit_version: "{cuda}"
  dnn_version: "{major}.{minor}.{patch}"
}}
platform_name: "CUDA"
dnn_version_info {{ major: {major} minor: {minor} patch: {patch} }}
device_description_str: "{gpu.name}"
"""
