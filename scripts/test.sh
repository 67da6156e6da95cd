#!/usr/bin/env bash
# Creates the environment if need be, then runs ruff and the tests. Arguments go to pytest:
#
#   bash scripts/test.sh
#   bash scripts/test.sh tests/test_losses.py -k tree_min
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() { echo "error: $*" >&2; exit 1; }

python=$(bash "$here/create_hseg_env.sh" --dev) || fail "the environment could not be created, see above"
cd "$here/.."
# no cache: the order of imports depends on which files exist, and ruff would not notice
"$python" -m ruff check --no-cache . || fail "ruff found mistakes, see above; many go away with: $python -m ruff check --no-cache --fix ."
"$python" -m ruff format --check . || fail "files are not formatted; run: $python -m ruff format ."
exec "$python" -m pytest -q "$@"
