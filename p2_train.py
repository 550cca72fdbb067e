"""Trains a narrow face U-Net for Problem 2, so that faces can be seen without the course's UNet.pt.

    python3 p2_train.py --data hw2_data/face/photos --out runs/p2       # the same line again resumes it
    python3 p2_train.py --out runs/p2_more --start checkpoints/p2_faces.pt      # with either objective
    python3 p2_train.py --out runs/p2_wider --start NARROWER --multiplier 1 1 4 3 4 4      # grows it first
    python3 p2_train.py --out runs/p2_guided --start GOOD --guide WORSE --perturb 0 --lr 3e-4     # distils autoguidance

Leaves in --out: last.ckpt (resumable), best.pt (of all epochs and --ema decays the average with the lowest loss on
held-back faces, in half precision; copy it to checkpoints/p2_faces.pt), samples/*.png (16 faces after every epoch),
csv/ and tensorboard/. p2_ddim.py takes best.pt as it takes UNet.pt.
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

import utils
from diffusion import ddim, eps_from_v, run, schedule, time_batch, time_shares, timesteps, training_loss
from digits import is_validation
from train_common import Autoguided, Batches, SaveBest, Training, add_training_options, fit, lightning_trainer
from UNet import MULTIPLIER, UNet, load_unet, norm_groups, widened
from utils import Parser, UserError, cli, real, whole

TIMES = "normal distribution of log(sigma/alpha) of the times that are trained (default: -0.5 1.3)"
MULTIPLIERS = "widths by resolution, in units of --channel; --start grows to them (default: its own, or 1 1 2 2 4 4)"
PICTURES = {".png", ".jpg", ".jpeg", ".webp"}


class FaceDiffusion(Training):
    """Algorithm 1 of DDPM (Ho et al. 2020) on batches uint8 [B, 3, S, S], each picture flipped half of the time."""

    alpha_bar = schedule("linear", 1000)  # what p2_ddim.py samples with

    def __init__(self, model, config, args, teacher=None):
        super().__init__(model, config, args)
        self.shares = time_shares(self.alpha_bar, *config["log_sigma"])
        self.teacher = teacher

    def loss(self, model, images, t, **options):
        options.update({name: self.config[name] for name in ("objective", "min_snr")}, t=t, teacher=self.teacher)
        return training_loss(model, utils.to_float(images), self.alpha_bar, **options).mean()

    def training_step(self, images, _):
        t = self.shares.multinomial(len(images), replacement=True)
        flip = torch.rand(len(images), 1, 1, 1, device=self.device) < 0.5
        loss = self.loss(self.model, torch.where(flip, images.flip(-1), images), t, perturb=self.config["perturb"])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, images, i):
        even = (torch.arange(len(images), dtype=torch.float64) + 0.5) / len(images)  # of as many times as pictures
        t = torch.searchsorted(self.shares.cumsum(0), even).clamp(max=len(self.shares) - 1)
        for decay, average in zip(self.averages.decays, self.averages):
            draw = torch.Generator().manual_seed(i)
            eps = torch.randn(images.shape, generator=draw).to(self.device)
            self.log(f"val_loss_{decay}", self.loss(average, images, t, eps=eps), sync_dist=True)


def draw(model, config):
    """16 faces by DDIM, 50 steps, as one picture."""
    alpha_bar = schedule("linear", 1000)
    noise = utils.noise_stream(0, range(16), (3, config["size"], config["size"]), next(model.parameters()).device)

    def predict(x_t, t):
        return model(x_t, time_batch(x_t, t))

    eps_model = eps_from_v(predict, alpha_bar) if config["objective"] == "v" else predict
    faces = run(ddim(eps_model, noise(), alpha_bar, timesteps(1000, 50, "course")))
    return utils.image_grid(utils.to_uint8(faces).cpu(), 8), {}


def face_paths(folder):
    """The pictures in the folder by name, at least two; raises UserError where there are fewer."""
    paths = sorted(p for p in pathlib.Path(folder).glob("[!.]*") if p.suffix.lower() in PICTURES)
    if len(paths) < 2:
        raise UserError(f"{folder}: {len(paths)} pictures in it, too few to train on; name the folder of face photos")
    return paths


def read_pictures(paths, size):
    """uint8 [N, 3, size, size], each cropped to a square and scaled; raises UserError where one cannot be read."""
    with ThreadPoolExecutor() as pool:
        read = tqdm(pool.map(lambda p: read_face(p, size), paths), total=len(paths), desc="reading faces", leave=False)
        return torch.from_numpy(np.stack(list(read)))


def read_faces(folder, size):
    """uint8 [N, 3, size, size] (train, held back): every picture in the folder; held back are the 2 % whose names hash
    lowest. Raises UserError where there are none, or one cannot be read."""
    paths = face_paths(folder)
    held_back = torch.tensor([is_validation(p.name, 0.02) for p in paths])
    if held_back.all() or not held_back.any():
        raise UserError(f"{folder}: {len(paths)} pictures in it, too few to hold some back; name a larger folder")
    images = read_pictures(paths, size)
    return images[~held_back], images[held_back]


def read_face(path, size):
    return np.asarray(ImageOps.fit(utils.open_image(path), (size, size), Image.Resampling.LANCZOS)).transpose(2, 0, 1)


def parse(argv):
    parser = Parser(__doc__)
    option = parser.add_argument
    option("--data", default="hw2_data/face/photos", help="folder of pictures")
    option("--size", type=whole(32, 2048, 32), default=64, help="height and width, a multiple of 32 (default: 64)")
    option("--start", metavar="CHECKPOINT", help="go on from its weights; --channel is its own")
    option("--multiplier", type=whole(1, 16), nargs=6, metavar="M", help=MULTIPLIERS)
    option("--guide", metavar="CHECKPOINT", help="a worse network: learn to predict what --start does, guided by it")
    option("--guide-scale", type=real(1, 10), default=2.0, help="of that guidance; 1 = none (default: 2)")
    option("--channel", type=channel, default=32, help="width of the largest map; 128 is the course's (default: 32)")
    option("--objective", choices=["eps", "v"], default="v", help="what the network predicts (default: v)")
    option("--min-snr", type=real(0), default=0.0, help="gamma of the min-SNR loss weight; 0 = none (default: 0)")
    option("--log-sigma", type=real(-10, 10), nargs=2, metavar=("MEAN", "STD"), default=[-0.5, 1.3], help=TIMES)
    option("--perturb", type=real(0, 1), default=0.1, help="gamma of the input perturbation (default: 0.1)")
    add_training_options(parser, out="runs/p2", steps=7500, batch_size=32, lr=6e-4, ema=[0.999, 0.9995, 0.9999])
    args = parser.parse_args(argv)
    if args.guide and not args.start:
        raise UserError("--guide: give the network that it is to guide, --start")
    if args.log_sigma[1] < 0.1:
        raise UserError(f"--log-sigma: take a deviation of 0.1 or more, not {args.log_sigma[1]:g}")
    return args


def autoguided(args):
    networks = [load_unet(path) for path in (args.start, args.guide)]
    for path, network in zip((args.start, args.guide), networks):
        if network.objective != args.objective:
            raise UserError(f"{path}: predicts {network.objective}, not {args.objective}; see --objective")
    return Autoguided(*networks, args.guide_scale)


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
    out = utils.output_folder(args.out)
    config = {name: getattr(args, name) for name in ("size", "objective", "log_sigma", "perturb")}
    pl.seed_everything(args.seed, verbose=False)
    if args.start:
        model = load_unet(args.start)
        model = (widened(model, args.multiplier) if args.multiplier else model).requires_grad_(True)
    else:
        model = UNet(channel=args.channel, channel_multiplier=args.multiplier or MULTIPLIER)
    config.update(channel=model.channel, channel_multiplier=model.channel_multiplier, min_snr=args.min_snr or None)
    teacher = autoguided(args) if args.guide else None
    if teacher:
        config["guide"] = teacher.id
    module = FaceDiffusion(model, config, args, teacher)
    trainer = lightning_trainer(args, [SaveBest(out, draw)])
    drawn = Batches(len(train), lambda rows: train[torch.randint(len(train), (len(rows),))])
    fit(args, trainer, module, drawn, Batches(len(val), val.__getitem__), "last.ckpt,best.pt,samples/")


if __name__ == "__main__":
    main(sys.argv[1:])
