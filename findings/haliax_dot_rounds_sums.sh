#!/usr/bin/env bash
# marin-haliax 0.2.20.dev202606180959 on jax 0.10.2: `haliax.dot(..., dot_general=f)` rounds what `f` returns to the dtype of the
# factors, as jax.numpy.einsum does. So a `dot_general` that asks for float32 sums of bfloat16 factors, such as
# `hnn.Linear` takes as a field, gives bfloat16 sums; only `preferred_element_type` keeps them.
# Seen, for the sum of 257 ones and an eighth: bfloat16 and 258 without it, under jit too; float32 and 257.125 with it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 marin-haliax==0.2.20.dev202606180959
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import functools
import importlib.metadata

import haliax as hax
import jax
import jax.numpy as jnp

In, Out = hax.Axis("in", 258), hax.Axis("out", 1)
x = hax.named([1.0] * 257 + [0.125], In).astype(jnp.bfloat16)
weight = hax.ones((In, Out), dtype=jnp.bfloat16)


def float32_sums(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, **others):
    return jax.lax.dot_general(lhs, rhs, dimension_numbers, precision, jnp.float32, **others)


dot = functools.partial(hax.dot, x, weight, axis=In, dot_general=float32_sums)
silent, asked = dot(), dot(preferred_element_type=jnp.float32)
compiled = jax.jit(lambda x, w: hax.dot(x, w, axis=In, dot_general=float32_sums).astype(jnp.float32))(x, weight)
print("jax", jax.__version__, "haliax", importlib.metadata.version("marin-haliax"))
print("dot_general alone:", silent.dtype, float(silent["out", 0].array))
print("with preferred_element_type:", asked.dtype, float(asked["out", 0].array))
print("dot_general alone, under jit:", float(compiled["out", 0].array))
assert silent.dtype == jnp.bfloat16 and asked.dtype == jnp.float32
assert [float(sums["out", 0].array) for sums in (silent, compiled, asked)] == [258.0, 258.0, 257.125]
PYTHON
