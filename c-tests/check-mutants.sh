#!/bin/sh
# Runs the programs on IPC broken on purpose (see mutants/mutant.c): each must fail.

cd "$(dirname "$0")" || exit 1
if [ -z "$OWN_NAMESPACE" ]; then
    for how in "unshare -i" "unshare -r -i"; do
        $how true 2>/dev/null && OWN_NAMESPACE=1 exec $how "$0" "$@"
    done
fi

missed=0

# noticed MUTANT PROGRAM...
noticed() {
    mutant=$1
    shift
    for program; do
        options=
        [ "$program" = mandelbrot ] && options="--width 64 --height 64 --output build/mutant"
        # shellcheck disable=SC2086
        reason=$(MUTANT=$mutant LD_PRELOAD=$PWD/build/mutant.so \
            "build/$program" --timeout 4 $options 2>&1 >/dev/null)
        status=$?
        if [ $status -eq 0 ]; then
            missed=$((missed + 1))
            printf 'MISSED   %-9s %s\n' "$mutant" "$program"
        else
            printf 'noticed  %-9s %s\n' "$mutant" "$(echo "$reason" | head -n 1)"
        fi
    done
}

noticed private mandelbrot heat litmus ticket mcs queue seqlock pthread_spin pthread_mutex counter \
    prodcons undo multi ring waitzero falseshare mixed basic fork kernelio bigseg churn threads \
    syscallraw latecomer killattach matmul intsort tsp water pipeline hashtable
noticed nonblock counter prodcons undo multi ring waitzero ops churn threads messages post pingpong \
    pipeline hashtable
noticed piecewise multi waitzero ops
noticed noundo undo ops threads killattach
noticed leak fork killattach
noticed nodetach basic fork churn threads
noticed anytype messages post pingpong
noticed truncate messages post pingpong
echo "$missed missed"
[ $missed -eq 0 ]
