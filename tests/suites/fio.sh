#!/usr/bin/env bash
# title: fio, `mem=shm`
# source: Debian `fio`
# exercises: the kernel reads files into a segment and writes them out of it, many jobs
# passes: 6
# quick
source "$(dirname "$0")/lib.sh"

fetch() { packages fio; }

job() {
    fio --name=job --mem=shm --size=16m --directory=. --verify=crc32c --verify_fatal=1 \
        --output-format=terse --fallocate=none "$@" >/dev/null
}

cases() {
    check "write and verify" job --rw=write --bs=64k
    check "random, four processes" job --rw=randrw --bs=4k --numjobs=4
    check "random, four threads" job --rw=randrw --bs=4k --numjobs=4 --thread
    check "vectors" job --rw=randwrite --bs=16k --ioengine=pvsync2
    # The kernel's own writes and reads through a queue, of several buffers at once.
    check "io_uring" job --rw=randrw --bs=16k --ioengine=io_uring --iodepth=8
    check "libaio" job --rw=randrw --bs=16k --ioengine=libaio --iodepth=8
}

main "$@"
