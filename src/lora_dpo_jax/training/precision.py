"""From the names of dtypes to a precision policy."""

from typing import Any

import jax
import jax.numpy as jnp
import jmp


def precision_of(setting: str, text: str) -> jmp.Policy:
    """Dtypes of parameters and of computation, from f32, bf16 or p=f32,c=bfloat16.

    Raises ValueError that names the setting; also for float64, unless JAX_ENABLE_X64 is set.
    """
    if "half" in text:  # half depends on the devices, and it is too early to ask for them
        raise ValueError(f"{setting}={text!r}: half is float16 or bfloat16; name one of them")
    try:
        policy = jmp.get_policy(text)
    except ValueError as error:
        raise ValueError(f"{setting}={text!r} is no precision; for example f32 or p=f32,c=bfloat16") from error
    dtypes: tuple[Any, ...] = (policy.param_dtype, policy.compute_dtype)
    if jnp.float64 in dtypes and not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(
            f"{setting}={text!r}: JAX computes in float32 instead, unless the environment has JAX_ENABLE_X64=1. Set f32"
        )
    return policy
