#!/usr/bin/env bash
# title: PostgreSQL 15 with System V semaphores: regress, isolation
# source: Debian source `postgresql-15`, `PREFERRED_SEMAPHORES=SYSV`
# exercises: a whole database on segments and semaphores
# passes: 334
source "$(dirname "$0")/lib.sh"

bin=$cache/installed/bin
source "$suites/postgresql.bash"

fetch() {
    packages gcc make bison flex libreadline-dev zlib1g-dev perl
    source_of postgresql-15
    [ -d built ] && return
    rm -rf built.new
    cp -r postgresql-15 built.new
    (
        cd built.new
        # The folder's name is compiled in, so it gets the final one.
        ./configure --quiet --prefix="$cache/installed" PREFERRED_SEMAPHORES=SYSV
        make --silent -j2 >/dev/null
        make --silent install >/dev/null
        make --silent -C src/test/regress >/dev/null
        make --silent -C src/test/isolation >/dev/null
    )
    mv built.new built
}

# regress FOLDER OPTIONS...: a test driver of the build, with a server of its own, as make check
# would call it. Each line of its report is a case.
regress() {
    local name=$1
    shift
    mkdir -m 777 "$name"
    # It runs in the build's folder in `make check`, and writes there.
    cp -r "$cache/built/src/test/$name/." "$name"
    chown -R nobody:nogroup "$name"
    (cd "$name" && as_user "$@") >"$name.log" 2>&1
    check "$name end" test $? -eq 0
    cat "$name.log"
    # "test NAME ... ok  12 ms", "     NAME ... FAILED  12 ms"
    awk -v name="$name" -v results="$SUITE_RESULTS" '
        / \.\.\. +(ok|FAILED|failed)/ {
            test = $1 == "test" ? $2 : $1
            status = / \.\.\. +ok/ ? "pass" : "fail"
            printf "%s\t%s %s\n", status, name, test >>results
        }' "$name.log"
    [ ! -f "$name/regression.diffs" ] || cat "$name/regression.diffs"
    [ ! -f "$name/output_iso/regression.diffs" ] || cat "$name/output_iso/regression.diffs"
}

cases() {
    printf 'shared_memory_type = sysv\ndynamic_shared_memory_type = sysv\n' >settings
    export PATH=$bin:$PATH
    local options=(--temp-instance=./tmp_check --temp-config="$PWD/settings" --bindir="$bin"
        --inputdir=. --outputdir=. --max-concurrent-tests=20 --no-locale)
    regress regress ./pg_regress "${options[@]}" --dlpath=. --schedule=./parallel_schedule
    regress isolation ./pg_isolation_regress "${options[@]}" --schedule=./isolation_schedule
}

rate() { transactions; }

main "$@"
