#!/usr/bin/env bash
# bash test.sh [pytest options]: sets up .venv, then runs the linter and the tests. With HW2_DATA=/path/to/hw2_data the tests that
# need the course's data run too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
case "${1:-}" in
    -h | --help) echo "usage: [HW2_DATA=/path/to/hw2_data] bash test.sh [pytest options]"; exit 0 ;;
esac
. ./setup.sh

set_up requirements.txt requirements-dev.txt
say "ruff"
.venv/bin/python3 -m ruff check .
.venv/bin/python3 -m ruff format --check .
say "pytest"
.venv/bin/python3 -m pytest -q -rs -n auto --maxprocesses 4 --dist loadfile "$@"
