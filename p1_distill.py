"""Distils the guided sampler of Problem 1 into a network of one to eight steps that needs no guidance.

    python3 p1_distill.py --out runs/p1_four                                    # t = 999, 499, 249, 124, data
    python3 p1_distill.py --out runs/p1_two --times 999 374 --start runs/p1_four/best.pt --trajectories runs/p1_four

After Zhou et al. 2024, Simple and Fast Distillation of Diffusion Models: trajectories of the teacher are sampled once
(Ctrl-C keeps those that are there; --max-time counts from the end of it), and the student learns to be where the
teacher is at each of its own times, from where it came to itself before. That alone leaves it blurred: hence
--features, and --adversarial for a last, short run with --start. Leaves in --out what p1_train.py does, and
trajectories_*.pt, 9 GB for 200,000, from which another run may learn.
"""

from __future__ import annotations

import os
import pathlib
import sys
import zlib

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from tqdm import tqdm

import utils
from classifiers import feature_distance, load_classifier
from diffusion import alpha_sigma, q_sample, schedule, timesteps
from digits import DOMAINS, BalancedDigits
from p1_model import Critic, judged_samples, load_digit_unet, stages
from train_common import Batches, SaveBest, SaveLast, Training, add_training_options, fit, lightning_trainer
from utils import CHECKPOINTS, Parser, UserError, cli, output_folder, pick_precision, real, whole

KEPT = timesteps(1000, 8)  # 999, 874, 749 ... 124, -1: every second time of the teacher, of which states are kept
TIMES = [999, 499, 249, 124]  # the last step short: it is the one that blurs
CHUNK, SEEDS = 500, 10**6  # trajectories a file; their seeds, above those of hw2_1.sh


class Distillation(Training):
    """On (states float16 [B, times, 3, 28, 28], digit [B], domain [B]; real uint8 [B, 3, 28, 28] for a critic)."""

    def __init__(self, model, config, args, judge):
        super().__init__(model, config, args)
        self.alpha_bar, self.judge = schedule(config["schedule"], config["T"]), [judge.requires_grad_(False)]
        self.critic = Critic(model) if args.adversarial else None

    def loss(self, model, states, digit, domain):
        """(mean over the steps of |v - v*|, where v* leads to the teacher's next state, plus that in features; x_0)."""
        x, total, times = states[:, 0].float(), 0.0, [*self.config["steps"], -1]
        for i, (t, s) in enumerate(zip(times[:-1], times[1:])):
            (a_t, s_t), (a_s, s_s) = alpha_sigma(self.alpha_bar, t), alpha_sigma(self.alpha_bar, s)
            along, across = a_s * a_t + s_s * s_t, s_s * a_t - a_s * s_t
            v = model(x.detach(), torch.full_like(digit, t), digit, domain)
            x = along * x.detach() + across * v  # = a_s x_0 + s_s eps, as x_0 = a_t x - s_t v, eps = s_t x + a_t v
            total = total + (x - states[:, i + 1]).abs().mean() / abs(across)
        return total / (i + 1) + self.args.features * feature_distance(self.judge[0], x, states[:, -1].float()), x

    def training_step(self, batch, _):
        states, digit, domain, *images = batch
        loss, x_0 = self.loss(self.model, states, digit, domain)
        self.log("train_loss", loss)
        if self.critic:
            fool, tell = self.contest(x_0, utils.to_float(images[0]), digit, domain)
            self.log_dict({"train_fool": fool, "train_tell": tell})
            loss = loss + self.args.adversarial * fool + tell
        return loss

    def contest(self, made, images, digit, domain):
        """(student's, critic's) loss of a GAN on noised pictures (Diffusion-GAN, Wang et al. 2023)."""
        t = torch.randint(600, (len(made),))  # later, noise hides what the critic shall see
        made, images = (q_sample(x, t, torch.randn_like(x), self.alpha_bar) for x in (made, images))
        t = t.to(made.device)
        frozen = {name: p.detach() for name, p in self.critic.named_parameters()}
        fooled = torch.func.functional_call(self.critic, frozen, (made, t, digit, domain))
        of_made, of_real = (self.critic(x, t, digit, domain) for x in (made.detach(), images))
        return F.softplus(-fooled).mean(), F.softplus(of_made).mean() + F.softplus(-of_real).mean()

    def validation_step(self, batch, _):
        for decay, average in zip(self.averages.decays, self.averages):
            self.log(f"val_loss_{decay}", self.loss(average, *batch[:3])[0], sync_dist=True)


def trajectories(args, teacher, config, folder):
    """float16 [count, args.times and the data, 3, 28, 28], read or sampled; i is of the digit and domain i % 20."""
    dtype, parts = pick_precision(args.precision, args.device), []
    key = zlib.crc32(f"{stages.__defaults__} {dtype}".encode(), zlib.crc32(pathlib.Path(args.teacher).read_bytes()))
    for start in tqdm(range(0, args.count, CHUNK), desc="trajectories", unit="file"):
        path = folder / f"trajectories_{key:08x}_{args.seed}_{start:07d}.pt"
        if not path.is_file():
            index = torch.arange(start, start + CHUNK)
            states = list(stages(teacher, config, index % 10, index % 20 // 10, index, args.seed + SEEDS, dtype))
            utils.save_checkpoint(torch.stack(states[::2], dim=1).half().cpu(), path)
        columns = [KEPT.index(t) for t in [*args.times, -1]]
        parts.append(utils.load_checkpoint(path)[:, columns])
    return torch.cat(parts)


def parse(argv):
    parser = Parser(__doc__)
    option = parser.add_argument
    option("--teacher", default=str(CHECKPOINTS / "p1_unet.pt"))
    option("--start", metavar="CHECKPOINT", help="the student before it learns (default: the teacher)")
    option("--times", type=int, nargs="+", choices=KEPT[:-1], default=TIMES, help="(default: 999 499 249 124)")
    option("--count", type=whole(CHUNK, SEEDS, CHUNK), default=40_000, help="trajectories (default: 40000)")
    option("--trajectories", metavar="FOLDER", help="where they are or shall be (default: --out)")
    option("--features", type=real(0), default=0.1, help="weight of a loss in the SVHN judge's features (default: 0.1)")
    option("--adversarial", type=real(0), default=0.0, help="weight of a critic's loss; 0 = none (default: 0)")
    option("--data", default="hw2_data/digits", help="folder with mnistm/ and svhn/, for the critic")
    add_training_options(parser, out="runs/p1_student", steps=4000, batch_size=128, lr=2e-4, ema=[0.999, 0.9995])
    args = parser.parse_args(argv)
    if args.times != [t for t in KEPT if t in {*args.times, KEPT[0]}]:
        raise UserError(f"--times {' '.join(map(str, args.times))}: take 999 first, and then less and less")
    return args


@cli
def main(argv=None):
    args = parse(argv)
    teacher, config = load_digit_unet(args.teacher)
    student, of_student = load_digit_unet(args.start or args.teacher)
    if "steps" in config or of_student["objective"] != "v" or of_student["schedule"] != config["schedule"]:
        raise UserError(f"{args.teacher}: take a teacher of p1_train.py, and a student that predicts v on its schedule")
    judges = [load_classifier(CHECKPOINTS / f"{name}_classifier.pth", args.device) for name in DOMAINS]
    digits = BalancedDigits(args.data, "train", length=1) if args.adversarial else None
    out = output_folder(args.out)
    states = trajectories(args, teacher.to(args.device), config, output_folder(args.trajectories or out))

    def batch(rows):
        pair = rows % 20
        images = [digits.__getitems__(pair.tolist())[0]] if digits else []  # as many real ones of each digit and domain
        return states[rows], pair % 10, pair // 10, *images

    torch.manual_seed(args.seed)
    held_back = min(1000, args.count // 10)
    train = Batches(args.count, lambda rows: batch(torch.randint(held_back, args.count, rows.shape)))
    module = Distillation(student, {**of_student, "steps": args.times}, args, judges[1])
    save = SaveLast if args.adversarial else SaveBest  # what imitates best is what a critic has changed least
    trainer = lightning_trainer(args, [save(out, judged_samples, judges)])
    fit(args, trainer, module, train, Batches(held_back, batch), "last.ckpt,best.pt,samples/")


if __name__ == "__main__":
    main(sys.argv[1:])
