#!/usr/bin/env bash
# title: util-linux `ipcs ipcrm ipcmk lsipc`
# source: Debian `util-linux`
# exercises: /proc/sysvipc and /proc/sys/kernel beside `SHM_STAT`, `IPC_INFO` and kin
# passes: 98
# quick
# nodes: 2
source "$(dirname "$0")/lib.sh"

fetch() { packages util-linux procps; }

id_of() { sed 's/.*: //' "$1"; }

# The same columns of a listing, whatever tool made it.
field() { awk -v id="$2" -v column="$3" '$2 == id { print $column }' "$1"; }

equal() { [ "$1" = "$2" ] || { echo "'$1' is not '$2'"; return 1; }; }

limits() {
    # What the kernel says of its own limits, with the defaults that migshm has too.
    ipcs -l >limits
    cat limits
    check "ipcs -l: segments" grep -q '^max number of segments = 4096$' limits
    check "ipcs -l: sets" grep -q '^max number of arrays = 32000$' limits
    check "ipcs -l: semaphores of a set" grep -q '^max semaphores per array = 32000$' limits
    check "ipcs -l: operations" grep -q '^max ops per semop call = 500$' limits
    check "ipcs -l: value" grep -q '^semaphore max value = 32767$' limits
    check "ipcs -l: queues" grep -q '^max queues system wide = 32000$' limits
    check "ipcs -l: message" grep -q '^max size of message (bytes) = 8192$' limits
    check "ipcs -l: queue" grep -q '^default max size of queue (bytes) = 16384$' limits
    lsipc --raw --bytes --noheadings --output RESOURCE,LIMIT >lsipc.limits
    cat lsipc.limits
    check "lsipc: SHMMNI" grep -q '^SHMMNI 4096$' lsipc.limits
    check "lsipc: SHMMAX" grep -q '^SHMMAX 18446744073692774399$' lsipc.limits
    check "lsipc: SEMMNI" grep -q '^SEMMNI 32000$' lsipc.limits
    check "lsipc: SEMMSL" grep -q '^SEMMSL 32000$' lsipc.limits
    check "lsipc: MSGMNI" grep -q '^MSGMNI 32000$' lsipc.limits
    check "sysctl" equal "$(sysctl -n kernel.shmmni kernel.shmall kernel.sem kernel.msgmni | tr '\t\n' '  ')" \
        "4096 18446744073692774399 32000 1024000000 500 32000 32000 "
}

# shellcheck disable=SC2016 # for the shells inside
# read_by HOW FOLDER NAME: what programs read that open the file in one way and another.
read_by() {
    case $1 in
    dd) dd status=none if="$2/$3" ;;
    sed) sed -n p "$2/$3" ;;
    awk) awk '{ print }' "$2/$3" ;;
    perl) perl -pe 1 "$2/$3" ;;
    python) /usr/bin/python3 -c 'import sys; sys.stdout.write(open(sys.argv[1]).read())' "$2/$3" ;;
    openat) /usr/bin/python3 -c 'import os, sys
folder = os.open(sys.argv[1], os.O_RDONLY)
sys.stdout.write(open(os.open(sys.argv[2], os.O_RDONLY, dir_fd=folder)).read())' "$2" "$3" ;;
    bash) bash -c 'cat <"$0"' "$2/$3" ;;
    dash) dash -c 'cat <"$0"' "$2/$3" ;;
    relative) (cd "$2" && cat "$3") ;;
    dots) (cd "$2/.." && cat "./sysvipc/../sysvipc/$3") ;;
    tail) tail -n +1 "$2/$3" ;;
    sort) sort -m "$2/$3" ;;
    grep) grep ^ "$2/$3" ;;
    cp) cp "$2/$3" copy && cat copy ;;
    esac
}

files() {
    local kind how
    for kind in shm sem msg; do
        cat /proc/sysvipc/$kind >$kind.cat
        cat $kind.cat
        check "$kind: lines" equal "$(wc -l <$kind.cat)" 2
        check "$kind: heading" equal "$(head -n 1 $kind.cat)" "$(cat "$suites/sysvipc.$kind")"
        for how in dd sed awk perl python openat bash dash relative dots tail sort grep cp; do
            check "$kind: by $how" equal "$(read_by $how /proc/sysvipc $kind | md5sum)" "$(md5sum <$kind.cat)"
        done
    done
}

# The line of an object whose every number is known but for times and pids, with those masked.
format() {
    perl -e 'shmget(0x4d, 10000, 01640) // die; semget(-3, 5, 01604) // die;
        my $queue = msgget(0x4e, 01622) // die; msgsnd($queue, pack("l! a100", 1, ""), 0) or die'
    sed -E 's/[0-9]{10}/TIMESTAMP_/g; s/(10000|100 +1) [ 0-9]{4}[0-9]+/\1 _PID_/' <<<"$(tail -q -n 1 /proc/sysvipc/{shm,sem,msg})" >lines
    cat lines
    check "format" cmp lines "$suites/sysvipc.lines"
    ipcrm -M 0x4d -S 0xfffffffd -Q 0x4e
}

cases() {
    limits
    format
    ipcmk --shmem 10000 --mode 0640 >made.segment
    ipcmk --semaphore 7 --mode 0600 >made.set
    ipcmk --queue --mode 0660 >made.queue
    shm=$(id_of made.segment) sem=$(id_of made.set) msg=$(id_of made.queue)
    check "ipcmk: segment" test -n "$shm"
    check "ipcmk: set" test -n "$sem"
    check "ipcmk: queue" test -n "$msg"
    files

    ipcs -m >listing
    cat listing
    check "ipcs -m: mode" equal "$(field listing "$shm" 4)" 640
    check "ipcs -m: bytes" equal "$(field listing "$shm" 5)" 10000
    ipcs -s >listing
    check "ipcs -s: semaphores" equal "$(field listing "$sem" 5)" 7
    ipcs -q >listing
    check "ipcs -q: mode" equal "$(field listing "$msg" 4)" 660
    check "ipcs -q: messages" equal "$(field listing "$msg" 6)" 0
    ipcs -u >usage
    cat usage
    check "ipcs -u: segments" grep -q '^segments allocated 1$' usage
    check "ipcs -u: pages" grep -q '^pages allocated 3$' usage
    check "ipcs -u: sets" grep -q '^used arrays = 1$' usage
    check "ipcs -u: semaphores" grep -q '^allocated semaphores = 7$' usage
    check "ipcs -u: queues" grep -q '^allocated queues = 1$' usage
    ipcs -m -i "$shm" >details
    cat details
    check "ipcs -i: bytes" grep -q 'bytes=10000' details
    ipcs -s -i "$sem" >details
    cat details
    check "ipcs -i: nsems" grep -q 'nsems = 7' details
    ipcs -q -i "$msg" >details
    cat details
    check "ipcs -i: qbytes" grep -q 'qbytes=16384' details
    for option in -t -p -c; do
        check "ipcs $option -m" grep -q "$shm" <(ipcs $option -m)
        check "ipcs $option -q" grep -q "$msg" <(ipcs $option -q)
    done

    check "lsipc -m" equal "$(lsipc -m --raw --bytes --noheadings --output ID,PERMS,SIZE,NATTCH)" "$shm rw-r----- 10000 0"
    check "lsipc -s" equal "$(lsipc -s --raw --noheadings --output ID,PERMS,NSEMS)" "$sem rw------- 7"
    check "lsipc -q" equal "$(lsipc -q --raw --bytes --noheadings --output ID,PERMS,USEDBYTES,MSGS)" "$msg rw-rw---- 0 0"
    check "lsipc -i" grep -q 10000 <(lsipc -m -i "$shm" --bytes)
    lsipc --raw --noheadings --output RESOURCE,USED >used
    cat used
    check "lsipc: used" equal "$(grep -E '^(MSGMNI|SHMMNI|SEMMNI|SEMMNS) ' used | sort | tr '\n' ' ')" "MSGMNI 1 SEMMNI 1 SEMMNS 7 SHMMNI 1 "

    check "ipcrm -m" ipcrm -m "$shm"
    check "ipcrm -m: gone" equal "$(wc -l </proc/sysvipc/shm)" 1
    check "ipcrm -m again" test -n "$(ipcrm -m "$shm" 2>&1)"
    check "ipcrm -s" ipcrm -s "$sem"
    check "ipcrm -q" ipcrm -q "$msg"
    for _ in 1 2 3; do ipcmk --shmem 4096 && ipcmk --semaphore 2 && ipcmk --queue; done >/dev/null
    key=$(awk 'NR == 2 { printf "0x%x", $1 < 0 ? $1 + 4294967296 : $1 }' /proc/sysvipc/shm)
    check "ipcrm -M" ipcrm -M "$key"
    check "ipcrm --all" ipcrm --all
    check "ipcrm --all: none left" equal "$(cat /proc/sysvipc/{shm,sem,msg} | wc -l)" 3
}

# What is made on one node is seen, by the same tools, and removed on another.
nodes() {
    on 1 ipcmk --shmem 10000 >made.segment
    on 1 ipcmk --semaphore 3 >made.set
    on 1 ipcmk --queue >made.queue
    shm=$(id_of made.segment) sem=$(id_of made.set) msg=$(id_of made.queue)
    check "cat" equal "$(on 1 cat /proc/sysvipc/{shm,sem,msg} | md5sum)" "$(on 2 cat /proc/sysvipc/{shm,sem,msg} | md5sum)"
    check "lsipc -m" equal "$(on 2 lsipc -m --raw --bytes --noheadings --output ID,SIZE)" "$shm 10000"
    check "lsipc -s" equal "$(on 2 lsipc -s --raw --noheadings --output ID,NSEMS)" "$sem 3"
    check "lsipc -q" equal "$(on 2 lsipc -q --raw --noheadings --output ID,MSGS)" "$msg 0"
    check "ipcs" grep -q "$sem" <(on 2 ipcs -s)
    check "ipcrm -m" on 2 ipcrm -m "$shm"
    check "ipcrm --all" on 2 ipcrm --all
    check "none left" equal "$(on 1 cat /proc/sysvipc/{shm,sem,msg} | wc -l)" 3
}

main "$@"
