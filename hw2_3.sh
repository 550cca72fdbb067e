#!/usr/bin/env bash
# Problem 3. $1: JSON of concepts and prompts; $2: output folder; $3: Stable Diffusion checkpoint, sd-v1-4.ckpt.
# A token without an embedding in embeddings/ is trained on the pictures beside the JSON, within the 15 minutes.
# More options may follow: python3 p3_infer.py --help
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ $# -ge 3 ] || [ "${1:-}" = --help ] || { echo "usage: bash hw2_3.sh JSON OUT MODEL_CKPT" >&2; exit 2; }
PATH="$here/.venv/bin:$PATH"            # the environment of demo.sh where there is one, else the caller's python3
exec python3 "$here/p3_infer.py" --train-missing --time-limit 840 "$@"
