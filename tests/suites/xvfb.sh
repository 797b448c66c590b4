#!/usr/bin/env bash
# title: Xvfb, MIT-SHM
# source: Debian `xvfb`, `x11-apps`, `x11-utils`
# exercises: two unrelated programs, attach by id, permissions
# passes: 3
# quick
# nodes: 2
source "$(dirname "$0")/lib.sh"

fetch() { packages xvfb x11-apps x11-utils netcat-openbsd; }

start_server() {
    # It names its display on descriptor 3 once it serves.
    mkfifo display
    on 1 Xvfb -displayfd 3 -screen 0 800x600x24 -shmem -nolisten tcp 3>display 2>server.log &
    server=$!
    read -r number <display
    export DISPLAY=:$number
}

stop_server() {
    kill "$server"
    wait "$server"
    cat server.log
}

perf() {
    on "$1" x11perf -repeat 1 -time 1 -shmput500 -shmputxy100 -shmget500 -shmgetxy100 >perf.log 2>&1
    local status=$?
    cat perf.log
    # It leaves out what the server does not offer, with a remark.
    return $((status || $(grep -c 'reps @.*/sec' perf.log) < 4))
}

cases() {
    start_server
    check "MIT-SHM is offered" grep -q MIT-SHM <(xdpyinfo)
    check "x11perf" perf 1
    check "xwd" test "$(xwd -root | wc -c)" -gt 1000000
    stop_server
}

# The server on one node, its client on another; their socket is the machine's.
nodes() {
    start_server
    check "x11perf" perf 2
    stop_server
}

main "$@"
