#!/usr/bin/env bash
# jax 0.10.2: `jax.numpy.asarray` of a NumPy array compiles a program for each shape and dtype, an identity; on a busy XLA,
# such as one that compiles a train step in another thread, each waits. `jax.device_put` compiles nothing. So does
# `haliax.named` (marin-haliax 0.2.20), which calls the former, and with it a slice of a NumPy-backed NamedArray.
# Seen, programs compiled for eight arrays of eight lengths: 8 by asarray, 8 by haliax.named, 0 by device_put.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 marin-haliax==0.2.20.dev202606180959
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np

compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **about: compiled.append(about.get("fun_name")) if "backend_compile" in event else None
)
ways = {
    "jax.device_put": jax.device_put,
    "jax.numpy.asarray": jnp.asarray,
    "haliax.named": lambda array: hax.named(array, "position"),
}
print("jax", jax.__version__)
first = 0
for name, way in ways.items():
    compiled.clear()
    for length in range(first + 1, first + 9):
        way(np.zeros(length, np.int32))
    first += 8  # lengths that no other way has had
    print(f"{name}: {len(compiled)} programs, {sorted(set(compiled))}")
    assert len(compiled) == (0 if name == "jax.device_put" else 8)
PYTHON
