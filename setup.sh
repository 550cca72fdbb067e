# Sourced by demo.sh and test.sh: makes .venv where it is missing, and installs into it what changed since the last time.
#   set_up requirements.txt [requirements-dev.txt]

say() { printf '\n== %s\n' "$*"; }

set_up() {
    local python stamp
    if [ ! -x .venv/bin/pip ]; then
        for python in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.10 none; do
            "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && break
        done
        [ "$python" != none ] || { echo "error: Python 3.10 or newer is needed; set PYTHON to one" >&2; return 2; }
        say "making .venv with $("$python" --version)"
        "$python" -m venv --clear .venv || { echo "error: no .venv (no venv module? on Debian and Ubuntu: apt install python3-venv)" >&2; return 2; }
    fi
    stamp=.venv/installed-$(cat "$@" | cksum | tr " " -)
    if [ ! -e "$stamp" ]; then
        say "installing $* (torch is large: minutes the first time)"
        .venv/bin/python3 -m pip install --quiet --disable-pip-version-check "${@/#/-r}" && touch "$stamp"
    fi
}
