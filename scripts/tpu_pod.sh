#!/usr/bin/env bash
# A run on a TPU slice of Google Cloud, one process on each of its hosts: see docs/launching.md.
#
#   tpu_pod.sh [--dry-run] create      the slice (TPU_NAME, ZONE, TPU_TYPE; SPOT=1 for a preemptible one)
#   tpu_pod.sh [--dry-run] install     this checkout and its dependencies on all hosts
#   tpu_pod.sh [--dry-run] run ARGS    python -m lora_dpo_jax.main ARGS on all hosts, in the background
#   tpu_pod.sh [--dry-run] logs        of the first host, as they come
#   tpu_pod.sh [--dry-run] stop        SIGTERM: returns when the state is saved and the run has ended
#   tpu_pod.sh [--dry-run] keep ARGS   create, install and run, anew whenever the slice is preempted, until the run is done
#   tpu_pod.sh [--dry-run] delete      the slice
#
# --dry-run prints the commands instead of running them.
set -euo pipefail

: "${TPU_NAME:=lora-dpo}" "${ZONE:=us-central1-a}" "${TPU_TYPE:=v5litepod-16}" "${SPOT:=0}"
: "${TPU_IMAGE:=v2-alpha-tpuv5-lite}" # the runtime of the chip: v2-alpha-tpuv5 for v5p, v2-alpha-tpuv6e for v6e
: "${ENV_FILE:=}"                     # lines of `export NAME=value` for the hosts, such as WANDB_API_KEY
: "${KEEP_FAILURES:=10}" "${KEEP_PAUSE:=60}" # keep looks every so many seconds; so many failures in a row end it

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# On a host: the script, and not the shell that was told to start it, nor the one that asks.
keeper="pgrep -f '^bash [s]cripts/keep_running.sh' > /dev/null"
dry_run=
if [ "${1:-}" = --dry-run ]; then
    dry_run=1
    shift
fi

usage() {
    sed -n '2,12p' "${BASH_SOURCE[0]}" >&2
    exit 2
}

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
    local spot=()
    [ "$SPOT" = 0 ] || spot=(--spot)
    tpu create --accelerator-type="$TPU_TYPE" --version="$TPU_IMAGE" "${spot[@]}"
}

delete() {
    tpu delete --quiet
}

copy() { # copy FILE: to the home folder of all hosts
    call gcloud compute tpus tpu-vm scp "$1" "$TPU_NAME:" --zone="$ZONE" --worker=all
}

install() {
    local folder status=0
    folder=$(mktemp -d) # for this user's eyes alone
    { send_checkout "$folder" && { [ -z "$ENV_FILE" ] || send_environment "$folder"; }; } || status=$?
    rm -r "$folder"
    return $status
}

send_checkout() { # send_checkout FOLDER
    call git -C "$root" archive --format=tar.gz --output="$1/lora_dpo_jax.tar.gz" HEAD &&
        copy "$1/lora_dpo_jax.tar.gz" &&
        # uv brings the Python that the image may not have.
        on all "set -e; mkdir -p lora_dpo_jax; tar -xzf lora_dpo_jax.tar.gz -C lora_dpo_jax
curl -LsSf https://astral.sh/uv/install.sh | sh
~/.local/bin/uv venv --python 3.12 --clear env
~/.local/bin/uv pip install --python env/bin/python -e 'lora_dpo_jax[tpu,gcs]'"
}

send_environment() { # send_environment FOLDER
    call cp "$ENV_FILE" "$1/run.env" && call chmod 600 "$1/run.env" && copy "$1/run.env"
}

run() {
    local command
    [ $# -gt 0 ] || usage
    command="scripts/keep_running.sh \$HOME/env/bin/python -m lora_dpo_jax.main $(printf '%q ' "$@")"
    # Each host starts its process again when it asks for that. finished: how it ended for good.
    on all "if $keeper; then echo 'a run is going on here; tpu_pod.sh stop ends it' >&2; exit 1; fi
cd lora_dpo_jax; rm -f ~/finished; [ ! -f ~/run.env ] || . ~/run.env
nohup bash -c $(printf '%q' "$command; echo \$? > ~/finished") >> ~/run.log 2>&1 < /dev/null &"
}

logs() {
    on 0 "tail -n 100 -F run.log"
}

stop() {
    on all "pkill -f '^bash [s]cripts/keep_running.sh'; while $keeper; do sleep 1; done"
}

state() { # READY, PREEMPTED, ...; MISSING where there is no such slice. Fails where gcloud cannot tell.
    local errors status=0
    errors=$(mktemp)
    gcloud compute tpus tpu-vm describe "$TPU_NAME" --zone="$ZONE" --format='value(state)' 2>"$errors" || status=$?
    if grep -q NOT_FOUND "$errors"; then
        echo MISSING
        status=0
    fi
    [ $status -eq 0 ] || cat "$errors" >&2
    rm "$errors"
    return $status
}

keep() {
    local found told begun='' failures=0
    [ $# -gt 0 ] || usage
    if [ -n "$dry_run" ]; then
        echo "# while the run has not ended: if the slice was preempted or is not there,"
        delete
        create
        echo "# if no run is going on there,"
        install
        run "$@"
        echo "# then, every $KEEP_PAUSE s:"
        look
        return
    fi
    while [ "$failures" -lt "$KEEP_FAILURES" ]; do
        told=
        if ! found=$(state); then
            failures=$((failures + 1))
        elif [ "$found" = READY ]; then
            told=$(look) || true
            case "$told" in
            running) begun=1 ;; # also one that an earlier keep has begun
            idle) ;;
            [0-9]*)
                if [ -n "$begun" ]; then
                    echo "the run has ended with status $told" >&2
                    return "$told"
                fi
                told=idle # that was another run
                ;;
            esac
            if [ "$told" = idle ]; then
                install && run "$@" && begun=1 && told=running
            fi
            if [ "$told" = running ]; then failures=0; else failures=$((failures + 1)); fi
        elif [ "$found" = MISSING ] || [[ "$found" =~ ^(PREEMPTED|TERMINATED|STOPPED|HIDDEN)$ ]]; then
            echo "$(date '+%F %T') the slice is $found: making it anew" >&2
            { [ "$found" = MISSING ] || delete; } && create && continue # with a look at what it has become
            failures=$((failures + 1))
        fi # else it is on its way to one of these
        sleep "$KEEP_PAUSE"
    done
    echo "keep: $failures failures in a row, told above" >&2
    return 1
}

look() { # at the run on the first host: running, idle, or the status that it ended with
    on 0 "if $keeper; then echo running; else cat finished 2> /dev/null || echo idle; fi"
}

verb=${1:-}
[ $# -eq 0 ] || shift
case "$verb" in
run | keep) "$verb" "$@" ;;
create | install | logs | stop | delete)
    [ $# -eq 0 ] || usage # a --dry-run after the verb too: nothing is done by mistake
    "$verb"
    ;;
*) usage ;;
esac
