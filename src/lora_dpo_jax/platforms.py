"""The platform that a program is traced for, and XLA's options there.

Code that depends on it chooses while it is traced. `jax.lax.platform_dependent` would choose later, but it traces and
differentiates the code of every platform.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import equinox as eqx
import jax

F = TypeVar("F", bound=Callable)

# XLA's options for programs with a model's layers. A JAX that does not know one of them says so when it compiles; those
# that pyproject.toml allows know all.
COMPILER_OPTIONS: dict[str, dict[str, Any]] = {
    "cpu": {
        # LLVM's first level compiles a step in nine tenths of the time of the third, and what it makes is as fast.
        "xla_backend_optimization_level": 1,
        # Operations in an order for little memory, not for many at once: those of a layer use all cores by themselves.
        "xla_cpu_enable_concurrency_optimized_scheduler": False,
    },
    "tpu": {},
    "gpu": {
        # Does not clear the stacks in which a loop over layers keeps activations: each slice is written before it is
        # read.
        "xla_gpu_enable_dus_accumulator_zero_init_elimination": True,
        # Leaves all products to cuBLAS from the start. They then read slices of stacked weights in place, and add an
        # adapter's term as they write. With Triton kernels XLA copies each layer's weights before it knows which
        # products cuBLAS does faster.
        "xla_gpu_enable_triton_gemm": False,
        # Does not concatenate the matrices of products that read the same input: this copies weights too, and each
        # part of the result again.
        "xla_gpu_dot_merger_threshold_mb": 0,
    },
}


def platform() -> Literal["cpu", "gpu", "tpu"]:
    """That of the mesh in scope, else of JAX's default device.

    It may differ from the platform of this process, because a program can be compiled for devices that are not here.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = jax.config.jax_default_device if mesh.empty else mesh.abstract_device  # pyright: ignore[reportAttributeAccessIssue]
    name = jax.default_backend() if device is None else getattr(device, "platform", device)
    return "tpu" if name == "tpu" else "cpu" if name == "cpu" else "gpu"  # as gpu, cuda or rocm


def compiles_beside_other_work() -> bool:
    """Whether a program may be compiled while others run. For a GPU, XLA times kernels, which other work disturbs."""
    return platform() != "gpu"


def compiler_options() -> dict[str, Any]:
    """COMPILER_OPTIONS of `platform()` without those that the environment's XLA_FLAGS sets."""
    flags = os.environ.get("XLA_FLAGS", "")
    if flags and not flags.lstrip().startswith("-"):  # a file with flags
        flags = Path(flags).read_text(encoding="utf-8")
    given = {flag.lstrip("-").partition("=")[0] for flag in flags.split()}
    return {name: value for name, value in COMPILER_OPTIONS[platform()].items() if name not in given}


def jitted(fn: F) -> F:
    """`equinox.filter_jit(fn)` with `compiler_options()`."""
    filter_jit: Any = eqx.filter_jit  # its type hints lack the arguments that it passes to jax.jit
    return filter_jit(fn, compiler_options=compiler_options())
