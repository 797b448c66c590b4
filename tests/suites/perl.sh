#!/usr/bin/env bash
# title: Perl core and IPC::SysV
# source: Debian source `perl`
# exercises: the interpreter's own `shmread`, `semop` and kin; `IPC::SharedMem`, `IPC::Semaphore`
# passes: 142
# quick
source "$(dirname "$0")/lib.sh"

fetch() {
    packages perl
    source_of perl
    [ -d tree ] && return
    # The core's tests run in t/ of a built tree and take their modules from ../lib.
    mkdir -p tree.new/lib tree.new/t/io
    cp perl/t/*.pl tree.new/t
    cp perl/t/io/{shm,sem,msg}.t tree.new/t/io
    cp -r perl/cpan/IPC-SysV/t tree.new/t/sysv
    for folder in $(perl -MConfig -e 'print "@Config{qw(privlibexp archlibexp)}"') \
        "$(dirname "$(perl -MConfig -e 'print $INC{q(Config.pm)}')")"; do
        cp -r "$folder/." tree.new/lib
    done
    mv tree.new tree
}

cases() {
    cp -r "$cache/tree/t" "$cache/tree/lib" .
    cd t || exit
    for name in shm sem msg; do tap "io/$name.t" perl "io/$name.t"; done
    for name in ipcsysv sem shm msg; do tap "IPC-SysV/$name.t" perl "sysv/$name.t"; done
}

main "$@"
