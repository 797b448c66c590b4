#!/usr/bin/env bash
# title: stress-ng
# source: Debian `stress-ng`
# exercises: create, attach and remove storms, fork, `semtimedop`; checks what it reads
# passes: 4
# quick
# nodes: 2
source "$(dirname "$0")/lib.sh"

fetch() { packages stress-ng; }

# stress NODE OPTIONS...
stress() {
    local node=$1
    shift
    on "$node" stress-ng --temp-path . --timeout 4 --verify --metrics-brief --oomable "$@"
}

cases() {
    check "shm-sysv" stress 1 --shm-sysv 2
    check "sem-sysv" stress 1 --sem-sysv 2
    check "shm-sysv and sem-sysv" stress 1 --shm-sysv 2 --sem-sysv 2
    check "msg" stress 1 --msg 2
}

# At the same time on two nodes, in one namespace.
nodes() {
    stress 1 --shm-sysv 2 --sem-sysv 1 --msg 1 &
    check "node 2" stress 2 --shm-sysv 2 --sem-sysv 1 --msg 1
    wait $!
    check "node 1" test $? -eq 0
}

main "$@"
