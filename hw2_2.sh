#!/usr/bin/env bash
# Problem 2. $1: folder of noise files *.pt; $2: output folder for {name}.png; $3: the face network, UNet.pt.
# More options (--gt, --eta-grid, --interpolate ...) may follow: python3 p2_ddim.py --help
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: bash hw2_2.sh NOISE_DIR OUT UNET_PT" >&2
    exit 2
fi
exec python3 "$(dirname "$0")/p2_ddim.py" "$@"
