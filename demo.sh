#!/usr/bin/env bash
# bash demo.sh: sets up .venv, runs every problem in small into output/, grades what it made, and shows it on one page, output/index.html
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
case "${1:-}" in
    "") ;;
    -h | --help) sed -n "2s/^# //p" demo.sh; exit 0 ;;
    *) echo "usage: bash demo.sh" >&2; exit 2 ;;
esac
. ./setup.sh

set_up requirements.txt
bash hw2_download_ckpt.sh

say "Problem 1: bash hw2_1.sh output"
bash hw2_1.sh output
say "grading output/"
.venv/bin/python3 digit_classifier.py --folder output --json output/digits.json
say "10 digits by 10 noises, and the reverse process"
.venv/bin/python3 p1_infer.py --grid output/grid.png --trajectory output/reverse.png

say "Problem 2: ten faces, by eta, and between two noises"
.venv/bin/python3 p2_ddim.py --make-noise output/noise --count 10 --size 64 --seed 0
bash hw2_2.sh output/noise output/face checkpoints/p2_faces.pt --eta-grid output/eta.png --interpolate slerp --grid output/slerp.png
bash hw2_2.sh output/noise output/face checkpoints/p2_faces.pt --interpolate linear --grid output/linear.png

say "Problem 3 in small: 25 pictures a prompt with two learned tokens, graded; zero-shot classification"
bash hw2_3.sh tiny/textual_inversion/input.json output/p3 checkpoints/tiny.ckpt
.venv/bin/python3 evaluation/grade_hw2_3.py --json_path tiny/textual_inversion/input.json \
    --input_dir tiny/textual_inversion --output_dir output/p3 --clip checkpoints/tiny_clip.pt --json output/p3/scores.json
.venv/bin/python3 p3_clip_zeroshot.py --data tiny/clip_zeroshot --model checkpoints/tiny_clip.pt \
    --prompt "a photo of {object}" --out output/zeroshot
.venv/bin/python3 p3_infer.py tiny/textual_inversion/input.json output checkpoints/tiny.ckpt --prompt "a <new1>, in the style of <new2>"

say "DANN: a network that was trained without labels of SVHN reads the SVHN digits of Problem 1"
{ echo image_name,label; for file in output/svhn/*.png; do name=${file##*/}; echo "$name,${name%%_*}"; done; } > output/svhn.csv
bash hw2_4.sh output/svhn output/dann.csv --gt output/svhn.csv

say "all of it on one page; open it in a browser"
.venv/bin/python3 report/page.py output
