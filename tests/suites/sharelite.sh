#!/usr/bin/env bash
# title: IPC::ShareLite
# source: Debian source `libipc-sharelite-perl`
# exercises: a variable shared by processes, locks by semaphores with `SEM_UNDO`, fork
# passes: 21
# quick
# nodes: 2
source "$(dirname "$0")/lib.sh"

fetch() {
    packages perl gcc make libperl-dev
    source_of libipc-sharelite-perl
    [ -d built ] && return
    cp -r libipc-sharelite-perl built.new
    (cd built.new && perl Makefile.PL >/dev/null && make --silent)
    mv built.new built
}

cases() {
    cp -r "$cache/built/." .
    rm t/pod*.t
    for file in t/*.t; do tap "$file" perl -Mblib "$file"; done
}

# Two writers on two nodes increment one number under the module's lock.
nodes() {
    local key=0x51ee7e writer
    cat >writer.pl <<'END'
use strict;
use IPC::ShareLite qw(:lock);
my ($key, $rounds) = @ARGV;
my $share = IPC::ShareLite->new(-key => hex $key, -create => 1, -destroy => 0) or die "new: $!";
for (1 .. $rounds) {
    $share->lock(LOCK_EX) or die "lock: $!";
    $share->store(($share->fetch || 0) + 1);
    $share->unlock or die "unlock: $!";
}
END
    cat >reader.pl <<'END'
use strict;
use IPC::ShareLite;
my ($key, $expected) = @ARGV;
my $share = IPC::ShareLite->new(-key => hex $key, -destroy => 1) or die "new: $!";
my $value = $share->fetch;
print "$value\n";
exit($value != $expected);
END
    local pids=() writers="fine"
    for writer in 1 2; do
        on $writer perl -Mblib="$cache/built" writer.pl $key 200 &
        pids+=($!)
    done
    for writer in "${pids[@]}"; do wait "$writer" || writers="failed"; done
    check "writers" test $writers = fine
    check "sum" on 2 perl -Mblib="$cache/built" reader.pl $key 400
}

main "$@"
