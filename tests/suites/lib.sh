# shellcheck shell=bash
# Shared by the suites in this directory. A suite is a script that sources this file, defines
#
#   fetch()   gets and builds what it needs, once; runs in its own folder under target/suites
#   cases()   runs the suite on whatever System V IPC the environment gives it
#   nodes()   optional: the same idea on several nodes, with `on N COMMAND...`
#   rate()    optional: measures, and reports by `report rate NUMBER`; more is better
#
# and ends with `main "$@"`. The first two report cases by name; `scripts/suites` runs all on the
# kernel's own System V IPC and under the library, and compares. Comments that it reads:
#
#   # title: / # source: / # exercises:   for the table
#   # passes: N                           cases() passes as many cases natively, or something is missing
#   # quick                               takes seconds
#   # nodes: N                            the size of the cluster for nodes(); default 2
set -uo pipefail

suites=${BASH_SOURCE[0]%/*}
root=$(cd "$suites/../.." && pwd)
suite=$(basename "$0" .sh)
cache=$root/target/suites/$suite

main() {
    case $1 in
    fetch) mkdir -p "$cache" && cd "$cache" && set -e && fetch ;;
    cases | nodes | rate) cd "$SUITE_SCRATCH" && "$1" ;;
    esac
}

# report STATUS NAME: a case's outcome, `pass`, `fail` or `skip`.
report() { printf '%s\t%s\n' "$1" "$2" >>"$SUITE_RESULTS"; }

# check NAME COMMAND...: a case that passes if the command succeeds.
check() {
    local name=$1
    shift
    echo "== $name: $*"
    if "$@"; then report pass "$name"; else report fail "$name"; fi
}

# tap NAME COMMAND...: runs a test that speaks TAP; each of its tests is a case, and so is its end.
tap() {
    local name=$1 output status=pass
    shift
    output=$(mktemp -p "$SUITE_SCRATCH")
    echo "== $name: $*"
    "$@" >"$output" 2>&1 || status=fail
    cat "$output"
    awk -v name="$name" -v results="$SUITE_RESULTS" '
        /^(not )?ok( |$)/ {
            status = /^not/ ? (/# *TODO/ ? "skip" : "fail") : (/# *[Ss][Kk][Ii][Pp]/ ? "skip" : "pass")
            printf "%s\t%s %d\n", status, name, ++count >>results
        }
        /^1\.\.0 *# *[Ss][Kk][Ii][Pp]/ { printf "skip\t%s\n", name >>results; skipped = 1 }
        END { exit skipped }' "$output" && report "$status" "$name end"
}

# on N COMMAND...: inside a cluster as a process of node N, else simply here.
on() {
    local node=$1
    shift
    if [ -n "${MIGSHM_LAB:-}" ]; then migshm run --on "node$node" -- "$@"; else "$@"; fi
}

# as_user COMMAND...: as a user who is not root, in whose name servers run that refuse root.
as_user() { setpriv --reuid nobody --regid nogroup --clear-groups env HOME="$SUITE_SCRATCH" "$@"; }

# What follows is for fetch().

# packages NAME...: installs Debian packages that are missing.
packages() {
    local missing=() name
    for name in "$@"; do
        [ "$(dpkg-query -W -f '${db:Status-Abbrev}' "$name" 2>/dev/null)" = "ii " ] || missing+=("$name")
    done
    [ ${#missing[@]} -eq 0 ] && return
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
}

# source_of PACKAGE: unpacks the Debian source package into ./PACKAGE. The machine's own package
# lists know binary packages only, and stay as they are.
source_of() {
    [ -d "$1" ] && return
    local apt=$root/target/suites/apt work list
    packages dpkg-dev ca-certificates
    if [ ! -f "$apt/ready" ]; then
        mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial" "$apt/sources"
        # A machine has its archives in the one file or in the other.
        list=/etc/apt/sources.list.d/debian.sources
        [ ! -f $list ] || sed 's/^Types:.*/Types: deb-src/' $list >"$apt/sources/debian.sources"
        list=/etc/apt/sources.list
        [ ! -f $list ] || sed -n 's/^deb /deb-src /p' $list >"$apt/sources/debian.list"
        cat >"$apt/apt.conf" <<-END
			Dir::Etc::SourceList "/dev/null";
			Dir::Etc::SourceParts "$apt/sources";
			Dir::State::Lists "$apt/lists";
			Dir::Cache "$apt/cache";
			APT::Sandbox::User "root";
		END
        APT_CONFIG=$apt/apt.conf apt-get update -qq
        touch "$apt/ready"
    fi
    work=$(mktemp -d -p .)
    # The release itself: what its security updates replace disappears from the archive.
    (
        cd "$work"
        APT_CONFIG=$apt/apt.conf apt-get source -qq "$1/$(. /etc/os-release && echo "$VERSION_CODENAME")"
        rm -f -- *.tar.* *.dsc
        mv -T -- */ "../$1"
    )
    rmdir "$work"
}
