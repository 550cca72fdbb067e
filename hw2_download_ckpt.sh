#!/usr/bin/env bash
# bash hw2_download_ckpt.sh: checks the checkpoints that ship with the repository, and fetches those that are missing or damaged.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# Where they are fetched from: $HW2_CKPT_URL, or the folder in the repository that this clone came from.
origin=$(git remote get-url origin 2>/dev/null || true)
url=${HW2_CKPT_URL:-${origin%.git}/raw/main/checkpoints}

fetch() {                   # fetch FILE: to a temporary name, resumed where it stopped
    wget --quiet --show-progress --tries=3 --timeout=20 -c -O "checkpoints/.$1.tmp" "$url/$1" && mv "checkpoints/.$1.tmp" "checkpoints/$1"
}

while read -r sum file; do
    if echo "$sum  checkpoints/$file" | sha256sum --check --status 2>/dev/null; then
        echo "checkpoints/$file: ok"
        continue
    fi
    echo "checkpoints/$file: missing or damaged, fetching $url/$file"
    rm -f "checkpoints/$file"
    if ! fetch "$file"; then
        [ -s "checkpoints/.$file.tmp" ] || rm -f "checkpoints/.$file.tmp"
        echo "error: $url/$file could not be fetched; set HW2_CKPT_URL to a folder that has it, or \`git checkout checkpoints\`" >&2
        exit 2
    fi
    echo "$sum  checkpoints/$file" | sha256sum --check --status || {
        rm -f "checkpoints/$file"
        echo "error: what came from $url/$file is not checkpoints/$file (its sha256 differs); nothing was kept" >&2
        exit 2
    }
    echo "checkpoints/$file: fetched"
done < checkpoints/SHA256SUMS
