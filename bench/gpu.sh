#!/usr/bin/env bash
# Everything that is measured on one GPU, in one call of at most eight minutes, from anywhere:
#   bench/gpu.sh [OPTIONS]
# In an environment with `pip install -e '.[gpu]'`, and beforehand, for TRL, `bench/peers/environments.sh build/peers trl`.
# SHAPES="8b 1b" says which models, and SECONDS_LEFT how long it may take. OPTIONS are those of bench/gpu.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
shapes="${SHAPES:-8b 1b}"
exec python -m bench.gpu --shapes "[${shapes// /, }]" --seconds "${SECONDS_LEFT:-460}" "$@"
