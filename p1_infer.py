"""Generates the digits of Problem 1.

python3 p1_infer.py output                      # output/{mnistm,svhn}/{digit}_{001..050}.png, 1,000 pictures
python3 p1_infer.py --grid grid.png             # grid_mnistm.png, grid_svhn.png: rows digits, columns noises
python3 p1_infer.py output --fast               # by the network of four steps, without guidance
python3 p1_infer.py OUT --checkpoint FILE       # by another network: of p1_train.py, or few steps by p1_distill.py
python3 p1_infer.py --trajectory reverse.png    # six stages of the reverse process, first 0 of each domain
"""

from __future__ import annotations

import functools
import os
import pathlib
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from tqdm import tqdm

import utils
from digits import DOMAINS
from p1_model import GUIDANCE, guidance_scale, load_digit_unet, stages
from utils import CHECKPOINTS, Parser, cli, whole

CHECKPOINT, STUDENT = str(CHECKPOINTS / "p1_unet.pt"), str(CHECKPOINTS / "p1_student.pt")
PER_PAIR = 10_000  # seeds set aside for a (domain, digit) pair


def sampler_of(args):
    """stages(digit, domain, index) of p1_model with the network and the options."""
    model, config = load_digit_unet(args.checkpoint)
    options = {"sampler": args.sampler, "steps": args.steps, "guidance": args.guidance, "interval": args.interval}
    options.update(seed=args.seed, dtype=utils.pick_precision(args.precision, args.device))
    return functools.partial(stages, model.to(args.device), config, **options)


def write_images(args, draw):
    """The graders' layout: OUT/{domain}/{digit}_{number}.png. A picture depends on its domain, digit and number
    alone."""
    out = utils.output_folder(args.out)
    for name in DOMAINS:
        utils.output_folder(out / name)
    n = args.num_per_digit
    domain, digit, number = torch.cartesian_prod(torch.arange(2), torch.arange(10), torch.arange(n)).unbind(1)
    seed = (10 * domain + digit) * PER_PAIR + number
    with tqdm(total=len(seed), desc="images", unit="image") as bar:
        for part in torch.arange(len(seed)).split(args.batch_size):
            *_, final = draw(digit[part], domain[part], seed[part])
            bar.update(len(part))
            for i, picture in zip(part, utils.to_uint8(final).cpu()):
                name = f"{DOMAINS[domain[i]]}/{digit[i]}_{number[i] + 1:03d}.png"
                utils.save_png(picture, out / name)
    return f"{len(seed)} images in {out}/{{{','.join(DOMAINS)}}}"


def write_grids(args, draw):
    """One picture a domain, 10 rows of digits by 10 columns of noises; a column starts from one and the same noise."""
    path = pathlib.Path(args.grid)
    files = []
    for d, name in enumerate(DOMAINS):
        digit, seed = torch.cartesian_prod(torch.arange(10), torch.arange(10)).unbind(1)
        *_, final = draw(digit, torch.full_like(digit, d), seed)
        files.append(path.with_name(f"{path.stem}_{name}.png"))
        utils.save_png(utils.image_grid(enlarge(utils.to_uint8(final).cpu()), 10), files[-1])
    return " and ".join(map(str, files))


def write_trajectory(args, draw):
    """A row a domain: six evenly spaced stages from pure noise to the first 0 of hw2_1.sh's output."""
    rows = []
    for d in range(2):
        index = torch.tensor([d * 10 * PER_PAIR])
        path = [x.float().cpu() for x in draw(torch.tensor([0]), torch.tensor([d]), index)]
        rows += [path[round(i * (len(path) - 1) / 5)] for i in range(6)]
    utils.save_png(utils.image_grid(enlarge(utils.to_uint8(torch.cat(rows))), 6), args.trajectory)
    return args.trajectory


def enlarge(images):
    """uint8 [N, 3, H, W], twice as large in both directions."""
    return F.interpolate(images, scale_factor=2, mode="nearest")


def parse(argv):
    parser = Parser(__doc__)
    option = parser.add_argument
    option("out", nargs="?", help="output folder of the 1,000 images")
    option("--checkpoint", default=CHECKPOINT)
    few = "checkpoints/p1_student.pt: 4 network evaluations a picture, not 25"
    option("--fast", dest="checkpoint", action="store_const", const=STUDENT, help=few)
    option("--sampler", choices=["dpm++", "ddim", "ddpm"], default="dpm++")
    own = "of the sampler; a few-step network has its own (default: 16)"
    option("--steps", type=whole(1, 1000), default=16, help=own)
    scales = "eps_u + guidance (eps_c - eps_u), 1 = none; of both domains, or MNIST-M/SVHN (default: 7/4)"
    option("--guidance", type=guidance_scale, default=GUIDANCE, metavar="SCALE", help=scales)
    within = "guide at times FROM <= t < TO only (default: 200 750)"
    option("--interval", type=whole(0), nargs=2, default=[200, 750], metavar=("FROM", "TO"), help=within)
    option("--num-per-digit", type=whole(1, PER_PAIR), default=50)
    option("--batch-size", type=whole(), default=100, help="pictures are the same but for rounding (default: 100)")
    option("--grid", metavar="FILE")
    option("--trajectory", metavar="FILE")
    utils.add_device_options(parser)
    args = parser.parse_args(argv)
    if not (args.out or args.grid or args.trajectory):
        parser.error("give an output folder, --grid or --trajectory")
    return args


@cli
def main(argv=None):
    args = parse(argv)
    started = time.time()
    draw = sampler_of(args)
    for sheet in filter(None, (args.grid, args.trajectory)):
        utils.output_file(sheet)
    written = [
        write(args, draw)
        for wanted, write in ((args.out, write_images), (args.grid, write_grids), (args.trajectory, write_trajectory))
        if wanted
    ]
    print(f"wrote {', '.join(written)} in {time.time() - started:.1f} s, imports not counted")


if __name__ == "__main__":
    main(sys.argv[1:])
