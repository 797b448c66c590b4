#!/usr/bin/env bash
# title: stress-ng
# source: Debian `stress-ng`
# exercises: create, attach and remove storms, fork, `semtimedop`; checks what it reads
# quick
source "$(dirname "$0")/lib.sh"

fetch() { packages stress-ng; }

stress() {
    stress-ng --temp-path . --timeout 4 --verify --metrics-brief --oomable "$@"
}

cases() {
    check "shm-sysv" stress --shm-sysv 2
    check "sem-sysv" stress --sem-sysv 2
    check "shm-sysv and sem-sysv" stress --shm-sysv 2 --sem-sysv 2
    if has_queues; then check "msg" stress --msg 2; else report skip queues; fi
}

main "$@"
