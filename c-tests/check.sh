#!/bin/sh
# Runs every program and says which fail: forked, and spread over separate processes. Extra
# arguments select programs by name; REPEAT=N runs each N times; FACTOR divides the work by N.
#
# Natively the whole check has an IPC namespace of its own, if that is permitted, and nothing may
# be left in it. Inside `migshm lab` the ranks are spread over the nodes instead.

cd "$(dirname "$0")" || exit 1
if [ -z "$MIGSHM_LAB_NODES" ] && [ -z "$OWN_NAMESPACE" ]; then
    for how in "unshare -i" "unshare -r -i"; do
        $how true 2>/dev/null && OWN_NAMESPACE=1 exec $how "$0" "$@"
    done
fi

repeat=${REPEAT:-1} factor=${FACTOR:-1}
log=$(mktemp)
trap 'rm -f "$log"' EXIT
passed=0 failed=0

selected() {
    [ -z "$only" ] && return
    case " $only " in *" $1 "*) ;; *) false ;; esac
}

# attempt EXPECTED-STATUS LABEL COMMAND...
attempt() {
    expected=$1 label=$2
    shift 2
    start=$(date +%s%N)
    "$@" >"$log" 2>&1
    status=$?
    milliseconds=$((($(date +%s%N) - start) / 1000000))
    if [ $status -eq "$expected" ]; then
        passed=$((passed + 1))
        printf 'ok    %-58s %7d ms\n' "$label" $milliseconds
    else
        failed=$((failed + 1))
        printf 'FAIL  %-58s %7d ms, exit %d\n' "$label" $milliseconds $status
        sed 's/^/      | /' "$log"
    fi
}

# check PROGRAM RANKS [OPTIONS]: both ways
check() {
    program=$1 ranks=$2
    shift 2
    selected "$program" || return 0
    [ -n "$MIGSHM_LAB_NODES" ] ||
        attempt 0 "$program --fork $ranks $*" "build/$program" --fork "$ranks" "$@"
    attempt 0 "spread $program $ranks $*" ./spread.sh "$program" "$ranks" "$@"
}

# one_node PROGRAM RANKS [OPTIONS]: all ranks on one node, whatever else there is
one_node() {
    program=$1 ranks=$2
    shift 2
    selected "$program" || return 0
    if [ -n "$MIGSHM_LAB_NODES" ]; then
        attempt 0 "node1 $program --fork $ranks $*" \
            "${MIGSHM:-migshm}" run --on node1 -- "build/$program" --fork "$ranks" "$@"
    else
        check "$program" "$ranks" "$@"
    fi
}

# must_fail PROGRAM RANKS [OPTIONS]
must_fail() {
    program=$1 ranks=$2
    shift 2
    selected "$program" || return 0
    attempt 1 "spread $program $ranks $* (must fail)" ./spread.sh "$program" "$ranks" "$@"
}

# n NUMBER: that much work, divided by FACTOR
n() {
    echo $(($1 / factor > 0 ? $1 / factor : 1))
}

only=$*
round=0
while [ $round -lt "$repeat" ]; do
    round=$((round + 1))
    check mandelbrot 4 --width 320 --height 200 --self-check --output build/small
    check heat 4 --steps "$(n 200)"
    check heat 4 --steps "$(n 100)" --sor
    check matmul 4 --size 256
    check intsort 4
    check tsp 4 --cities 14
    check water 4 --steps "$(n 10)"
    check pipeline 4 --blocks "$(n 500)"
    check hashtable 4 --ops "$(n 5000)"
    for order in sc fenced relaxed; do
        check litmus 4 --rounds "$(n 100000)" --order $order
    done
    check litmus 4 --rounds "$(n 100000)" --stride 8
    check litmus 4 --rounds "$(n 100000)" --stride 64
    must_fail litmus 4 --rounds 2560 --broken
    for lock in ticket mcs pthread_spin queue seqlock; do
        check $lock 4 --ops "$(n 10000)"
    done
    check falseshare 4 --rounds "$(n 50)"
    check mixed 4 --rows "$(n 2000)"
    one_node pthread_mutex 4 --ops "$(n 5000)"
    check counter 4 --ops "$(n 5000)"
    check counter 4 --ops "$(n 5000)" --undo
    check prodcons 4 --ops "$(n 5000)"
    check undo 4 --rounds "$(n 50)"
    check killed 2 --rounds "$(n 200)"
    check multi 5 --ops "$(n 2000)"
    check ring 4 --rounds "$(n 1000)"
    check waitzero 4 --rounds "$(n 200)"
    check ops 2
    check messages 2
    check post 4 --messages "$(n 5000)"
    check post 4 --messages "$(n 5000)" --interrupt
    check pingpong 2 --rounds "$(n 5000)"
    check basic 2
    check fork 2
    check kernelio 2
    check bigseg 4 --mib 16 --ops "$(n 5000)"
    check churn 4 --objects 100 --seconds 1
    check threads 2 --ops "$(n 2000)"
    check syscallraw 2 --ops "$(n 2000)"
    check latecomer 3 --rounds "$(n 50)"
    check killattach 4 --rounds "$(n 50)"
done

if [ -n "$OWN_NAMESPACE" ] && [ "$(cat /proc/sysvipc/* | wc -l)" -ne 3 ]; then
    echo "FAIL  objects were left behind"
    cat /proc/sysvipc/*
    failed=$((failed + 1))
fi
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
