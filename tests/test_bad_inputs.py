"""Bad input to every command: one line that names the option as it was typed or the file, exit code 2, nothing left
behind. IN are the files of `bad_files`, OUT is a folder that is not there, SHIPPED is checkpoints/, TINY is tiny/."""

import importlib.util
import io
import json
import os
import pathlib
import resource
import shlex
import signal
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT
from PIL import Image
from test_digits import write_domain

import utils
from p1_model import CONFIG
from utils import UserError, noise_stream

TABLE = """
p1_infer.py | OUT --steps 0 | argument --steps: take a whole number, 1 to 1000, not '0'
p1_infer.py | OUT --steps 1e6 | argument --steps:
p1_infer.py | OUT --steps 1000000 | argument --steps:
p1_infer.py | OUT --seed -1 | argument --seed: take a whole number, 0 to 4294967295, not '-1'
p1_infer.py | OUT --seed 1180591620717411303424 | argument --seed:
p1_infer.py | OUT --seed 0.5 | argument --seed:
p1_infer.py | OUT --device meta | argument --device: meta: no such device here
p1_infer.py | OUT --device quantum | argument --device: quantum: no such device
p1_infer.py | OUT --device cuda:99 | argument --device: cuda:99: no such device
p1_infer.py | OUT --device xla | argument --device: xla: no such device
p1_infer.py | OUT --device cpu --precision fp16 | --precision fp16 needs a GPU
p1_infer.py | OUT --precision fp8 | argument --precision: invalid choice: 'fp8'
p1_infer.py | OUT --guidance nan | argument --guidance: take a number, -100 to 100, not 'nan'
p1_infer.py | OUT --guidance inf | argument --guidance:
p1_infer.py | OUT --guidance 1/2/3 | argument --guidance: take one scale, or one for each of mnistm and svhn
p1_infer.py | OUT --guidance 7/x | argument --guidance: take a number, -100 to 100, not 'x'
p1_infer.py | OUT --interval -1 5 | argument --interval:
p1_infer.py | OUT --interval 0 | argument --interval: expected 2 arguments
p1_infer.py | OUT --num-per-digit 0 | argument --num-per-digit:
p1_infer.py | OUT --num-per-digit 10001 | argument --num-per-digit: take a whole number, 1 to 10000
p1_infer.py | OUT --batch-size 0 | argument --batch-size: take a whole number, 1 or more, not '0'
p1_infer.py | OUT --sampler euler | argument --sampler: invalid choice: 'euler'
p1_infer.py | | give an output folder, --grid or --trajectory
p1_infer.py | OUT --checkpoint IN/none.pt | none.pt: no such
p1_infer.py | OUT --checkpoint IN | in: no such
p1_infer.py | OUT --checkpoint IN/empty | empty:
p1_infer.py | OUT --checkpoint IN/text | text:
p1_infer.py | OUT --checkpoint IN/list.pt | list.pt: no state_dict and config in it
p1_infer.py | OUT --checkpoint IN/p1_config_is_text.pt | p1_config_is_text.pt: no state_dict and config
p1_infer.py | OUT --checkpoint IN/p1_channels_is_text.pt | its config has channels 'sixty-four'
p1_infer.py | OUT --checkpoint IN/p1_channels_is_7.pt | its config has channels '7'
p1_infer.py | OUT --checkpoint IN/p1_channels_is_huge.pt | its config has channels '1048576'
p1_infer.py | OUT --checkpoint IN/p1_deep_is_missing.pt | its config has deep 'None'
p1_infer.py | OUT --checkpoint IN/p1_deep_is_float.pt | its config has deep '64.0'
p1_infer.py | OUT --checkpoint IN/p1_T_is_0.pt | its config has T '0'
p1_infer.py | OUT --checkpoint IN/p1_schedule_is_list.pt | its config has schedule
p1_infer.py | OUT --checkpoint IN/p1_objective_is_unknown.pt | its config has objective 'score'
p1_infer.py | OUT --checkpoint IN/p1_steps_is_text.pt | its config has steps 'all'
p1_infer.py | OUT --checkpoint IN/p1_state_is_list.pt | p1_state_is_list.pt: its state_dict is none
p1_infer.py | OUT --checkpoint IN/p1_text_for_tensor.pt | p1_text_for_tensor.pt: stem.weight is no tensor
p1_infer.py | IN/text/out | text/out: cannot write there
p1_infer.py | --grid IN/text/grid.png | text: cannot write there
p1_infer.py | --trajectory IN | in: is a folder
p2_ddim.py | IN/noise OUT | give NOISE_DIR OUT UNET_PT
p2_ddim.py | --make-noise '' | give NOISE_DIR OUT UNET_PT
p2_ddim.py | IN/sizes OUT SHIPPED/p2_faces.pt --eta-grid OUT/eta.png | 00 01 are of sides [32, 64]; a sheet needs noises
p2_ddim.py | IN/noise OUT SHIPPED/p2_faces.pt --steps 0 | argument --steps: take a whole number, 1 to 500
p2_ddim.py | IN/noise OUT SHIPPED/p2_faces.pt --steps 300 | argument --steps: take a divisor of 1000, not 300
p2_ddim.py | IN/noise OUT SHIPPED/p2_faces.pt --steps 1000 | argument --steps:
p2_ddim.py | IN/noise OUT SHIPPED/p2_faces.pt --eta nan | argument --eta: take a number, 0 to 1, not 'nan'
p2_ddim.py | IN/noise OUT SHIPPED/p2_faces.pt --eta 1.5 | argument --eta:
p2_ddim.py | IN/noise OUT SHIPPED/p2_faces.pt --batch-size 0 | argument --batch-size:
p2_ddim.py | IN/noise OUT SHIPPED/p2_faces.pt --seed -1 | argument --seed:
p2_ddim.py | IN/noise OUT SHIPPED/p2_faces.pt --device meta | argument --device:
p2_ddim.py | IN/noise OUT SHIPPED/p2_faces.pt --interpolate slerp | --interpolate slerp|linear and --grid FILE
p2_ddim.py | --make-noise OUT --count 0 | argument --count:
p2_ddim.py | --make-noise OUT --size 0 | argument --size: take a multiple of 32, 32 to 4096, not '0'
p2_ddim.py | --make-noise OUT --size 48 | argument --size:
p2_ddim.py | --make-noise OUT --size 32000000 | argument --size:
p2_ddim.py | --make-noise IN/text/noise | text/noise: cannot write there
p2_ddim.py | IN/none OUT SHIPPED/p2_faces.pt | none: no *.pt in it
p2_ddim.py | IN/noise OUT IN/text | text:
p2_ddim.py | IN/noise OUT IN/list.pt | list.pt: no state dict in it
p2_ddim.py | IN/noise OUT IN/p1_text_for_tensor.pt | p1_text_for_tensor.pt: no state dict in it
p2_ddim.py | IN/noise OUT SHIPPED/p1_unet.pt | p1_unet.pt: no down1.weight of the face network
p2_ddim.py | IN/bad_noise OUT SHIPPED/p2_faces.pt | 00.pt: its shape is [3, 48, 48]
p2_ddim.py | IN/noise OUT SHIPPED/p2_faces.pt --gt IN/bomb | 00.png: not a readable picture (50000x50000 pixels
p2_ddim.py | IN/noise OUT SHIPPED/p2_faces.pt --gt IN/cut | 00.png: not a readable picture
p2_ddim.py | IN/noise OUT SHIPPED/p2_faces.pt --gt IN/none | 00.png: no such picture
p4_infer.py | IN/svhn OUT/x.csv --batch-size 0 | argument --batch-size:
p4_infer.py | IN/svhn OUT/x.csv --seed -1 | argument --seed:
p4_infer.py | IN/svhn OUT/x.csv --device meta | argument --device:
p4_infer.py | IN/svhn OUT/x.csv --target mnist | argument --target: invalid choice: 'mnist'
p4_infer.py | IN/svhn | the following arguments are required: OUTPUT_CSV
p4_infer.py | IN/noise OUT/x.csv | noise: its path has neither svhn nor usps in it
p4_infer.py | IN/svhn OUT/x.csv --held-back | --held-back: of what? add --gt
p4_infer.py | IN/svhn_none OUT/x.csv | svhn_none: no such folder
p4_infer.py | IN/svhn_empty OUT/x.csv | svhn_empty: no *.png in it
p4_infer.py | IN/svhn_bomb OUT/x.csv | 0_0.png: not a readable picture (50000x50000 pixels
p4_infer.py | IN/svhn_cut OUT/x.csv | 0_0.png: not a readable picture
p4_infer.py | IN/svhn_large OUT/x.csv | 0_0.png: 29x28 pixels where digits have 28x28
p4_infer.py | IN/svhn/data IN/svhn | svhn: is a folder
p4_infer.py | IN/svhn/data IN/text/x.csv | text: cannot write there
p4_infer.py | IN/svhn/data OUT/x.csv --checkpoint IN/text | text:
p4_infer.py | IN/svhn/data OUT/x.csv --checkpoint IN/list.pt | list.pt: it is not a checkpoint of p4_train.py
p4_infer.py | IN/svhn/data OUT/x.csv --checkpoint IN/p4_text_for_tensor.pt | is no tensor
p4_infer.py | IN/svhn/data OUT/x.csv --gt IN/none.csv | none.csv: No such file
p4_infer.py | IN/svhn/data OUT/x.csv --gt IN/svhn | svhn: Is a directory
p4_infer.py | IN/svhn/data OUT/x.csv --gt IN/latin1/svhn/train.csv | train.csv: not a csv
p4_infer.py | IN/svhn/data OUT/x.csv --gt IN/names/svhn/train.csv | train.csv: names none of the pictures
p4_tsne.py | OUT/x.png --count 0 | argument --count:
p4_tsne.py | OUT/x.png --seed -1 | argument --seed:
p4_tsne.py | OUT/x.png --data IN/none | train.csv: not found
digit_classifier.py | | give --folder to grade, or --train to train
digit_classifier.py | --train svhn --out OUT/x.pth --epochs 0 | argument --epochs:
digit_classifier.py | --train svhn --out OUT/x.pth --batch-size 0 | argument --batch-size:
digit_classifier.py | --train svhn --out OUT/x.pth --batch-size 1000 --data IN | --batch-size 1000:
digit_classifier.py | --train svhn --out IN --data IN | in: is a folder
digit_classifier.py | --train mnist --out OUT/x.pth | argument --train: invalid choice: 'mnist'
digit_classifier.py | --train svhn --out OUT/x.pth --seed -1 | argument --seed:
digit_classifier.py | --train svhn --out OUT/x.pth --device meta | argument --device:
digit_classifier.py | --train svhn --out OUT/x.pth --data IN/none | train.csv: not found; `bash get_dataset.sh`
digit_classifier.py | --train svhn --out OUT/x.pth --data IN/latin1 | train.csv: not a csv
digit_classifier.py | --train svhn --out OUT/x.pth --data IN/nothing | train.csv: not a csv
digit_classifier.py | --train svhn --out OUT/x.pth --data IN/header | train.csv: no rows
digit_classifier.py | --train svhn --out OUT/x.pth --data IN/short | train.csv line 3: label '' is not a digit
digit_classifier.py | --train svhn --out OUT/x.pth --data IN/long | train.csv: not a csv
digit_classifier.py | --train svhn --out OUT/x.pth --data IN/other | train.csv: not a csv with the first line image_name,label
digit_classifier.py | --train svhn --out OUT/x.pth --data IN/unicode | is not a digit 0..9
digit_classifier.py | --train svhn --out OUT/x.pth --data IN/huge | train.csv line 2: label 'xxxxxxxxxxxxxxxxxxxx' is not
digit_classifier.py | --train svhn --out OUT/x.pth --data IN/zero | train.csv
digit_classifier.py | --train svhn --out OUT/x.pth --data IN/names | data: no such folder
digit_classifier.py | --folder IN/none | mnistm: no pictures in it
digit_classifier.py | --folder IN --checkpoint IN/text | text:
digit_classifier.py | --folder IN --checkpoint IN/list.pt | list.pt: not a checkpoint of a digit classifier
digit_classifier.py | --folder IN/graded_bomb --svhn-checkpoint SHIPPED/svhn_classifier.pth | 0_0.png: not a readable picture
digit_classifier.py | --folder IN/graded_cut --svhn-checkpoint SHIPPED/svhn_classifier.pth | 0_0.png: not a readable
digit_classifier.py | --folder IN/graded_unicode --svhn-checkpoint SHIPPED/svhn_classifier.pth | must begin with its digit
p3_clip_zeroshot.py | --data TINY/clip_zeroshot --out OUT --batch-size 0 | argument --batch-size:
p3_clip_zeroshot.py | --data TINY/clip_zeroshot --out OUT --seed -1 | argument --seed:
p3_clip_zeroshot.py | --data TINY/clip_zeroshot --out OUT --device meta | argument --device:
p3_clip_zeroshot.py | --data TINY/clip_zeroshot --out OUT --prompt photo | --prompt: needs {object}
p3_clip_zeroshot.py | --data TINY/clip_zeroshot --out OUT --model IN/text | text:
p3_clip_zeroshot.py | --data TINY/clip_zeroshot --out OUT --model IN/list.pt | list.pt:
p3_clip_zeroshot.py | --data TINY/clip_zeroshot --out OUT --model IN/p1_state_is_list.pt | is_list.pt: not the weights
p3_clip_zeroshot.py | --data TINY/clip_zeroshot --out OUT --model IN/numbered.pt | numbered.pt: not the weights of a CLIP
p3_clip_zeroshot.py | --data TINY/clip_zeroshot --out OUT --model IN/hub_list | hub_list: not the weights of a CLIP
p3_clip_zeroshot.py | --data TINY/clip_zeroshot --out OUT --model IN/hub | config.json: not JSON
p3_clip_zeroshot.py | --data IN/none --out OUT | id2label.json: no such file
p3_clip_zeroshot.py | --data IN/zero_deep --out OUT | id2label.json: not JSON
p3_clip_zeroshot.py | --data IN/zero_list --out OUT | id2label.json: expected {"0": "bicycle", ...}
p3_clip_zeroshot.py | --data IN/zero_unicode --out OUT | id2label.json: expected {"0": "bicycle", ...}
p3_clip_zeroshot.py | --data IN/zero_empty --out OUT | val: no PNG pictures there
p3_clip_zeroshot.py | --data IN/zero_digit --out OUT | its name must begin with a class id
p3_clip_zeroshot.py | --data IN/zero_bytes --out OUT | its name must begin with a class id
p3_clip_zeroshot.py | --data IN/zero_bomb --out OUT --model SHIPPED/tiny_clip.pt | 0_0.png: not a readable picture (50000x
p3_clip_zeroshot.py | --data IN/zero_cut --out OUT --model SHIPPED/tiny_clip.pt | 0_0.png: not a readable picture
evaluation/clip_image_score.py | --input_dir IN/none --output_dir IN/none | none: no such folder, or no pictures in it
evaluation/clip_image_score.py | --input_dir IN/cut --output_dir TINY/textual_inversion/0 --clip SHIPPED/tiny_clip.pt | 00.png: not
evaluation/clip_image_score.py | --input_dir TINY/textual_inversion/0 --output_dir TINY/textual_inversion/0 --device meta | argument --device:
evaluation/clip_text_score.py | --output_dir IN/none | the following arguments are required: --prompt
evaluation/clip_text_score.py | --prompt dog --output_dir IN/bomb --clip SHIPPED/tiny_clip.pt | 00.png: not a readable picture
evaluation/clip_text_score.py | --prompt dog --output_dir IN/cut --clip IN/text | text:
evaluation/grade_hw2_3.py | --json_path IN/good.json --input_dir IN --output_dir IN/none --clip SHIPPED/tiny_clip.pt | none/0/0: no such folder
evaluation/grade_hw2_3.py | --json_path IN/baseline_nan.json --input_dir IN --output_dir IN | baseline_nan.json: not JSON
evaluation/grade_hw2_3.py | --json_path IN/baseline_number.json --input_dir IN --output_dir IN | "baseline" is a list of pairs
evaluation/grade_hw2_3.py | --json_path IN/baseline_short.json --input_dir IN --output_dir IN | "baseline" is a list of pairs
evaluation/grade_hw2_3.py | --json_path IN/baseline_text.json --input_dir IN --output_dir IN | "baseline" is a list of pairs
evaluation/grade_hw2_3.py | --json_path IN/no_eval.json --input_dir IN --output_dir IN | needs the key "prompt_4_clip_eval"
p3_infer.py | IN/none.json OUT SHIPPED/tiny.ckpt | none.json: no such file
p3_infer.py | IN/text OUT SHIPPED/tiny.ckpt | text: not JSON
p3_infer.py | IN/empty OUT SHIPPED/tiny.ckpt | empty: not JSON
p3_infer.py | IN/latin1.json OUT SHIPPED/tiny.ckpt | latin1.json: not JSON
p3_infer.py | IN/deep.json OUT SHIPPED/tiny.ckpt | deep.json: not JSON
p3_infer.py | IN/surrogate.json OUT SHIPPED/tiny.ckpt | surrogate.json: not JSON
p3_infer.py | IN/infinite.json OUT SHIPPED/tiny.ckpt | infinite.json: not JSON
p3_infer.py | IN/list.json OUT SHIPPED/tiny.ckpt | list.json: expected {"0":
p3_infer.py | IN/key_empty.json OUT SHIPPED/tiny.ckpt | key_empty.json: the entry name '' cannot name a folder
p3_infer.py | IN/key_up.json OUT SHIPPED/tiny.ckpt | the entry name '..' cannot name a folder
p3_infer.py | IN/key_slash.json OUT SHIPPED/tiny.ckpt | the entry name 'a/b' cannot name a folder
p3_infer.py | IN/key_backslash.json OUT SHIPPED/tiny.ckpt | cannot name a folder
p3_infer.py | IN/key_drive.json OUT SHIPPED/tiny.ckpt | the entry name 'C:x' cannot name a folder
p3_infer.py | IN/key_control.json OUT SHIPPED/tiny.ckpt | cannot name a folder
p3_infer.py | IN/prompt_text.json OUT SHIPPED/tiny.ckpt | needs the key "prompt", a list of texts
p3_infer.py | IN/prompt_number.json OUT SHIPPED/tiny.ckpt | every prompt must be a text
p3_infer.py | IN/captions_none.json OUT SHIPPED/tiny.ckpt | "train_captions" is a list of texts
p3_infer.py | IN/captions_two.json OUT SHIPPED/tiny.ckpt | "train_captions" is a list of texts
p3_infer.py | IN/validation_number.json OUT SHIPPED/tiny.ckpt | "validation_prompts" is a list of texts
p3_infer.py | IN/word_list.json OUT SHIPPED/tiny.ckpt | needs the key "src_image", a text
p3_infer.py | IN/same_token.json OUT SHIPPED/tiny.ckpt | two entries have the same token_name
p3_infer.py | IN/good.json OUT SHIPPED/tiny.ckpt --images 0 | --images
p3_infer.py | IN/good.json OUT SHIPPED/tiny.ckpt --steps 0 | --steps
p3_infer.py | IN/good.json OUT SHIPPED/tiny.ckpt --steps 1000000 | argument --steps:
p3_infer.py | IN/good.json OUT SHIPPED/tiny.ckpt --scale nan | argument --scale:
p3_infer.py | IN/good.json OUT SHIPPED/tiny.ckpt --scale inf | argument --scale:
p3_infer.py | IN/good.json OUT SHIPPED/tiny.ckpt --pag -1 | argument --pag: take a number, 0 to 100
p3_infer.py | IN/good.json OUT SHIPPED/tiny.ckpt --batch-size 0 | --batch-size
p3_infer.py | IN/good.json OUT SHIPPED/tiny.ckpt --time-limit nan | argument --time-limit: take a positive number, not 'nan'
p3_infer.py | IN/good.json OUT SHIPPED/tiny.ckpt --time-limit inf | argument --time-limit:
p3_infer.py | IN/good.json OUT SHIPPED/tiny.ckpt --time-limit 0 | argument --time-limit:
p3_infer.py | IN/good.json OUT SHIPPED/tiny.ckpt --train-steps 0 | --train-steps
p3_infer.py | IN/good.json OUT SHIPPED/tiny.ckpt --size 100 | argument --size: take a multiple of 64
p3_infer.py | IN/good.json OUT SHIPPED/tiny.ckpt --seed -1 | argument --seed:
p3_infer.py | IN/good.json OUT SHIPPED/tiny.ckpt --device meta | argument --device:
p3_textual_inversion.py | --json IN/good.json --steps 0 | argument --steps:
p3_textual_inversion.py | --json IN/good.json --batch-size 0 | argument --batch-size:
p3_textual_inversion.py | --json IN/good.json --lr nan | argument --lr: take a positive number, not 'nan'
p3_textual_inversion.py | --json IN/good.json --lr -1 | argument --lr:
p3_textual_inversion.py | --json IN/good.json --vectors 0 | argument --vectors:
p3_textual_inversion.py | --json IN/good.json --crops 0 | argument --crops:
p3_textual_inversion.py | --json IN/good.json --save-every 0 | argument --save-every:
p3_textual_inversion.py | --json IN/good.json --preview-every -1 | argument --preview-every:
p3_textual_inversion.py | --json IN/good.json --max-time nan | argument --max-time: take a positive number, not 'nan'
p3_textual_inversion.py | --json IN/good.json --seed -1 | argument --seed:
p3_textual_inversion.py | --json IN/good.json --only 7 | --only 7:
p3_textual_inversion.py | --json IN/good.json --data IN/none | none/0: no such folder, or no pictures in it
p3_textual_inversion.py | --json IN/deep.json | deep.json: not JSON
p3_textual_inversion.py | --json IN/good.json --validation-pictures 0 | argument --validation-pictures:
p3_textual_inversion.py | --json IN/good.json --average 0 | argument --average:
p3_textual_inversion.py | --json IN/good.json --size 100 | argument --size: take a multiple of 64
p3_textual_inversion.py | --json IN/good.json --data TINY/textual_inversion --clip none --ckpt IN/text | text:
p3_custom_diffusion.py | --json IN/good.json | required: --out
p3_custom_diffusion.py | --json IN/good.json --out OUT/x --steps 0 | argument --steps:
p3_custom_diffusion.py | --json IN/good.json --out OUT/x --lr nan | argument --lr: take a positive number, not 'nan'
p3_custom_diffusion.py | --json IN/good.json --out OUT/x --regularisation 0 | argument --regularisation:
p3_custom_diffusion.py | --json IN/good.json --out IN --data TINY/textual_inversion | in: is a folder
p3_custom_diffusion.py | --merge IN/text --out IN/x --ckpt SHIPPED/tiny.ckpt | text: not a checkpoint
p3_infer.py | IN/good.json OUT SHIPPED/tiny.ckpt --delta IN/list.pt | list.pt: not a delta
p3_infer.py | IN/good.json OUT IN/text | text:
p3_infer.py | IN/good.json OUT SHIPPED/tiny.ckpt --embeddings IN/none | <new1> has no embedding for this model
p3_infer.py | IN/good.json OUT SHIPPED/tiny.ckpt --embeddings IN | list.pt: not an embedding file
p3_infer.py | IN/good.json IN/text SHIPPED/tiny.ckpt --embeddings TINY/textual_inversion/embeddings | text: cannot write there
stable-diffusion/scripts/txt2img.py | --outdir OUT --f 0 | argument --f: take a whole number, 1 to 64, not '0'
stable-diffusion/scripts/txt2img.py | --outdir OUT --C 0 | argument --C:
stable-diffusion/scripts/txt2img.py | --outdir OUT --ckpt SHIPPED/tiny.ckpt --C 3 | --C 3: this model has 4
stable-diffusion/scripts/txt2img.py | --outdir OUT --ckpt SHIPPED/tiny.ckpt --f 16 | --f 16: this model has
stable-diffusion/scripts/txt2img.py | --outdir OUT --n_rows -1 | argument --n_rows:
stable-diffusion/scripts/txt2img.py | --outdir OUT --n_iter 0 | argument --n_iter:
stable-diffusion/scripts/txt2img.py | --outdir OUT --n_samples 0 | argument --n_samples:
stable-diffusion/scripts/txt2img.py | --outdir OUT --ddim_steps 1000000 | argument --ddim_steps:
stable-diffusion/scripts/txt2img.py | --outdir OUT --ddim_eta nan | argument --ddim_eta:
stable-diffusion/scripts/txt2img.py | --outdir OUT --pag nan | argument --pag: take a number, 0 to 100, not 'nan'
stable-diffusion/scripts/txt2img.py | --outdir OUT --scale inf | argument --scale: take a number, -100 to 100, not 'inf'
stable-diffusion/scripts/txt2img.py | --outdir OUT --seed -1 | argument --seed:
stable-diffusion/scripts/txt2img.py | --outdir OUT --device meta | argument --device: meta: no such device
stable-diffusion/scripts/txt2img.py | --outdir OUT --H 100 | --H 100 --W 512: take multiples of 64
stable-diffusion/scripts/txt2img.py | --outdir OUT --ckpt IN/none.ckpt | none.ckpt: no such checkpoint
stable-diffusion/scripts/txt2img.py | --outdir OUT --ckpt SHIPPED/tiny.ckpt --from-file IN/latin1.json | latin1.json: not a text
stable-diffusion/scripts/txt2img.py | --outdir OUT --ckpt SHIPPED/tiny.ckpt --from-file IN/empty | empty: holds no prompt
stable-diffusion/scripts/txt2img.py | --outdir OUT --ckpt SHIPPED/tiny.ckpt --f 4 --embedding_path IN/text | text:
p1_train.py | --out OUT --channels 7 | argument --channels: take a multiple of 16, 16 to 1024, not '7'
p1_train.py | --out OUT --deep 100 | argument --deep: take a multiple of 64
p1_train.py | --out OUT --drop 2 | argument --drop:
p1_train.py | --out OUT --min-snr nan | argument --min-snr: take a number, 0 or more, not 'nan'
p1_train.py | --out OUT --steps 0 | argument --steps:
p1_train.py | --out OUT --epoch-steps 0 | argument --epoch-steps:
p1_train.py | --out OUT --batch-size 0 | argument --batch-size:
p1_train.py | --out OUT --lr nan | argument --lr: take a positive number, not 'nan'
p1_train.py | --out OUT --lr -0.1 | argument --lr:
p1_train.py | --out OUT --ema 2 | argument --ema: take a number, 0 to 1, not '2'
p1_train.py | --out OUT --warmup -1 | argument --warmup:
p1_train.py | --out OUT --max-time 5 | argument --max-time: take DD:HH:MM:SS
p1_train.py | --out OUT --max-epochs 0 | argument --max-epochs:
p1_train.py | --out OUT --devices 0 | argument --devices:
p1_train.py | --out OUT --devices x | argument --devices:
p1_train.py | --out OUT --num_nodes 0 | argument --num_nodes:
p1_train.py | --out OUT --seed -1 | argument --seed:
p1_train.py | --out OUT --seed 1180591620717411303424 | argument --seed:
p1_train.py | --out OUT --device meta | argument --device:
p1_train.py | --out OUT --data IN/latin1 | mnistm/train.csv: not found
p1_train.py | --out OUT --data IN --classifiers IN/text IN/text | mnistm: no val image
p1_distill.py | --out OUT --count 7 | argument --count: take a multiple of
p1_distill.py | --out OUT --times 5 | argument --times: invalid choice: 5
p1_distill.py | --out OUT --times 499 999 | --times 499 999: take 999 first
p1_distill.py | --out OUT --features nan | argument --features: take a number, 0 or more, not 'nan'
p1_distill.py | --out OUT --teacher IN/p1_T_is_0.pt | its config has T '0'
p2_train.py | --out OUT --size 48 | argument --size: take a multiple of 32
p2_train.py | --out OUT --channel 30 | argument --channel: channel 30:
p2_train.py | --out OUT --multiplier 1 1 2 2 4 17 | argument --multiplier:
p2_train.py | --out OUT --min-snr inf | argument --min-snr:
p2_train.py | --out OUT --log-sigma 0 0 | --log-sigma: take a deviation of 0.1 or more
p2_train.py | --out OUT --log-sigma 1e9 1 | argument --log-sigma: take a number, -10 to 10
p2_train.py | --out OUT --data IN/none | none: 0 pictures in it
p2_train.py | --out OUT --data IN/photos_bomb | 00.png: not a readable picture (50000x50000
p2_train.py | --out OUT --data IN/photos_cut | 00.png: not a readable picture
p4_train.py | --target svhn --out OUT --lr nan | argument --lr:
p4_train.py | --target svhn --out OUT --ema 2 | argument --ema:
p4_train.py | --target svhn --out OUT --epoch-steps 0 | argument --epoch-steps:
p4_train.py | --target svhn --out OUT --data IN/latin1 | train.csv: not
p3_train.py | --out OUT --epoch-steps 0 | argument --epoch-steps:
p3_train.py | --out OUT --max-time 5 | argument --max-time: take DD:HH:MM:SS
p3_train.py | --out OUT --seed -1 | argument --seed:
p3_train.py | --out OUT --config IN/none.yaml | none.yaml: no such config
p3_train.py | --out OUT --set autoencoder.steps=0 | --set: not of the `training`
p3_train.py | --out OUT --set autoencoder.steps=1e4 | (autoencoder.steps=1e4: it is 6000 there)
p3_train.py | --out OUT --set autoencoder | --set: not of the `training`
p3_train.py | --out OUT --set judge=3 | --set: not of the `training`
p3_train.py | --out OUT --set diffusion.lr=fast | --set: not of the `training`
p3_train.py | --out OUT --set judge.vision_layers=3 | --set: not of the `training`
p3_train.py | --out OUT --data IN/emoji_cut | emoji_cut: no emoji.npz and emoji.json
p3_train.py | --out OUT --data IN/none | none: no emoji.npz and emoji.json
tools/make_digits.py | OUT --seed -1 | argument --seed:
benchmarks/p1.py | --only euler 1 1 0-1 | --only: take SAMPLER STEPS GUIDANCE FROM-TO
benchmarks/p2.py | --size 48 | argument --size:
benchmarks/p4.py | --seeds -1 | argument --seeds:
benchmarks/blind.py | OUT | one of the arguments --pictures --answers is required
benchmarks/blind.py | OUT --pictures IN/none | none: 0 pictures in it, too few
benchmarks/blind.py | IN --answers IN/text | key.json: no such file
benchmarks/p3.py | --repeats 0 | argument --repeats:
report/make_report.py | --remake nothing | argument --remake: invalid choice
tools/make_digits.py | OUT --source IN/none | none: no such folder
tools/typical_faces.py | IN/none OUT | none: 0 pictures in it
tools/typical_faces.py | IN/photos_cut OUT | 00.png: not a readable picture
tools/typical_faces.py | IN/photos_cut IN | in: is there already
tools/typical_faces.py | IN/photos_cut OUT --share 2 | argument --share: take a number, 0.01 to 1
"""  # noqa: E501
CASES = [
    tuple(cell.strip() for cell in line.split(" | ")) for line in TABLE.replace("| |", "|  |").strip().splitlines()
]

ENTRY = {
    "src_image": "dog",
    "token_name": "<new1>",
    "prompt": ["A <new1>."],
    "prompt_4_clip_eval": ["A dog."],
    "baseline": [[70, 30]],
}
JSONS = {
    "good": {"0": ENTRY},
    "list": [ENTRY],
    "surrogate": {"0": {**ENTRY, "prompt": ["\ud800"]}},
    "key_empty": {"": ENTRY},
    "key_up": {"..": ENTRY},
    "key_slash": {"a/b": ENTRY},
    "key_backslash": {"a\\b": ENTRY},
    "key_drive": {"C:x": ENTRY},
    "key_control": {"a\nb": ENTRY},
    "prompt_text": {"0": {**ENTRY, "prompt": "A <new1>."}},
    "prompt_number": {"0": {**ENTRY, "prompt": [1]}},
    "captions_none": {"0": {**ENTRY, "train_captions": ["a dog"]}},
    "captions_two": {"0": {**ENTRY, "train_captions": ["a {} and a {}"]}},
    "validation_number": {"0": {**ENTRY, "validation_prompts": 3}},
    "word_list": {"0": {**ENTRY, "src_image": ["dog"]}},
    "same_token": {"0": ENTRY, "1": ENTRY},
    "no_eval": {"0": {**ENTRY, "prompt_4_clip_eval": []}},
    "baseline_nan": {"0": {**ENTRY, "baseline": [[float("nan"), 30]]}},
    "baseline_number": {"0": {**ENTRY, "baseline": 70}},
    "baseline_short": {"0": {**ENTRY, "baseline": [[70]]}},
    "baseline_text": {"0": {**ENTRY, "baseline": [["70", "30"]]}},
}
CSVS = {
    "latin1": b"image_name,label\n\xe9.png,3\n",
    "nothing": b"",
    "header": b"image_name,label\n",
    "short": b"image_name,label\n0.png,0\n1.png\n",
    "long": b"image_name,label\n0.png,0\n1.png,1,1,1\n",
    "other": b"name,digit\n0.png,0\n",
    "unicode": "image_name,label\n0.png,\u0663\n".encode(),
    "huge": b"image_name,label\n0.png," + b"x" * 200_000 + b"\n",
    "zero": b"\0\0\0\0\n\0",
    "names": b"image_name,label\nelsewhere.png,3\n",
}


def bomb(path):
    """A PNG of 70 bytes that says it is 50000x50000 pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 50000, 50000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0"))]
    packed = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))


def cut(path, size=(32, 32)):
    Image.effect_noise(size, 100).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:200])


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    files = tmp_path_factory.mktemp("bad") / "in"
    write_domain(files / "svhn")
    write_domain(files / "mnistm")
    (files / "empty").write_bytes(b"")
    (files / "text").write_text("hello, world\n" * 9)
    for name, content in JSONS.items():
        (files / f"{name}.json").write_text(json.dumps(content))
    (files / "deep.json").write_text("[" * 100_000)
    (files / "latin1.json").write_bytes(b'{"0": "\xe9"}')
    (files / "infinite.json").write_text('{"0": 1e999}')
    for name, content in CSVS.items():
        (files / name / "svhn").mkdir(parents=True)
        (files / name / "svhn/train.csv").write_bytes(content)
    for (
        folder
    ) in "noise bad_noise bomb cut photos photos_bomb photos_cut svhn_empty svhn_bomb svhn_cut svhn_large hub".split():
        (files / folder).mkdir()
    torch.save(noise_stream(0, [0], (3, 32, 32))(), files / "noise/00.pt")
    torch.save(torch.zeros(3, 48, 48), files / "bad_noise/00.pt")
    (files / "hub/config.json").write_text("[" * 100_000)
    for name in ("sizes", "hub_list", "emoji_cut"):
        (files / name).mkdir()
    for i in range(2):
        torch.save(noise_stream(0, [i], (3, 32 + 32 * i, 32 + 32 * i))(), files / f"sizes/0{i}.pt")
    (files / "hub_list/config.json").write_text("{}")
    torch.save([1, 2], files / "hub_list/pytorch_model.bin")
    torch.save({1: torch.zeros(2)}, files / "numbered.pt")
    np.savez(files / "emoji_cut/emoji.npz", images=np.zeros(9))
    (files / "emoji_cut/emoji.npz").write_bytes((files / "emoji_cut/emoji.npz").read_bytes()[:100])
    Image.new("RGB", (29, 28)).save(files / "svhn_large/0_0.png")
    for i in range(60):
        Image.effect_noise((32, 32), 60).save(files / f"photos/{i:02}.png")
    for kind, damage in (("bomb", bomb), ("cut", cut)):
        damage(files / kind / "00.png")
        damage(files / f"svhn_{kind}/0_0.png")
        damage(files / f"photos_{kind}/00.png")
        for i in range(1, 60):
            Image.new("RGB", (32, 32)).save(files / f"photos_{kind}/{i:02}.png")
        for domain in ("mnistm", "svhn"):
            (files / f"graded_{kind}" / domain).mkdir(parents=True)
            damage(files / f"graded_{kind}" / domain / "0_0.png")
        (files / f"zero_{kind}/val").mkdir(parents=True)
        damage(files / f"zero_{kind}/val/0_0.png")
    (files / "graded_unicode/mnistm").mkdir(parents=True)
    Image.new("RGB", (28, 28)).save(files / "graded_unicode/mnistm/\u0663_0.png")
    labels = {"deep": "[" * 100_000, "list": '["dog"]', "unicode": '{"\u0663": "dog"}'}
    for name in ("deep", "list", "unicode", "empty", "digit", "bytes", "bomb", "cut"):
        (files / f"zero_{name}/val").mkdir(parents=True, exist_ok=True)
        (files / f"zero_{name}/id2label.json").write_text(labels.get(name, '{"0": "dog", "3": "cat"}'), "utf-8")
    Image.new("RGB", (28, 28)).save(files / "zero_digit/val/\u0663_0.png")
    (files / os.fsdecode(b"zero_bytes/val/0_\xff.png")).write_bytes(
        (files / "zero_digit/val/\u0663_0.png").read_bytes()
    )
    bad_checkpoints(files)
    return files


def bad_checkpoints(files):
    torch.save([1, 2], files / "list.pt")
    good = {name: possible[0] for name, possible in CONFIG.items()}
    for name, changes in {
        "channels_is_text": {"channels": "sixty-four"},
        "channels_is_7": {"channels": 7},
        "channels_is_huge": {"channels": 2**20},
        "deep_is_missing": {"deep": None},
        "deep_is_float": {"deep": 64.0},
        "T_is_0": {"T": 0},
        "schedule_is_list": {"schedule": ["cosine"]},
        "objective_is_unknown": {"objective": "score"},
        "steps_is_text": {"steps": "all"},
    }.items():
        torch.save({"state_dict": {}, "config": {**good, **changes}}, files / f"p1_{name}.pt")
    torch.save({"state_dict": {}, "config": "cosine"}, files / "p1_config_is_text.pt")
    torch.save({"state_dict": [1], "config": good}, files / "p1_state_is_list.pt")
    from p1_model import DigitUNet
    from p4_model import DigitNet

    state = {**DigitUNet(good["channels"], good["deep"]).state_dict(), "stem.weight": "text"}
    torch.save({"state_dict": state, "config": good}, files / "p1_text_for_tensor.pt")
    state = {**DigitNet().state_dict(), "features.layers.0.conv.weight": "text"}
    torch.save({"state_dict": state, "config": {"domain": 1}}, files / "p4_text_for_tensor.pt")


# ------------------------------------------------------------------------ running them


def main_of(command):
    """The main() of a command, imported once; skips where what it needs is not installed."""
    path = ROOT / command
    if command.endswith(("_train.py", "_distill.py", "typical_faces.py", "blind.py")):
        pytest.importorskip("pytorch_lightning")
    if command == "p4_tsne.py":
        pytest.importorskip("sklearn")
    if "/" not in command:
        return importlib.import_module(path.stem).main
    if command not in LOADED:
        spec = importlib.util.spec_from_file_location(command, ROOT / command)
        LOADED[command] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(LOADED[command])
    return LOADED[command].main


LOADED = {}


def call(command, words, monkeypatch, capsys):
    """(exit code, lines on stderr but for progress bars) of a command."""
    monkeypatch.syspath_prepend(str((ROOT / command).parent))
    code, main = 0, main_of(command)
    try:
        main(words)
    except SystemExit as e:
        code = e.code
    errors = capsys.readouterr().err.replace("\r", "\n").splitlines()
    return code, [line for line in errors if line.strip() and "it/s]" not in line and "%|" not in line]


def places(words, bad_files, tmp_path):
    """The words of a line, their names of places replaced."""
    named = {"IN": bad_files, "OUT": tmp_path / "out", "SHIPPED": ROOT / "checkpoints", "TINY": ROOT / "tiny"}
    split = [w.partition("/") for w in shlex.split(words)]
    return [f"{named.get(first, first)}{slash}{rest}" for first, slash, rest in split]


def tree(*folders):
    """All files in them, but for the cache that reading digits leaves."""
    return sorted(str(p) for f in folders for p in f.rglob("*") if p.is_file() and p.name != ".cache.npz")


@pytest.mark.parametrize("command, words, says", CASES, ids=[f"{c} {w}" for c, w, _ in CASES])
def test_bad_input_is_one_line_and_leaves_nothing(command, words, says, bad_files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = places(words, bad_files, tmp_path)
    before = tree(bad_files, tmp_path)
    code, lines = call(command, words, monkeypatch, capsys)
    assert code == 2 and len(lines) == 1, lines
    assert lines[0].startswith("error: ") and says in lines[0]
    assert tree(bad_files, tmp_path) == before


# ------------------------------------------------------------------------ our own files with other content


def last_ckpt(kind):
    return {
        "empty": b"",
        "text": b"hello, world\n" * 9,
        "cut": zipped({"state_dict": {}})[:200],
        "list": zipped([1, 2]),
        "weights alone": zipped({"state_dict": {}}),
        "other": zipped({"state_dict": {}, "optimizer_states": [], "lr_schedulers": [], "loops": "none"}),
    }[kind]


def zipped(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["empty", "text", "cut", "list", "weights alone", "other"])
def test_a_last_ckpt_that_is_none_is_named(kind, bad_files, tmp_path, monkeypatch, capsys):
    (tmp_path / "last.ckpt").write_bytes(last_ckpt(kind))
    code, lines = call("p2_train.py", [*small_training(bad_files), "--out", str(tmp_path)], monkeypatch, capsys)
    assert code == 2 and "last.ckpt: " in lines[-1] and lines[-1].startswith("error: "), lines
    assert (tmp_path / "last.ckpt").read_bytes() == last_ckpt(kind)


def small_training(bad_files):
    words = "--size 32 --channel 4 --steps 2 --epoch-steps 1 --batch-size 2 --warmup 1 --device cpu --precision fp32"
    return ["--data", str(bad_files / "photos"), *words.split()]


@pytest.fixture(scope="module")
def inversion(tmp_path_factory):
    """A training of <new1> with two saved steps."""
    import p3_tiny

    import p3_model
    from p3_concepts import image_files, read_concepts
    from p3_invert import Inversion, Recipe

    folder = tmp_path_factory.mktemp("inversion")
    model = p3_tiny.load(p3_tiny.write_model(folder))
    concept = read_concepts(p3_tiny.write_concepts(folder / "data"))[0]._replace(captions=("a {} {x} {0}",))
    recipe = Recipe(steps=2, batch=1, crops=1, save_every=1, preview_every=0, size=64)
    training = Inversion(model, p3_model.learned_tokens(model), concept, recipe, folder / "work")
    training.run(image_files(folder / "data/0"), folder / "new1.pt")
    return training


@pytest.mark.parametrize(
    "file, content",
    [
        ("state.pt", [1]),
        ("state.pt", {}),
        ("state.pt", {"training": "text"}),
        ("state.pt", {"training": None, "vectors": "text"}),
        ("step_00002.safetensors", ({"<new2>": torch.ones(1, 32)}, {})),
        ("step_00002.safetensors", ({"<new1>": torch.ones(1, 32)}, {})),
        ("step_00002.safetensors", ({"<new1>": torch.ones(1, 7)}, {"step": 2, "scores": {"held_back_loss": 1}})),
        ("step_00002.safetensors", ({"<new1>": torch.ones(1, 32)}, {"step": 2, "scores": "good"})),
        ("step_00002.safetensors", ({"<new1>": torch.ones(1, 32)}, {"step": "x", "scores": {"held_back_loss": 1}})),
        ("scores.json", "[1]"),
        ("scores.json", '{"a": [1]}'),
        ("scores.json", '{"a": [1, NaN]}'),
        ("scores.json", "[" * 100_000),
    ],
)
def test_a_file_of_textual_inversion_that_is_none_is_named(file, content, inversion, monkeypatch):
    from p3_invert import Examples

    path = inversion.work / file
    before = path.read_bytes() if path.is_file() else None
    if isinstance(content, tuple):
        tensors, told = content
        path.write_bytes(safetensors.torch.save(tensors, {"textual_inversion": json.dumps(told)}))
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else zipped(content))
    examples = Examples(None, None, [["a {}"]])
    read = {"state.pt": lambda: inversion.resume(examples), "step_00002.safetensors": inversion.saved}.get(file)
    with pytest.raises(UserError, match=f"{file}: ") as e:
        read() if read else inversion.choose([], clip=object())
    assert "remove" in str(e.value) or "correct it" in str(e.value)
    path.unlink() if before is None else path.write_bytes(before)


def test_no_two_tokens_share_a_file():
    from p3_model import embedding_path

    tokens = [
        "<new1>",
        "new1",
        "<a.b>",
        "<a_b>",
        "<a b>",
        "<a/b>",
        "<../x>",
        "a_b",
        "<=a_b>",
        "<>",
        "<%41>",
        "<A>",
        "*",
    ]
    paths = [embedding_path("embeddings", t) for t in tokens]
    assert len({str(p).lower() for p in paths}) == len(tokens)
    assert {p.parent.name for p in paths} == {"embeddings"} and paths[0].name == "new1.safetensors"


# ------------------------------------------------------------------------ a full disk, a signal, another folder

WRITERS = """
p1_infer.py | OUT --num-per-digit 1 --steps 1 | 0_001.png
p1_infer.py | --trajectory OUT/t.png --steps 1 | t.png
p2_ddim.py | --make-noise OUT --count 1 --size 32 | 00.pt
p2_ddim.py | IN/noise OUT SHIPPED/p2_faces.pt --steps 1 | 00.png
p4_infer.py | IN/svhn/data OUT/x.csv | x.csv
digit_classifier.py | --train mnistm --data IN --out OUT/x.pth --epochs 1 --batch-size 30 | x.pth
p3_clip_zeroshot.py | --data TINY/clip_zeroshot --out OUT --model SHIPPED/tiny_clip.pt | examples.
"""


@pytest.mark.parametrize("line", WRITERS.strip().splitlines())
def test_a_full_disk_is_one_line_and_leaves_nothing(line, bad_files, tmp_path, monkeypatch, capsys):
    command, words, file = line.split(" | ")
    main_of(command)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))  # any file larger than 20 bytes fails to be written
    try:
        code, lines = call(command, places(words, bad_files, tmp_path), monkeypatch, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and len(lines) == 1 and file in lines[0] and "File too large" in lines[0], lines
    assert not tree(tmp_path)


PICTURES = """
p3_infer.py | TINY/textual_inversion/input.json OUT SHIPPED/tiny.ckpt --images 1 --steps 1 | source0_prompt0_0.png
stable-diffusion/scripts/txt2img.py | --outdir OUT --ckpt SHIPPED/tiny.ckpt --f 4 --H 64 --W 64 --ddim_steps 1 | 0.png
"""


@pytest.mark.parametrize("line", PICTURES.strip().splitlines())
def test_a_picture_that_does_not_fit_the_disk_is_named(line, bad_files, tmp_path, monkeypatch, capsys):
    def save_half(image, path, **_):
        pathlib.Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    command, words, file = line.split(" | ")
    monkeypatch.setattr(Image.Image, "save", save_half)
    code, lines = call(command, places(words, bad_files, tmp_path), monkeypatch, capsys)
    assert code == 2 and len(lines) == 1 and file in lines[0] and "No space left" in lines[0], lines
    assert not tree(tmp_path)


STOPPED = """
2 | p1_infer.py | OUT --num-per-digit 1 --steps 1 | save_png | run the same line again
15 | p1_infer.py | OUT --num-per-digit 1 --steps 1 | save_png | run the same line again
15 | p3_infer.py | TINY/textual_inversion/input.json OUT SHIPPED/tiny.ckpt --images 1 --steps 1 | save_png | goes on
15 | p2_train.py | TRAINING --out OUT | save_png | the same line starts anew
2 | stable-diffusion/scripts/txt2img.py | --outdir OUT --ckpt SHIPPED/tiny.ckpt --f 4 --H 64 --W 64 | save | the same line
15 | stable-diffusion/scripts/txt2img.py | --outdir OUT --ckpt SHIPPED/tiny.ckpt --f 4 --H 64 --W 64 | save | the same line
"""  # noqa: E501


@pytest.mark.parametrize("line", STOPPED.strip().splitlines())
def test_a_signal_ends_with_how_to_go_on(line, bad_files, tmp_path, monkeypatch, capsys):
    number, command, words, function, says = line.split(" | ")
    words = words.replace("TRAINING", shlex.join(small_training(bad_files)))
    main = main_of(command)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for room in (vars(utils), getattr(main, "__wrapped__", main).__globals__):
        if function in room:
            monkeypatch.setitem(room, function, lambda *a: os.kill(os.getpid(), int(number)))
    try:
        code, lines = call(command, places(words, bad_files, tmp_path), monkeypatch, capsys)
    finally:
        signal.signal(signal.SIGINT, before[0])
    assert code == 128 + int(number) and says in lines[-1] and "Traceback" not in "".join(lines), lines
    assert not [p for p in tree(tmp_path) if p.endswith((".tmp", ".png"))]
    assert signal.getsignal(signal.SIGTERM) == before[1]


def test_p1_train_finds_its_classifiers_from_any_folder(tmp_path, monkeypatch):
    pytest.importorskip("pytorch_lightning")
    import p1_train

    monkeypatch.chdir(tmp_path)
    assert all(pathlib.Path(c).is_file() for c in p1_train.parse([]).classifiers)


def test_a_full_disk_under_the_standard_output_is_one_line(tmp_path):
    command = [sys.executable, ROOT / "p2_ddim.py", "--make-noise", tmp_path, "--count", "1", "--size", "32"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "No space left" in done.stderr


@pytest.mark.parametrize("script", ["demo.sh", "get_dataset.sh", "test.sh", "hw2_download_ckpt.sh"])
def test_shell_scripts_show_their_help_and_do_nothing_else(script):
    done = subprocess.run(["bash", ROOT / script, "--help"], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0 and f"bash {script}" in done.stdout
