# Sourced by its neighbours: finds a Python, makes the virtual environment, installs this checkout into it.
# JAXDEPLOY_VENV names another folder than .venv; PYTHON names the interpreter to make it from.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${JAXDEPLOY_VENV:-$root/.venv}
python=$venv/bin/python

fail() {
    printf '%s\n' "$*" >&2
    exit 1
}

# What keeps interpreter $1 from making the environment, as one line; nothing when nothing does.
python_fault() {
    if ! "$1" -c '' 2>/dev/null; then
        echo "no $1 here; install Python 3.11 or newer, e.g. \"apt install python3 python3-venv\""
    elif ! "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "$1 is older than 3.11; install Python 3.11 or newer, e.g. \"apt install python3.12-venv\", or name one in PYTHON"
    elif ! "$1" -c 'import ensurepip, venv' 2>/dev/null; then
        echo "$1 comes without venv; install it, e.g. \"apt install python3-venv\""
    fi
}

# The interpreter to use: $PYTHON, or the first good one among the usual names.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        [ -z "$(python_fault "$candidate")" ] && echo "$candidate" && return
    done
    fail "$(python_fault "${PYTHON:-python3}")"
}

make_venv() {
    local base
    "$python" -c '' 2>/dev/null && return
    base=$(find_python) || exit 1
    [ ! -e "$venv" ] || [ -e "$venv/pyvenv.cfg" ] || fail "JAXDEPLOY_VENV=$venv exists and is no virtual environment; name another folder"
    "$base" -m venv --clear "$venv" >&2 || fail "$base -m venv $venv failed; see above"
}

# set_up EXTRAS: this checkout, editable, with its comma-separated extras (none: ""). Returns at once when that was done before
# and neither pyproject.toml nor the Python nor the place has changed since.
set_up() {
    local stamp=$venv/.installed-${1:-base} state
    make_venv || exit 1
    state="$(cksum <"$root/pyproject.toml") $("$python" -V) $root"
    [ "$(cat "$stamp" 2>/dev/null)" = "$state" ] && return
    echo "setting up $venv: jaxdeploy${1:+[$1]} and what it needs; some minutes, this once" >&2
    "$python" -m pip install -qq --disable-pip-version-check -e "$root${1:+[$1]}" >&2 ||
        fail "pip could not install jaxdeploy${1:+[$1]} into $venv; see above"
    echo "$state" >"$stamp"
}

# The CUDA extra that fits this machine's driver; nothing without an NVIDIA GPU.
cuda_extra() {
    local driver
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null) || return 0
    driver=${driver%%.*}
    case $driver in
        '' | *[!0-9]*) ;;
        *) if [ "$driver" -ge 580 ]; then echo cuda13; else echo cuda12; fi ;;
    esac
}
