#!/usr/bin/env bash
# Makes the Python environment hseg_env in the repository: with conda where there is conda, else as a venv.
#
#   bash scripts/create_hseg_env.sh          # what training and evaluation need
#   bash scripts/create_hseg_env.sh --cpu    # the same without the 3 GB of GPU libraries that torch brings on Linux
#   bash scripts/create_hseg_env.sh --dev    # and the tests and ruff
#
# A second call is quick: it installs only when the requirements have changed. HSEG_NO_CONDA=1 keeps conda out of
# it; PYTHON=python3.12 names the Python of the venv. The last line of the output is the environment's python.
# To use either kind in a shell: export PATH="$PWD/hseg_env/bin:$PATH"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "error: $*" >&2; exit 1; }

requirements=(requirements.txt)
torch_index=()
for argument in "$@"; do
    case $argument in
        --cpu) torch_index=(--index-url https://download.pytorch.org/whl/cpu) ;;
        --dev) requirements=($(sed -n 's/^-r //p' requirements-dev.txt) requirements-dev.txt) ;;
        -h | --help) sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) fail "unknown argument $argument; there are --cpu and --dev" ;;
    esac
done

is_supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
        if is_supported "$candidate"; then echo "$candidate"; return; fi
    done
    fail "found no Python 3.10 to 3.13; install one, or name it: PYTHON=/path/to/python bash $0"
}

env=$PWD/hseg_env

if [ "${HSEG_NO_CONDA:-0}" != 1 ] && command -v conda >/dev/null; then
    [ -x "$env/bin/python" ] || conda create --yes --quiet --prefix "$env" python=3.12 pip >&2 ||
        fail "conda could not create $env; HSEG_NO_CONDA=1 makes a venv instead"
elif ! "$env/bin/python" -m pip --version >/dev/null 2>&1; then
    found=$(find_python)
    "$found" -m venv "$env" >&2 ||
        fail "the environment $env could not be created; on Debian and Ubuntu install the package python3-venv"
fi
python=$env/bin/python
is_supported "$python" || fail "$env has $("$python" -V 2>&1), expected 3.10 to 3.13; delete that folder and run again"

newest=${requirements[${#requirements[@]}-1]}  # it includes the others; [-1] is not for the bash of macOS
if ! cat "${requirements[@]}" | cmp -s - "$env/.installed-$newest"; then
    echo "installing $newest into $env (a few minutes the first time)" >&2
    pip_install() { "$python" -m pip install --quiet --disable-pip-version-check "$@" >&2; }
    if [ ${#torch_index[@]} -gt 0 ]; then  # first, so that the next line finds it there
        pip_install "${torch_index[@]}" $(grep '^torch' requirements.txt) ||
            fail "pip could not install torch for the CPU; its own message stands above"
    fi
    pip_install -r "$newest" || fail "pip could not install $newest; its own message stands above"
    cat "${requirements[@]}" >"$env/.installed-$newest"
fi
echo "$python"
