# Shared by the scripts in this directory: where things are, and what they need.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Installs Debian packages that are missing; each argument is COMMAND:PACKAGE.
need() {
    local missing=() pair
    for pair in "$@"; do
        command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
    done
    [ ${#missing[@]} -eq 0 ] && return
    local sudo=
    [ "$(id -u)" -eq 0 ] || sudo=sudo
    $sudo apt-get update -qq
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends "${missing[@]}"
}

step() { printf '\n== %s\n' "$*"; }

build() {
    command -v cargo >/dev/null || { echo "cargo is missing: install a Rust toolchain (rustup)" >&2; exit 1; }
    need gcc:gcc make:make
    cargo build --release --workspace --locked
    make --silent -C c-tests
    export PATH="$PWD/target/release:$PATH"
}
