#!/usr/bin/env bash
# A run on a TPU slice of Google Cloud, one process on each of its hosts: see docs/launching.md.
#
#   tpu_pod.sh [--dry-run] create      the slice (TPU_NAME, ZONE, TPU_TYPE; SPOT=1 for a preemptible one)
#   tpu_pod.sh [--dry-run] install     this checkout and its dependencies on all hosts
#   tpu_pod.sh [--dry-run] run ARGS    python -m lora_dpo_jax.main ARGS on all hosts, in the background
#   tpu_pod.sh [--dry-run] logs        of the first host, as they come
#   tpu_pod.sh [--dry-run] stop        SIGTERM: the state is saved
#   tpu_pod.sh [--dry-run] keep ARGS   all of it, and anew whenever the slice is preempted, until the run is done
#   tpu_pod.sh [--dry-run] delete      the slice
#
# --dry-run prints the commands instead of running them.
set -euo pipefail

: "${TPU_NAME:=lora-dpo}" "${ZONE:=us-central1-a}" "${TPU_TYPE:=v5litepod-16}"
: "${TPU_IMAGE:=v2-alpha-tpuv5-lite}" # the runtime of the chip: v2-alpha-tpuv5 for v5p, v2-alpha-tpuv6e for v6e
: "${ENV_FILE:=}"                     # lines of `export NAME=value` for the hosts, such as WANDB_API_KEY

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry_run=
if [ "${1:-}" = --dry-run ]; then
    dry_run=1
    shift
fi

call() {
    if [ -n "$dry_run" ]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

tpu() { # tpu VERB ARGS
    call gcloud compute tpus tpu-vm "$1" "$TPU_NAME" --zone="$ZONE" "${@:2}"
}

on() { # on WORKERS COMMAND
    tpu ssh --worker="$1" --command="$2"
}

create() {
    tpu create --accelerator-type="$TPU_TYPE" --version="$TPU_IMAGE" ${SPOT:+--spot}
}

delete() {
    tpu delete --quiet
}

copy() { # copy FILE: to the home folder of all hosts
    call gcloud compute tpus tpu-vm scp "$1" "$TPU_NAME:" --zone="$ZONE" --worker=all
}

install() {
    local packed=/tmp/lora_dpo_jax.tar.gz
    call git -C "$root" archive --format=tar.gz --output="$packed" HEAD
    copy "$packed"
    # uv brings the Python that the image may not have.
    on all "set -e; mkdir -p lora_dpo_jax; tar -xzf lora_dpo_jax.tar.gz -C lora_dpo_jax
curl -LsSf https://astral.sh/uv/install.sh | sh
~/.local/bin/uv venv --python 3.11 --clear env
~/.local/bin/uv pip install --python env/bin/python -e 'lora_dpo_jax[tpu,gcs]'"
    if [ -n "$ENV_FILE" ]; then
        call cp "$ENV_FILE" /tmp/run.env
        copy /tmp/run.env
    fi
}

run() {
    local command
    command="scripts/keep_running.sh \$HOME/env/bin/python -m lora_dpo_jax.main $(printf '%q ' "$@")"
    # Each host starts its process again when it asks for that. finished: how it ended for good.
    on all "cd lora_dpo_jax; rm -f ~/finished; [ ! -f ~/run.env ] || . ~/run.env
nohup bash -c $(printf '%q' "$command; echo \$? > ~/finished") >> ~/run.log 2>&1 < /dev/null &"
}

logs() {
    on 0 "tail -n 100 -F run.log"
}

stop() {
    # Brackets: not this command itself. finished: so that keep ends too.
    on all "pkill -f '[k]eep_running.sh'; pkill -TERM -f '[l]ora_dpo_jax.main'; echo 75 > finished"
}

state() {
    gcloud compute tpus tpu-vm describe "$TPU_NAME" --zone="$ZONE" --format='value(state)' 2>/dev/null || echo MISSING
}

keep() {
    if [ -n "$dry_run" ]; then
        echo "# while the run has not ended: if the slice is not READY,"
        delete
        create
        install
        run "$@"
        echo "# then once a minute:"
        on 0 "cat finished"
        return
    fi
    local status started=
    while true; do
        if [ "$(state)" != READY ]; then
            echo "$(date '+%F %T') the slice is $(state): making it anew" >&2
            [ "$(state)" = MISSING ] || delete || true
            started=
            if ! { create && install; }; then
                sleep 60
                continue
            fi
        fi
        [ -n "$started" ] || { run "$@" && started=1; }
        status=$(on 0 "cat finished" 2>/dev/null || true)
        if [ -n "$status" ]; then
            echo "the run has ended with status $status" >&2
            return "$status"
        fi
        sleep 60
    done
}

case "${1:-}" in
create | install | run | logs | stop | keep | delete) "$@" ;;
*)
    sed -n '2,12p' "${BASH_SOURCE[0]}"
    exit 2
    ;;
esac
