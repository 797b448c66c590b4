# shellcheck shell=bash
# Shared by the suites of PostgreSQL, whose programs are in $bin: a server in ./data, and what it does
# in a second.

: "${bin:?is set by who sources this}"

pg() { as_user env PGHOST="$PWD" PGDATABASE=postgres "$@"; }

start() { pg "$bin"/pg_ctl -D data -l log -w start; }

settings() {
    cat >>data/postgresql.conf <<-END
		shared_memory_type = sysv
		dynamic_shared_memory_type = sysv
		shared_buffers = 64MB
		listen_addresses = ''
		unix_socket_directories = '$PWD'
		$*
	END
}

# Reports transactions per second, with nothing that waits for a disk.
transactions() {
    mkdir -m 777 server
    cd server || exit
    pg "$bin"/initdb -D data --auth trust --no-sync >/dev/null
    settings 'fsync = off
        full_page_writes = off
        autovacuum = off'
    start
    pg "$bin"/pgbench -i -s 5 --quiet
    pg "$bin"/psql -Xqc checkpoint
    pg "$bin"/pgbench -c 8 -j 2 -T 10 >measured
    cat measured
    report rate "$(sed -n 's/^tps = \([0-9.]*\).*/\1/p' measured)"
    pg "$bin"/pg_ctl -D data -w stop -m fast
}

