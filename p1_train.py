"""Trains Problem 1: the class- and domain-conditional DDPM on MNIST-M and SVHN.

    python3 p1_train.py --data hw2_data/digits --out runs/p1            # the same line again resumes it
    python3 p1_train.py --out runs/p1 --devices 4 --num_nodes 2         # DDP, as Lightning does it

Leaves in --out: last.ckpt (resumable), best.pt (EMA weights in half precision, the best by accuracy of generated
digits; copy it to checkpoints/p1_unet.pt), last.pt (those of the last epoch), samples/*.png, csv/ and tensorboard/.
"""

from __future__ import annotations

import functools
import os
import pathlib
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytorch_lightning as pl
import torch

from classifiers import load_classifier, predict
from diffusion import run, schedule, training_loss
from digits import DOMAINS, BalancedDigits
from p1_model import NO_DIGIT, DigitUNet, eps_model_for, reverse_process
from train_common import Keep, add_training_options, fit, lightning_trainer, warmup_cosine
from utils import (
    Parser,
    autocast,
    cli,
    half,
    image_grid,
    noise_stream,
    output_folder,
    real,
    save_png,
    to_float,
    to_uint8,
    whole,
)

CHECKPOINTS = pathlib.Path(__file__).resolve().parent / "checkpoints"


class DigitDiffusion(pl.LightningModule):
    """Algorithm 1 of DDPM on batches (uint8 [B, 3, 28, 28], digit [B], domain [B]), with the digit dropped for
    guidance."""

    def __init__(self, config, lr, total_steps, warmup, drop):
        super().__init__()
        self.config, self.lr, self.drop = config, lr, drop
        self.total_steps, self.warmup = total_steps, warmup
        self.alpha_bar = schedule(config["schedule"], config["T"])
        self.model = DigitUNet(config["channels"], config["deep"]).to(memory_format=torch.channels_last)

    def loss(self, batch, digit, **fixed):
        images, _, domain = batch
        objective, min_snr = self.config["objective"], self.config["min_snr"]
        network = functools.partial(self.model, digit=digit, domain=domain)
        return training_loss(network, to_float(images), self.alpha_bar, objective, min_snr, **fixed)

    def training_step(self, batch, _):
        digit = batch[1].masked_fill(torch.rand(len(batch[1]), device=self.device) < self.drop, NO_DIGIT)
        loss = self.loss(batch, digit).mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, i):
        noise = torch.Generator().manual_seed(i)
        t = torch.randint(self.config["T"], (len(batch[0]),), generator=noise)
        eps = torch.randn(batch[0].shape, generator=noise).to(self.device)
        loss = self.loss(batch, batch[1], t=t, eps=eps)
        for d, name in enumerate(DOMAINS):
            self.log(f"val_loss_{name}", loss[batch[2] == d].mean(), sync_dist=True)

    def shipped(self):
        return {"state_dict": half(self.model.state_dict()), "config": self.config}

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, betas=(0.9, 0.99), weight_decay=0.01)
        return warmup_cosine(optimizer, self.total_steps, self.warmup)


def draw(module, digit, domain, bf16):
    """uint8 [N, 3, 28, 28]: one sample for each digit and domain, int64 [N]; 12 DPM-Solver++ steps, guidance 2."""
    images = []
    for part in torch.arange(len(digit)).split(100):
        noise = noise_stream(0, part, (3, 28, 28), module.device)
        condition = digit[part].to(module.device), domain[part].to(module.device)
        with autocast(module.device, torch.bfloat16 if bf16 else torch.float32):
            eps_model = eps_model_for(module.model, module.config, *condition, scale=2.0)
            images.append(to_uint8(run(reverse_process(eps_model, module.config, noise))).cpu())
    return torch.cat(images)


class Samples(Keep):
    """Judges the digits of samples, a picture of which it saves."""

    score = "accuracy"

    def __init__(self, out, classifiers):
        super().__init__(out)
        self.classifiers = classifiers

    def evaluate(self, trainer, module):
        pair = torch.arange(200) // 10
        images = draw(module, pair % 10, pair // 10, trainer.precision == "bf16-mixed")
        save_png(image_grid(images, 20), self.out / "samples" / f"{trainer.global_step:07d}.png")
        right = [
            (predict(judge, images[pair // 10 == d]) == pair[pair // 10 == d] % 10).float().mean().item()
            for d, judge in enumerate(self.classifiers)
        ]
        return {**{f"accuracy_{name}": a for name, a in zip(DOMAINS, right)}, "accuracy": sum(right) / 2}


def parse(argv):
    parser = Parser(__doc__)
    option = parser.add_argument
    option("--data", default="hw2_data/digits", help="folder with mnistm/ and svhn/")
    option("--channels", type=whole(16, 1024, 16), default=64, help="at 14x14 (default: 64)")
    option("--deep", type=whole(64, 1024, 64), default=192, help="channels at 7x7 (default: 192)")
    option("--min-snr", type=real(0), default=5.0, help="gamma of the min-SNR loss weight; 0 = none (default: 5)")
    option("--drop", type=real(0, 1), default=0.15, help="how often the digit is dropped (default: 0.15)")
    judges = [str(CHECKPOINTS / f"{name}_classifier.pth") for name in DOMAINS]
    option("--classifiers", nargs=2, metavar=("MNISTM", "SVHN"), default=judges)
    add_training_options(parser, out="runs/p1", steps=8500, batch_size=128, lr=1e-3, ema=0.999)
    return parser.parse_args(argv)


@cli
def main(argv=None):
    args = parse(argv)
    config = {"channels": args.channels, "deep": args.deep, "T": 1000, "schedule": "cosine", "objective": "v"}
    config["min_snr"] = args.min_snr or None
    train, val = (BalancedDigits(args.data, split, length=2000) for split in ("train", "val"))
    pl.seed_everything(args.seed, verbose=False)
    classifiers = [load_classifier(c) for c in args.classifiers]
    out = output_folder(args.out)
    output_folder(out / "samples")
    module = DigitDiffusion(config, args.lr, args.steps, args.warmup, args.drop)
    trainer = lightning_trainer(args, [Samples(out, classifiers)])
    fit(args, trainer, module, train, val)
    if trainer.is_global_zero:
        print(f"step {trainer.global_step} of {args.steps}; wrote {out}/{{last.ckpt,best.pt,last.pt,samples/}}")


if __name__ == "__main__":
    main(sys.argv[1:])
