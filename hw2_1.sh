#!/usr/bin/env bash
# bash hw2_1.sh OUT [options of p1_infer.py]: 1,000 digits, OUT/{mnistm,svhn}/{digit}_{001..050}.png
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ $# -ge 1 ] || { echo "usage: bash hw2_1.sh OUTPUT_FOLDER" >&2; exit 2; }
PATH="$here/.venv/bin:$PATH"            # the environment of demo.sh where there is one, else the caller's python3
exec python3 "$here/p1_infer.py" "$@"
