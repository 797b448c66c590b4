#!/usr/bin/env bash
# title: buffer
# source: Debian `buffer`
# exercises: reader and writer forked around a ring in shared memory, semaphores
# passes: 3
# quick
# nodes: 3
source "$(dirname "$0")/lib.sh"

fetch() {
    packages buffer
    [ -f data ] || { head -c 200000000 /dev/urandom >data.new && md5sum <data.new >sum && mv data.new data; }
}

same() { [ "$(cat sum.got)" = "$(cat "$cache/sum")" ]; }

cases() {
    buffer -m 8m <"$cache/data" 2>errors | md5sum >sum.got
    check "one" same
    buffer -m 1m -s 4k <"$cache/data" 2>>errors | buffer -m 4m -s 64k 2>>errors | buffer -m 300k -s 1k 2>>errors | md5sum >sum.got
    check "a chain of three" same
    check "no complaint" test ! -s errors
    cat errors
}

# A chain through three nodes.
nodes() {
    on 1 buffer -m 1m -s 4k <"$cache/data" | on 2 buffer -m 4m -s 64k | on 3 buffer -m 300k -s 1k | md5sum >sum.got
    check "a chain of three" same
}

main "$@"
