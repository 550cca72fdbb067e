#!/usr/bin/env bash
# bash get_dataset.sh: fetches the course's hw2_data (digits, face, textual_inversion, clip_zeroshot) into ./hw2_data.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
case "${1:-}" in
    "") ;;
    -h | --help) sed -n "2s/^# //p" get_dataset.sh; exit 0 ;;
    *) echo "usage: bash get_dataset.sh" >&2; exit 2 ;;
esac
id=1W6Y1OmjzNw2qHoGDCpGOwGpw27wLg1fi            # the zip on the course's Google Drive
PATH="$PWD/.venv/bin:$PATH"

[ ! -d hw2_data/digits ] || { echo "hw2_data is there already"; exit 0; }
command -v gdown >/dev/null || { echo "error: gdown is missing; pip install gdown" >&2; exit 2; }
if ! gdown "$id" -O hw2_data.zip.tmp; then
    rm -f hw2_data.zip.tmp
    echo "error: the course's drive is closed or out of reach; put hw2_data here by hand, or build its digits from" \
        "public sources: python3 tools/make_digits.py hw2_data/digits" >&2
    exit 2
fi
rm -rf hw2_data.tmp
if ! said=$(python3 -m zipfile -e hw2_data.zip.tmp hw2_data.tmp 2>&1); then
    rm -rf hw2_data.tmp hw2_data.zip.tmp
    echo "error: the course's zip cannot be unpacked (${said##*$'\n'}); run this again" >&2
    exit 2
fi
[ -d hw2_data.tmp/hw2_data/digits ] || { echo "error: the zip holds no hw2_data/digits; the course has changed it" >&2; exit 2; }
mv hw2_data.tmp/hw2_data/digits hw2_data.tmp/
mkdir -p hw2_data
cp -R hw2_data.tmp/hw2_data/. hw2_data/
mv hw2_data.tmp/digits hw2_data/                # last: it says that all is there
rm -r hw2_data.tmp hw2_data.zip.tmp
echo "wrote hw2_data"
