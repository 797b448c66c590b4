# Shared by the scripts in this directory: where things are, and what they need.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export CARGO_TARGET_DIR=$PWD/target
command -v cargo >/dev/null || { echo "cargo is missing: install a Rust toolchain (rustup)" >&2; exit 1; }
[ "$(id -u)" -eq 0 ] || { echo "run this as root: the nodes need /dev/userfaultfd" >&2; exit 1; }

# Installs Debian packages that are missing; each argument is COMMAND:PACKAGE.
need() {
    local missing=() pair
    for pair in "$@"; do
        command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
    done
    [ ${#missing[@]} -eq 0 ] && return
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
}

step() { printf '\n== %s\n' "$*"; }

build() {
    need gcc:build-essential make:build-essential
    cargo build --release --workspace --locked
    make --silent -C c-tests
    export PATH="$PWD/target/release:$PATH"
}
