#!/usr/bin/env bash
# title: PHP sysvshm, sysvsem, shmop, sysvmsg
# source: Debian `php-cli`, tests of Debian source `php8.2`
# exercises: extensions loaded with `RTLD_DEEPBIND`
# passes: 21
# quick
source "$(dirname "$0")/lib.sh"

fetch() {
    packages php8.2-cli
    source_of php8.2
}

cases() {
    local extension
    for extension in sysvshm sysvsem sysvmsg shmop; do
        mkdir -p "ext/$extension"
        cp -r "$cache/php8.2/ext/$extension/tests" "ext/$extension"
    done
    cp "$cache/php8.2/run-tests.php" .
    # It exits with a failure if a test fails, which the list says too.
    NO_INTERACTION=1 SKIP_ONLINE_TESTS=1 php run-tests.php -q -p /usr/bin/php -W results ext
    awk -v results="$SUITE_RESULTS" '
        { status = $1 == "PASSED" ? "pass" : $1 == "SKIPPED" ? "skip" : "fail"
          sub(/.*\/ext\//, "", $2); printf "%s\t%s\n", status, $2 >>results }' results
}

main "$@"
