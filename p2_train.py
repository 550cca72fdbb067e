"""Trains a narrow face U-Net for Problem 2, so that faces can be seen without the course's UNet.pt.

    python3 p2_train.py --data hw2_data/face/photos --out runs/p2       # the same line again resumes it

Leaves in --out: last.ckpt (resumable), last.pt (EMA weights in half precision; copy it to checkpoints/p2_faces.pt),
samples/*.png (16 faces after every epoch), csv/ and tensorboard/. p2_ddim.py takes last.pt as it takes UNet.pt.
"""

from __future__ import annotations

import os
import pathlib
import sys
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from diffusion import ddim, run, schedule, time_batch, timesteps, training_loss
from digits import is_validation
from train_common import Batches, Keep, add_training_options, fit, lightning_trainer, warmup_cosine
from UNet import UNet, norm_groups
from utils import (
    Parser,
    UserError,
    autocast,
    cli,
    half,
    image_grid,
    noise_stream,
    open_image,
    output_folder,
    real,
    save_png,
    to_float,
    to_uint8,
    whole,
)

PICTURES = {".png", ".jpg", ".jpeg", ".webp"}


class FaceDiffusion(pl.LightningModule):
    """Algorithm 1 of DDPM (Ho et al. 2020) on batches uint8 [B, 3, S, S], each picture flipped half of the time."""

    def __init__(self, config, lr, total_steps, warmup):
        super().__init__()
        self.config, self.lr, self.total_steps, self.warmup = config, lr, total_steps, warmup
        self.alpha_bar = schedule("linear", 1000)  # what p2_ddim.py samples with
        self.model = UNet(channel=config["channel"]).to(memory_format=torch.channels_last)

    def loss(self, images, **fixed):
        x_0 = to_float(images)
        return training_loss(self.model, x_0, self.alpha_bar, min_snr=self.config["min_snr"], **fixed).mean()

    def training_step(self, images, _):
        flip = torch.rand(len(images), 1, 1, 1, device=self.device) < 0.5
        loss = self.loss(torch.where(flip, images.flip(-1), images))
        self.log("train_loss", loss)
        return loss

    def validation_step(self, images, i):
        noise = torch.Generator().manual_seed(i)
        t = torch.randint(1000, (len(images),), generator=noise)
        eps = torch.randn(images.shape, generator=noise).to(self.device)
        self.log("val_loss", self.loss(images, t=t, eps=eps), sync_dist=True)

    def shipped(self):
        state_dict = self.model.state_dict()
        frequencies = {"time.0.inv_freq": state_dict["time.0.inv_freq"].cpu()}  # rounded, they would move t
        return {"state_dict": {**half(state_dict), **frequencies}, "config": self.config}

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, betas=(0.9, 0.99), weight_decay=0.01)
        return warmup_cosine(optimizer, self.total_steps, self.warmup)


class Samples(Keep):
    """Saves a picture of 16 faces: DDIM, 50 steps, fixed noise."""

    def evaluate(self, trainer, module):
        size = module.config["size"]
        noise = noise_stream(0, range(16), (3, size, size), module.device)
        times = timesteps(1000, 50, "course")
        with autocast(module.device, torch.bfloat16 if trainer.precision == "bf16-mixed" else torch.float32):
            x = run(ddim(lambda x, t: module.model(x, time_batch(x, t)), noise(), module.alpha_bar, times))
        save_png(image_grid(to_uint8(x).cpu(), 8), self.out / "samples" / f"{trainer.global_step:07d}.png")
        return {}


def read_faces(folder, size):
    """uint8 [N, 3, size, size] (train, held back): every picture in the folder, cropped to a square and scaled.

    Held back are the 2 % whose names hash lowest. Raises UserError where there are none, or one cannot be read.
    """
    folder = pathlib.Path(folder)
    paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in PICTURES and not p.name.startswith("."))
    held_back = torch.tensor([is_validation(p.name, 0.02) for p in paths])
    if not paths or held_back.all() or not held_back.any():
        raise UserError(f"{folder}: {len(paths)} pictures in it, too few to train on; name the folder of face photos")
    with ThreadPoolExecutor() as pool:
        read = tqdm(pool.map(lambda p: read_face(p, size), paths), total=len(paths), desc="reading faces", leave=False)
        images = torch.from_numpy(np.stack(list(read)))
    return images[~held_back], images[held_back]


def read_face(path, size):
    return np.asarray(ImageOps.fit(open_image(path), (size, size), Image.Resampling.LANCZOS)).transpose(2, 0, 1)


def parse(argv):
    parser = Parser(__doc__)
    option = parser.add_argument
    option("--data", default="hw2_data/face/photos", help="folder of pictures")
    option("--size", type=whole(32, 2048, 32), default=64, help="height and width, a multiple of 32 (default: 64)")
    option("--channel", type=channel, default=32, help="width of the largest map; 128 is the course's (default: 32)")
    option("--min-snr", type=real(0), default=5.0, help="gamma of the min-SNR loss weight; 0 = none (default: 5)")
    add_training_options(parser, out="runs/p2", steps=7500, batch_size=32, lr=6e-4, ema=0.999)
    return parser.parse_args(argv)


def channel(text):
    """`type` of --channel: a width that the U-Net's group normalisation can divide."""
    c = whole(1, 512)(text)
    try:
        norm_groups(c)
    except ValueError as e:
        raise UserError(str(e)) from None
    return c


@cli
def main(argv=None):
    args = parse(argv)
    train, val = read_faces(args.data, args.size)
    out = output_folder(args.out)
    output_folder(out / "samples")
    config = {"channel": args.channel, "size": args.size, "min_snr": args.min_snr or None}
    pl.seed_everything(args.seed, verbose=False)
    module = FaceDiffusion(config, args.lr, args.steps, args.warmup)
    trainer = lightning_trainer(args, [Samples(out)])
    drawn = Batches(len(train), lambda rows: train[torch.randint(len(train), (len(rows),))])
    fit(args, trainer, module, drawn, Batches(len(val), val.__getitem__))
    if trainer.is_global_zero:
        print(f"step {trainer.global_step} of {args.steps}; wrote {out}/{{last.ckpt,last.pt,samples/}}")


if __name__ == "__main__":
    main(sys.argv[1:])
