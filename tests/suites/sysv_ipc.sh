#!/usr/bin/env bash
# title: sysv_ipc 1.2.0
# source: PyPI `sysv_ipc`
# exercises: every call and flag from Python, threads
# passes: 140
# quick
source "$(dirname "$0")/lib.sh"

python=/usr/bin/python3

fetch() {
    packages python3 python3-dev python3-pip python3-setuptools python3-wheel gcc
    [ -d site ] && return
    $python -m pip download --quiet --no-binary :all: --no-deps --no-build-isolation sysv_ipc==1.2.0
    tar xf sysv_ipc-1.2.0.tar.gz
    $python -m pip install --quiet --no-deps --no-build-isolation --target site.new ./sysv_ipc-1.2.0
    mv site.new site
}

cases() {
    local module output=$SUITE_SCRATCH/output
    # The tests import from the current folder, where the source is too.
    cp -r "$cache/sysv_ipc-1.2.0/tests" .
    for module in test_module test_memory test_semaphores test_message_queues; do
        PYTHONPATH=$cache/site timeout 120 $python -m unittest -v "tests.$module" >"$output" 2>&1
        check "$module end" test $? -eq 0
        cat "$output"
        # test_name (tests.module.Class.test_name) ... outcome; a docstring may come in between.
        awk -v module="$module" -v results="$SUITE_RESULTS" '
            /^test[^ ]* \(/ { name = $1 " " $2 }
            / \.\.\. / {
                status = / \.\.\. ok/ ? "pass" : / \.\.\. skipped/ ? "skip" : "fail"
                printf "%s\t%s %s\n", status, module, name >>results
            }' "$output"
    done
}

main "$@"
