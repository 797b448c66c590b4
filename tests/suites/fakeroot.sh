#!/usr/bin/env bash
# title: fakeroot-sysv
# source: Debian `fakeroot`
# exercises: message queues and a semaphore between a daemon and preloaded clients
# passes: 3
# quick
# nodes: 2
source "$(dirname "$0")/lib.sh"

fetch() { packages fakeroot; }

script='umask 022; touch a; chown 12:34 a; chmod 4755 a; mknod b c 1 3; mkdir d; chown -R 5:6 d
    (chown 7 d/.) & wait; stat -c "%n %u %g %a %F" a b d'
expected='a 12 34 4755 regular empty file
b 0 0 644 character special file
d 7 6 755 directory'

cases() {
    mkdir -m 777 work
    cd work || exit
    as_user fakeroot-sysv sh -c "$script" >listing
    cat listing
    check "listing" test "$(cat listing)" = "$expected"

    # Clients at once share the daemon's two queues, and take turns by the semaphore.
    touch {1..200}
    # shellcheck disable=SC2016 # for the shell inside
    as_user fakeroot-sysv -s state bash -c 'seq 200 | xargs -P 8 -I{} chown {}:{} {} && stat -c "%n %u %g" {1..200}' >many
    check "clients at once" test "$(cat many)" = "$(seq 200 | sed 's/.*/& & &/')"
    as_user fakeroot-sysv -i state stat -c "%n %u %g" {1..200} >loaded
    check "state is loaded" cmp many loaded
}

# The daemon on one node, what it tells of on another.
nodes() {
    mkdir -m 777 work
    cd work || exit
    local key pid
    IFS=: read -r key pid < <(on 1 faked-sysv)
    on 2 timeout 60 env FAKEROOTKEY="$key" LD_PRELOAD="$(ls /usr/lib/*/libfakeroot/libfakeroot-sysv.so)${SUITE_LIBRARY:+:$SUITE_LIBRARY}" sh -c "$script" >listing
    cat listing
    check "listing" test "$(cat listing)" = "$expected"
    check "end" kill "$pid"
}

main "$@"
