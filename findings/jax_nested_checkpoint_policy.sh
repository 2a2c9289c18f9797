#!/usr/bin/env bash
# jax 0.10.2: in nested `jax.checkpoint`, the outer policy alone decides what of the inner function is kept for the backward
# pass. An inner checkpoint that keeps its input alone keeps everything inside an outer one with `everything_saveable`, as
# a loop over groups of layers may have; and one that keeps everything keeps nothing inside `nothing_saveable`.
# Seen, numbers of kept arrays of sin(sin(sin(x))): 3 without a checkpoint, 1 with the inner one alone, 3 with both, and 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp

policies = jax.checkpoint_policies


def chain(x):
    return jnp.sin(jnp.sin(jnp.sin(x)))


def number_of_kept_arrays(function):
    _, pullback = jax.vjp(function, jnp.arange(4.0))
    return len(jax.tree.leaves(pullback))


keeps_input = jax.checkpoint(chain)
keeps_all = jax.checkpoint(chain, policy=policies.everything_saveable)
found = {
    "no checkpoint": number_of_kept_arrays(chain),
    "inner alone, keeps its input": number_of_kept_arrays(keeps_input),
    "the same inside everything_saveable": number_of_kept_arrays(
        jax.checkpoint(lambda x: keeps_input(x), policy=policies.everything_saveable)
    ),
    "inner keeps everything, inside nothing_saveable": number_of_kept_arrays(
        jax.checkpoint(lambda x: keeps_all(x), policy=policies.nothing_saveable)
    ),
}
print("jax", jax.__version__)
for what, number in found.items():
    print(f"{what}: {number}")
assert list(found.values()) == [3, 1, 3, 1]
PYTHON
