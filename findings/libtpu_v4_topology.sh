#!/usr/bin/env bash
# jax 0.10.2 with libtpu 0.0.42.1: the topology "v4:2x2x1", which has four chips, is described as eight devices, each with
# half of a chip's memory. A run on such chips has one device a chip. `chip_config_name="megacore"` describes those.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 libtpu==0.0.42.1
cd "$folder"
JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 "$folder/venv/bin/python" - <<'PYTHON' 2>/dev/null
from importlib.metadata import version

from jax.experimental.topologies import get_topology_desc


def devices(**options):
    return len(get_topology_desc("v4:2x2x1", platform="tpu", **options).devices)


seen = {"as it comes": devices(), "megacore": devices(chip_config_name="megacore")}
print("jax", version("jax"), "libtpu", version("libtpu"), seen)
assert seen == {"as it comes": 8, "megacore": 4}
PYTHON
