#!/usr/bin/env bash
# Create the peers' environments, each from its pinned requirements:
#   bench/peers/environments.sh DIR [trl] [tunix] [levanter]
# TRL needs Python 3.11, the others 3.12: python3.11 and python3.12 on the PATH (or under ~/.pyenv/versions), or name them
# with PYTHON311=... and PYTHON312=... . For a GPU set GPU=1: jax then comes with CUDA 12.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
directory="${1:?usage: environments.sh DIR [trl] [tunix] [levanter]}"
shift

find_python() { # VERSION -> an interpreter that runs
    local override="PYTHON${1/./}"
    for candidate in "${!override:-}" "$(command -v "python$1" || true)" "$HOME"/.pyenv/versions/"$1".*/bin/python; do
        if [ -n "$candidate" ] && "$candidate" -c "import sys; assert '%d.%d' % sys.version_info[:2] == '$1'" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "No Python $1 found: put python$1 on the PATH, or set $override" >&2
    return 1
}

for peer in "${@:-trl tunix levanter}"; do
    for name in $peer; do
        version=3.12
        [ "$name" = trl ] && version=3.11
        environment="$directory/$name"
        [ -x "$environment/bin/pip" ] || "$(find_python $version)" -m venv "$environment"
        # torch brings what it needs for the machine's accelerator itself, so it is not installed with --no-deps.
        [ "$name" = trl ] && "$environment/bin/pip" install -q torch==2.13.0
        "$environment/bin/pip" install -q --no-deps -r "$here/requirements-$name.txt"
        if [ "${GPU:-0}" = 1 ] && [ "$name" != trl ]; then
            jax="$(grep '^jax==' "$here/requirements-$name.txt")"
            "$environment/bin/pip" install -q "${jax/jax==/jax[cuda12]==}"
        fi
        echo "$name: $environment/bin/python"
    done
done
