#!/usr/bin/env bash
# title: IPC::Shareable
# source: Debian source `libipc-shareable-perl`
# exercises: tied variables in many segments, locks by semaphores, exhaustion of segments
# quick
source "$(dirname "$0")/lib.sh"

fetch() {
    packages perl libmock-sub-perl libtest-sharedfork-perl libjson-perl libstring-crc32-perl
    source_of libipc-shareable-perl
}

cases() {
    cp -r "$cache/libipc-shareable-perl/." .
    export CI_TESTING=1
    for file in t/*.t; do tap "$file" perl -Ilib "$file"; done
}

main "$@"
