#!/usr/bin/env bash
# title: fakeroot-sysv
# source: Debian `fakeroot`
# exercises: message queues and a semaphore between a daemon and preloaded clients
# quick
source "$(dirname "$0")/lib.sh"

fetch() { packages fakeroot; }

script='umask 022; touch a; chown 12:34 a; chmod 4755 a; mknod b c 1 3; mkdir d; chown -R 5:6 d
    (chown 7 d/.) & wait; stat -c "%n %u %g %a %F" a b d'
expected='a 12 34 4755 regular empty file
b 0 0 644 character special file
d 7 6 755 directory'

cases() {
    if ! has_queues; then
        report skip queues
        return
    fi
    mkdir -m 777 work
    cd work || exit
    as_user fakeroot-sysv sh -c "$script" >listing
    cat listing
    check "listing" test "$(cat listing)" = "$expected"
}

main "$@"
