#!/bin/sh
# Starts the ranks of a program as separate processes and waits for them.
#
#   spread.sh PROG RANKS [OPTIONS]
#
# Inside `migshm lab` rank r runs on node (r mod NODES) + 1; elsewhere all run here, on whatever
# System V IPC the environment gives them. PROG is a path or the name of a program in build/.
# Fails if any rank fails. $MIGSHM names the migshm command.

if [ $# -lt 2 ]; then
    echo "usage: $0 PROG RANKS [OPTIONS]" >&2
    exit 2
fi
program=$1 ranks=$2
shift 2
case $program in
*/*) ;;
*) program=$(dirname "$0")/build/$program ;;
esac

key=$((0x40000000 | ($$ & 0x3fffff) << 8)) # a program uses the 256 keys from here on
nodes=${MIGSHM_LAB_NODES:-}
pids=
trap 'kill $pids 2>/dev/null; exit 1' INT TERM

rank=0
while [ "$rank" -lt "$ranks" ]; do
    set -- --key $key --rank "$rank" --ranks "$ranks" "$@"
    if [ -n "$nodes" ]; then
        "${MIGSHM:-migshm}" run --on "node$((rank % nodes + 1))" -- "$program" "$@" &
    else
        "$program" "$@" &
    fi
    pids="$pids $!"
    shift 6
    rank=$((rank + 1))
done

failed=0
for pid in $pids; do
    wait "$pid" || failed=1
done
exit $failed
