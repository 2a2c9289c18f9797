"""The platform that a program is traced for.

Code that depends on it chooses while it is traced. `jax.lax.platform_dependent` would choose later, but it traces and
differentiates the code of every platform.
"""

from typing import Literal

import jax


def platform() -> Literal["cpu", "gpu", "tpu"]:
    """That of the mesh in scope, else of JAX's default device.

    It may differ from the platform of this process, because a program can be compiled for devices that are not here.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = jax.config.jax_default_device if mesh.empty else mesh.abstract_device  # pyright: ignore[reportAttributeAccessIssue]
    name = jax.default_backend() if device is None else getattr(device, "platform", device)
    return "tpu" if name == "tpu" else "cpu" if name == "cpu" else "gpu"  # as gpu, cuda or rocm
