#!/usr/bin/env bash
# marin-haliax 0.2.20.dev202606180959 on jax 0.10.2: `updated_slice({"block": 1}, update)`, with an update that lacks the
# axis `block`, writes the update to every block. An update with that axis, of size 1, is written to block 1 alone.
# Seen: [[5, 6], [5, 6], [5, 6]] without the axis, [[0, 0], [5, 6], [0, 0]] with it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 marin-haliax==0.2.20.dev202606180959
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import importlib.metadata

import haliax as hax
import jax

Block, Item = hax.Axis("block", 3), hax.Axis("item", 2)
zeros, update = hax.zeros((Block, Item)), hax.named([5.0, 6.0], Item)
silent = zeros.updated_slice({"block": 1}, update).array.tolist()
meant = zeros.updated_slice({"block": 1}, update.broadcast_axis(Block.resize(1))).array.tolist()
print("jax", jax.__version__, "haliax", importlib.metadata.version("marin-haliax"))
print("update without the axis:", silent)
print("update with an axis of size 1:", meant)
assert silent == [[5, 6], [5, 6], [5, 6]] and meant == [[0, 0], [5, 6], [0, 0]]
PYTHON
