#!/usr/bin/env bash
# keep_running.sh COMMAND...: runs it again for as long as it asks for that: with status 75, or because it was killed.
set -u
most=${KEEP_RUNNING_RESTARTS:-1000}

for ((restart = 0; restart <= most; restart++)); do
    "$@"
    status=$?
    if [ $status -ne 75 ] && [ $status -le 128 ] || [ $status -eq 130 ]; then
        exit "$status" # done, a mistake to mend, or Ctrl-C
    fi
    echo "$(date '+%F %T') it ended with status $status and is started again" >&2
    # Longer than trainer.distributed.heartbeat_timeout_seconds: the others are to end before this one is back.
    sleep "${KEEP_RUNNING_PAUSE:-40}"
done
exit "$status"
