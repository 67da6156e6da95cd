#!/usr/bin/env bash
# Creates the environment if need be, then runs ruff and the tests. Arguments go to pytest:
#
#   bash scripts/test.sh
#   bash scripts/test.sh -m "not slow"
#   bash scripts/test.sh tests/test_losses.py -k tree_min -n 0
#
# The tests of the pages need chromium and chromedriver; on Debian they are installed if root or sudo may do so.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() { echo "error: $*" >&2; exit 1; }

has_browser() {
    command -v chromedriver && { command -v chromium || command -v chromium-browser || command -v google-chrome; }
} >/dev/null

install_browser() {
    local as_root=; [ "$(id -u)" = 0 ] || as_root="sudo -n"
    command -v apt-get >/dev/null && { [ -z "$as_root" ] || $as_root true; } || return 1
    echo "installing chromium and chromium-driver"
    $as_root apt-get update --quiet=2 &&
        $as_root apt-get install --yes --quiet=2 --no-install-recommends chromium chromium-driver
} >&2

python=$(bash "$here/create_hseg_env.sh" --dev) || fail "the environment could not be created, see above"
has_browser || install_browser || true
has_browser || echo "note: the tests of the pages are skipped: they need chromium and chromedriver" >&2
cd "$here/.."
# no cache: the order of imports depends on which files exist, and ruff would not notice
"$python" -m ruff check --no-cache . || fail "ruff found mistakes, see above; many go away with: $python -m ruff check --no-cache --fix ."
"$python" -m ruff format --check . || fail "files are not formatted; run: $python -m ruff format ."
# side by side, each with one thread: a thread that waits busily would take the other's core
export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1
exec "$python" -m pytest -q -n auto --maxprocesses 4 --dist loadfile "$@"
