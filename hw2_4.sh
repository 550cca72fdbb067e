#!/usr/bin/env bash
# bash hw2_4.sh TARGET_IMAGE_DIR OUTPUT_CSV: the digits of a folder of SVHN or USPS pictures (further options: p4_infer.py --help)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ $# -ge 2 ] || [ "${1:-}" = --help ] || { echo "usage: bash hw2_4.sh TARGET_IMAGE_DIR OUTPUT_CSV" >&2; exit 2; }
PATH="$here/.venv/bin:$PATH"            # the environment of demo.sh where there is one, else the caller's python3
exec python3 "$here/p4_infer.py" "$@"
