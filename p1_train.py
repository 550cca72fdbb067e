"""Trains Problem 1: the class- and domain-conditional DDPM on MNIST-M and SVHN.

    python3 p1_train.py --data hw2_data/digits --out runs/p1            # the same line again resumes it
    python3 p1_train.py --out runs/p1 --devices 4 --num_nodes 2         # DDP, as Lightning does it

    python3 p1_train.py --out runs/p1_more --start checkpoints/p1_unet.pt --lr 3e-4

Leaves in --out: last.ckpt (resumable), best.pt (of all epochs and --ema decays the average with the lowest loss on
held-back digits, in half precision; copy it to checkpoints/p1_unet.pt), samples/*.png, csv/ and tensorboard/.
"""

from __future__ import annotations

import functools
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytorch_lightning as pl
import torch

from classifiers import load_classifier
from diffusion import schedule, training_loss
from digits import DOMAINS, BalancedDigits
from p1_model import NO_DIGIT, DigitUNet, judged_samples, load_digit_unet
from train_common import SaveBest, Training, add_training_options, fit, lightning_trainer
from utils import CHECKPOINTS, Parser, UserError, cli, output_folder, real, to_float, whole


class DigitDiffusion(Training):
    """Algorithm 1 of DDPM on batches (uint8 [B, 3, 28, 28], digit [B], domain [B]), with the digit dropped for
    guidance."""

    def __init__(self, model, config, args):
        super().__init__(model, config, args)
        self.alpha_bar = schedule(config["schedule"], config["T"])

    def loss(self, model, batch, digit, **fixed):
        images, _, domain = batch
        objective, min_snr = self.config["objective"], self.config["min_snr"]
        network = functools.partial(model, digit=digit, domain=domain)
        return training_loss(network, to_float(images), self.alpha_bar, objective, min_snr, **fixed)

    def training_step(self, batch, _):
        digit = batch[1].masked_fill(torch.rand(len(batch[1]), device=self.device) < self.args.drop, NO_DIGIT)
        loss = self.loss(self.model, batch, digit).mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, i):
        noise = torch.Generator().manual_seed(i)
        t = torch.randint(self.config["T"], (len(batch[0]),), generator=noise)
        eps = torch.randn(batch[0].shape, generator=noise).to(self.device)
        for decay, average in zip(self.averages.decays, self.averages):
            loss = self.loss(average, batch, batch[1], t=t, eps=eps)
            self.log(f"val_loss_{decay}", loss.mean(), sync_dist=True)
            for d, name in enumerate(DOMAINS):
                self.log(f"val_loss_{decay}_{name}", loss[batch[2] == d].mean(), sync_dist=True)


def parse(argv):
    parser = Parser(__doc__)
    option = parser.add_argument
    option("--data", default="hw2_data/digits", help="folder with mnistm/ and svhn/")
    option("--start", metavar="CHECKPOINT", help="go on from its weights; --channels and --deep are its own")
    option("--channels", type=whole(16, 1024, 16), default=64, help="at 14x14 (default: 64)")
    option("--deep", type=whole(64, 1024, 64), default=192, help="channels at 7x7 (default: 192)")
    option("--min-snr", type=real(0), default=5.0, help="gamma of the min-SNR loss weight; 0 = none (default: 5)")
    option("--drop", type=real(0, 1), default=0.15, help="how often the digit is dropped (default: 0.15)")
    judges = [str(CHECKPOINTS / f"{name}_classifier.pth") for name in DOMAINS]
    option("--classifiers", nargs=2, metavar=("MNISTM", "SVHN"), default=judges)
    add_training_options(parser, out="runs/p1", steps=8500, batch_size=128, lr=1e-3, ema=[0.999, 0.9995, 0.9999])
    return parser.parse_args(argv)


@cli
def main(argv=None):
    args = parse(argv)
    train, val = (BalancedDigits(args.data, split, length=2000) for split in ("train", "val"))
    pl.seed_everything(args.seed, verbose=False)
    if args.start:
        model, config = load_digit_unet(args.start)
        if "steps" in config:
            raise UserError(f"{args.start}: a few-step network, which p1_distill.py trains; start from p1_unet.pt")
    else:
        model = DigitUNet(args.channels, args.deep)
        config = {"channels": args.channels, "deep": args.deep, "T": 1000, "schedule": "cosine", "objective": "v"}
    config = {**config, "min_snr": args.min_snr or None}
    judges = [load_classifier(c, args.device) for c in args.classifiers]
    out = output_folder(args.out)
    module = DigitDiffusion(model, config, args)
    trainer = lightning_trainer(args, [SaveBest(out, judged_samples, judges)])
    fit(args, trainer, module, train, val, "last.ckpt,best.pt,samples/")


if __name__ == "__main__":
    main(sys.argv[1:])
