#!/usr/bin/env bash
# bash hw2_download_ckpt.sh         checks the checkpoints that ship with the repository, fetches those that are missing or damaged
# bash hw2_download_ckpt.sh --sd    fetches Stable Diffusion v1-4 (4.27 GB) to where Problem 3 expects it
# Run again after an interruption, a download goes on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# Where they are fetched from: $HW2_CKPT_URL, or the folder in the repository that this clone came from; and $SD_CKPT_URL.
origin=$(git remote get-url origin 2>/dev/null || true)
case $origin in git@*:*) origin=${origin#git@} && origin=https://${origin/://} ;; esac   # cloned by ssh
url=${HW2_CKPT_URL:-${origin%.git}/raw/main/checkpoints}
sd_url=${SD_CKPT_URL:-https://huggingface.co/CompVis/stable-diffusion-v-1-4-original/resolve/main/sd-v1-4.ckpt}
sd_sum=fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556
sd_file=stable-diffusion/ldm/models/stable-diffusion-v1/model.ckpt

# macOS has shasum and curl instead
sha256() { if command -v sha256sum >/dev/null; then sha256sum "$1"; else shasum -a 256 "$1"; fi; }
has_sum() { [ -f "$2" ] && [ "$(sha256 "$2" | cut -d " " -f 1)" = "$1" ]; }
fetch() {                   # fetch URL FILE [--header TEXT]: goes on where an earlier call stopped
    local from=$1 to=$2
    shift 2
    if command -v wget >/dev/null; then
        wget --quiet --show-progress --tries=3 --timeout=20 "$@" -c -O "$to" "$from"
    else
        curl --fail --location --progress-bar --retry 3 --connect-timeout 20 "$@" -C - -o "$to" "$from"
    fi
}

ensure() {                  # ensure FILE SHA256 URL HINT: the file is there with that sum when this returns
    local file=$1 sum=$2 from=$3 hint=$4 part
    if has_sum "$sum" "$file"; then
        echo "$file: ok"
        return
    fi
    echo "$file: missing or damaged, fetching $from"
    mkdir -p "$(dirname "$file")"
    part=$(dirname "$file")/.$(basename "$file").tmp
    local login=()
    case $from in https://huggingface.co/*) [ -z "${HF_TOKEN:-}" ] || login=(--header "Authorization: Bearer $HF_TOKEN") ;; esac
    if ! fetch "$from" "$part" ${login[@]+"${login[@]}"}; then
        [ -s "$part" ] || rm -f "$part"
        echo "error: $from could not be fetched; run again to go on, or $hint" >&2
        exit 2
    fi
    if ! has_sum "$sum" "$part"; then
        rm -f "$part"
        echo "error: what came from $from is not $file (its sha256 differs); nothing was kept; $hint" >&2
        exit 2
    fi
    mv "$part" "$file"
    echo "$file: fetched"
}

case "${1:-}" in
    "")
        while read -r sum name; do
            ensure "checkpoints/$name" "$sum" "$url/$name" "set HW2_CKPT_URL to a folder that has it, or \`git checkout checkpoints\`"
        done < checkpoints/SHA256SUMS
        ;;
    --sd) ensure "$sd_file" "$sd_sum" "$sd_url" "set SD_CKPT_URL to a mirror, or put sd-v1-4.ckpt at $sd_file" ;;
    --help) sed -n "2,4s/^# //p" "${BASH_SOURCE[0]##*/}" ;;
    *) echo "usage: bash hw2_download_ckpt.sh [--sd]" >&2; exit 2 ;;
esac
