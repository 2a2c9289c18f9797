#!/usr/bin/env bash
# keep_running.sh COMMAND...: runs it again for as long as it asks for that: with status 75, or because it was killed.
# SIGTERM and Ctrl-C are passed on to it; with what it makes of them, this ends too.
set -um # m: in the background a command would not hear Ctrl-C otherwise
most=${KEEP_RUNNING_RESTARTS:-1000}
[ $# -gt 0 ] || {
    echo "usage: $0 COMMAND..." >&2
    exit 2
}

running='' stopped=''
pass_on() {
    stopped=$1
    [ -z "$running" ] || kill "-$1" "$running" 2>/dev/null
}
for signal in TERM INT HUP; do
    # shellcheck disable=SC2064 # the signal of now
    trap "pass_on $signal" "$signal"
done

await() { # await COMMAND...: waits for it, whatever signals come
    "$@" &
    running=$!
    [ -z "$stopped" ] || pass_on "$stopped"
    wait "$running"
    while kill -0 "$running" 2>/dev/null; do wait "$running"; done
    wait "$running" # its own status, not that of a wait that a signal ended
}

for ((restart = 0; ; restart++)); do
    await "$@"
    status=$?
    [ -z "$stopped" ] || exit "$status"
    if [ $status -ne 75 ] && [ $status -le 128 ] || [ $status -eq 130 ]; then
        exit "$status" # done, a mistake to mend, or Ctrl-C
    fi
    if [ "$restart" -ge "$most" ]; then
        echo "$(date '+%F %T') it ended with status $status, and was started again $restart times: enough" >&2
        exit "$status"
    fi
    echo "$(date '+%F %T') it ended with status $status and is started again" >&2
    # Longer than trainer.distributed.heartbeat_timeout_seconds: the others are to end before this one is back.
    await sleep "${KEEP_RUNNING_PAUSE:-40}"
    [ -z "$stopped" ] || exit "$status"
done
