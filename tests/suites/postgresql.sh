#!/usr/bin/env bash
# title: PostgreSQL 15
# source: Debian `postgresql-15`
# exercises: segments of 64 MB and more with spinlocks and atomics in them, the nattch interlock, fork for each connection
# passes: 14
source "$(dirname "$0")/lib.sh"

bin=/usr/lib/postgresql/15/bin
source "$suites/postgresql.bash"

fetch() { packages postgresql-15; }

sql() { pg $bin/psql -XAtq -c "$1"; }
equal() { [ "$1" = "$2" ] || { echo "'$1' is not '$2'"; return 1; }; }

cases() {
    mkdir -m 777 server
    cd server || exit
    check "initdb" pg $bin/initdb -D data --auth trust --no-sync
    settings 'min_parallel_table_scan_size = 0
        parallel_setup_cost = 0
        parallel_tuple_cost = 0'
    check "start" start
    check "a second server is refused" second_is_refused
    check "pgbench -i" pg $bin/pgbench -i -s 5 --quiet
    check "pgbench" pg $bin/pgbench -c 8 -j 2 -T 10
    sums=$(sql 'select sum(abalance) from pgbench_accounts union all select sum(bbalance) from pgbench_branches
        union all select sum(tbalance) from pgbench_tellers union all select sum(delta) from pgbench_history')
    echo "$sums"
    check "balances" test "$(sort -u <<<"$sums" | wc -l) $(wc -l <<<"$sums")" = "1 4"
    sql 'explain (analyze, costs off) select count(*), sum(abalance) from pgbench_accounts' >plan
    cat plan
    check "parallel workers" grep -q 'Workers Launched: [1-9]' plan
    check "parallel query" equal "$(sql 'select count(*) from pgbench_accounts a join pgbench_accounts b using (aid)')" 500000
    check "a backend that crashes" crash
    check "pgbench after it" pg $bin/pgbench -c 4 -T 2
    check "clean stop" pg $bin/pg_ctl -D data -w stop -m fast
    check "start again" start
    check "rows" equal "$(sql 'select count(*) from pgbench_accounts')" 500000
    check "stop" pg $bin/pg_ctl -D data -w stop -m fast
    cat log
}

# The segment is in use: the lock file alone is not what protects the data.
second_is_refused() {
    mv data/postmaster.pid kept
    pg $bin/pg_ctl -D data -l second.log -w -t 10 start && return 1
    cp -p kept data/postmaster.pid
    chown nobody:nogroup data/postmaster.pid
    cat second.log
    grep -q 'pre-existing shared memory block' second.log
}

# All others are ended, and shared memory is made anew.
crash() {
    local backend
    sql 'select pg_backend_pid(), pg_sleep(60)' >/dev/null 2>&1 &
    for _ in $(seq 100); do
        backend=$(sql "select pid from pg_stat_activity where query like '%pg_sleep(60)' and pid <> pg_backend_pid() limit 1")
        [ -n "$backend" ] && break
        sleep 0.1
    done
    kill -9 "$backend"
    wait $!
    for _ in $(seq 100); do
        [ "$(sql 'select 1' 2>/dev/null)" = 1 ] && return 0
        sleep 0.1
    done
    return 1
}

rate() { transactions; }

main "$@"
