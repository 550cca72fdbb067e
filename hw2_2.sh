#!/usr/bin/env bash
# bash hw2_2.sh NOISE_DIR OUT UNET_PT: one OUT/{name}.png for each NOISE_DIR/{name}.pt (further options: p2_ddim.py --help)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ $# -ge 3 ] || [ "${1:-}" = --help ] || { echo "usage: bash hw2_2.sh NOISE_DIR OUT UNET_PT" >&2; exit 2; }
PATH="$here/.venv/bin:$PATH"            # the environment of demo.sh where there is one, else the caller's python3
exec python3 "$here/p2_ddim.py" "$@"
