#!/usr/bin/env bash
# title: IPC::SharedCache
# source: Debian source `libipc-sharedcache-perl`
# exercises: a cache of tied records in many segments that are made and evicted
# passes: 10
# quick
source "$(dirname "$0")/lib.sh"

fetch() {
    packages perl libipc-sharelite-perl
    source_of libipc-sharedcache-perl
}

cases() {
    mkdir IPC
    cp "$cache/libipc-sharedcache-perl/SharedCache.pm" IPC
    tap test.pl perl -I. "$cache/libipc-sharedcache-perl/test.pl"
}

main "$@"
