"""Problem 2 in two tables: speed, memory and difference of our DDIM, a plain loop and diffusers; quality of networks.

    python3 benchmarks/p2.py --out table.md                             # full size, random weights, one 256x256 picture
    python3 benchmarks/p2.py --count 10 --steps 2 --only "ours fp32"    # the memory that ten pictures take
    python3 benchmarks/p2.py --quality checkpoints/p2_faces.pt runs/p2/best.pt --size 64 --count 1000

All variants run the same weights on the same noises, each in a process of its own, so that its peak memory is its own:
- "ours ...": p2_ddim.py's sampler as it is;
- "plain fp32": the same network one picture at a time, in the default layout, attention and activations written
  out, and DDIM from diffusion.py;
- "diffusers fp32": its UNet2DModel, configured as google/ddpm-celebahq-256 with the paddings and epsilons of the
  course's network, with our weights renamed, and its DDIMScheduler.
Differences are of the final pictures to those of "ours fp32": the greatest of x_0, in [-1, 1], and the mean squared
error of the written pixels, 0..255, which the course bounds by 20.

--quality has a row for each network's --count pictures (of the seeds 0, 1, ...; eta 0), and one for as many real ones:
- FID to as many other real pictures (it falls with the count, so only differences mean something); precision, the
  share of pictures that lie among those, and recall, the share of those that lie among the pictures: how many kinds;
- casts: the deviation over pictures of r - g and g - b, differences of a picture's channel means, pixels in [-1, 1];
- the means of the three channels;
- noise: the mean of |x - mean of its 3x3 neighbourhood| on 0..255, at each eta of the sheet (above 0: of 64 pictures).
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
import tempfile
import time

import torch
from table import add_out_option, describe_machine, in_own_process, peak_memory, save_table
from torch.nn import functional as F

import UNet as room
from diffusion import ddim, run, schedule, time_batch, timesteps
from p2_ddim import ETAS, Sampler
from utils import Parser, UserError, cli, load_checkpoint, noise_stream, pick_device, plain_attention, to_uint8, whole

VARIANTS = ["plain fp32", "diffusers fp32", "ours fp32", "ours bf16"]


# ------------------------------------------------------------------------ the variants: noises -> pictures, both lists


def our_sampler(args, unet, precision):
    options = {"unet": unet, "seed": 0, "batch_size": None, "precision": precision}
    return Sampler(argparse.Namespace(**{**vars(args), **options}))


def ours(args, precision):
    sampler = our_sampler(args, args.unet, precision)
    return lambda noises: list(sampler(noises, 0.0, args.worker)), sampler.eps_model


def plain(args):
    room.silu, room.attention = F.silu, plain_attention
    unet = room.load_unet(args.unet).to(args.device)
    alpha_bar, times = schedule(), timesteps(1000, args.steps, "course")

    def eps_model(x, t):
        return unet(x, time_batch(x, t))

    def sample(noises):
        return [run(ddim(eps_model, x[None].to(args.device), alpha_bar, times))[0].cpu() for x in noises]

    return sample, eps_model


def diffusers(args):
    from diffusers import DDIMScheduler

    unet = diffusers_unet(room.load_unet(args.unet)).to(args.device)
    scheduler = DDIMScheduler(
        beta_schedule="linear", beta_start=1e-4, beta_end=2e-2, clip_sample=True, set_alpha_to_one=False, steps_offset=1
    )
    scheduler.set_timesteps(args.steps)

    @torch.no_grad()
    def sample(noises):
        pictures = []
        for x in noises:
            x = x[None].to(args.device)
            for t in scheduler.timesteps:
                x = scheduler.step(unet(x, t).sample, t, x).prev_sample
            pictures.append(x[0].cpu())
        return pictures

    return sample, lambda x, t: unet(x, t).sample


def diffusers_unet(unet):
    """diffusers' UNet2DModel with the weights of our UNet."""
    from diffusers import UNet2DModel

    # fmt: off
    model = UNet2DModel(
        block_out_channels=[unet.channel * n for n in unet.channel_multiplier], layers_per_block=2,
        attention_head_dim=None, norm_num_groups=room.norm_groups(unet.channel),
        down_block_types=["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"], downsample_padding=1,
        up_block_types=["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
        norm_eps=1e-5, flip_sin_to_cos=False, freq_shift=0,
    )
    # fmt: on
    model.load_state_dict(diffusers_keys(unet.state_dict()))
    return model.eval().requires_grad_(False)


def diffusers_keys(state_dict):
    """Our state dict under diffusers' names: three layers a size on the way down (two blocks, half the size), four on
    the way up (three blocks, twice the size), q, k and v apart and as linear layers."""
    named = {}
    for key, value in state_dict.items():
        if key == "time.0.inv_freq":
            continue
        key = re.sub(r"^time\.([13])", lambda m: f"time_embedding.linear_{(int(m[1]) + 1) // 2}", key)
        key = re.sub(r"^down1\.", "conv_in.", key)
        key = re.sub(r"^out\.0", "conv_norm_out", re.sub(r"^out\.2", "conv_out", key))
        key = re.sub(r"^down(\d+)\.0", lambda m: f"down_blocks.{(int(m[1]) - 2) // 3}.downsamplers.0.conv", key)
        key = re.sub(r"^down(\d+)", lambda m: "down_blocks.{}.#.{}".format(*divmod(int(m[1]) - 2, 3)), key)
        key = re.sub(r"^mid(\d)", lambda m: f"mid_block.#.{int(m[1]) - 1}", key)
        key = re.sub(r"^up(\d+)\.1", lambda m: f"up_blocks.{(int(m[1]) - 1) // 4}.upsamplers.0.conv", key)
        key = re.sub(r"^up(\d+)", lambda m: "up_blocks.{}.#.{}".format(*divmod(int(m[1]) - 1, 4)), key)
        key = re.sub(r"#\.(\d)\.resblocks", r"resnets.\1", key)
        key = re.sub(r"#\.(\d)\.attention", r"attentions.\1", key)
        key = key.replace(".time.1.", ".time_emb_proj.").replace(".skip.", ".conv_shortcut.")
        if ".attentions." in key:
            key = key.replace(".norm.", ".group_norm.").replace(".out.", ".to_out.0.")
            value = value.flatten(1) if value.dim() == 4 else value
        parts = zip(("to_q", "to_k", "to_v"), value.chunk(3)) if ".qkv." in key else [("qkv", value)]
        named.update({key.replace("qkv", name): part for name, part in parts})
    return named


# ------------------------------------------------------------------------ one variant, in its own process


def work(args):
    """Samples with one variant; leaves its pictures in args.pictures and prints its times and peak memory as JSON."""
    name, precision = args.worker.split()
    sample, network = {"plain": plain, "diffusers": diffusers}[name](args) if name != "ours" else ours(args, precision)
    noises = list(noise_stream(0, range(args.count), (3, args.size, args.size))())
    with torch.no_grad():
        network(noises[0][None].to(args.device), 500)  # warm up
    started = time.time()
    pictures = sample(noises)
    seconds = time.time() - started
    torch.save(torch.stack(pictures), args.pictures)
    print(json.dumps({"seconds": seconds, "peak": peak_memory(args.device)}))


# ------------------------------------------------------------------------ the table


def random_weights(channel, path):
    """A network whose layers all do something: variance 1 / fan in, and an eps so small that 50 steps stay stable."""
    torch.manual_seed(0)
    unet = room.UNet(channel=channel)
    for parameter in unet.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    unet.out[2].weight.data *= 0.02
    torch.save(unet.state_dict(), path)


def pixels(x):
    """What p2_ddim.py writes: each picture stretched from its own range to 0..255."""
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    return ((x - low) / (high - low) * 255 + 0.5).floor()


def row(args, variant, result, x, reference, slowest):
    per_image = result["seconds"] / args.count
    per_step = per_image / args.steps
    difference = "- | -"
    if reference is not None:
        mse = (pixels(x) - pixels(reference)).square().mean()
        difference = f"{(x - reference).abs().max():.1e} | {mse:.4f}"
    share = f"{per_step / slowest:.2f}" if slowest else "-"
    return f"| {variant} | {per_step:.3f} | {share} | {per_image:.1f} | {result['peak'] / 1e9:.2f} | {difference} |"


def describe(args):
    return f"{describe_machine(args.device)}; {args.count} of {args.size}x{args.size}, {args.steps} steps"


# ------------------------------------------------------------------------ the quality of networks


def quality_table(args):
    from fid import frechet_distance, precision_recall

    from classifiers import Inception
    from p2_train import read_faces

    real = torch.cat(read_faces(args.data, args.size))
    real = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(0))]
    if len(real) < 2 * args.count:
        raise UserError(f"--count {args.count}: {args.data} has {len(real)} pictures; take at most {len(real) // 2}")
    inception = Inception(args.device)
    reference = inception(real[: args.count])
    lines = [
        describe(args),
        "",
        "| pictures | FID | precision | recall | cast r-g | cast g-b | mean r | mean g | mean b | "
        + " | ".join(f"noise, eta {eta:g}" for eta in ETAS)
        + " |",
        "|---|" + "---|" * (8 + len(ETAS)),
    ]
    print("\n".join(lines))
    for name in ["real", *args.quality]:
        images = {0.0: real[args.count : 2 * args.count]} if name == "real" else faces(args, name)
        r_g, g_b, *means = colours(images[0.0])
        noises = " | ".join(f"{remaining_noise(images[eta]):.1f}" if eta in images else "" for eta in ETAS)
        features = inception(images[0.0])
        cells = [f"{frechet_distance(features, reference):.1f}"]
        cells += [f"{v:.2f}" for v in precision_recall(features, reference)]
        cells += [f"{v:.3f}" for v in (r_g, g_b)] + [f"{v:.2f}" for v in means]
        lines.append(f"| {name} | {' | '.join(cells)} | {noises} |")
        print(lines[-1], flush=True)
    return lines


def faces(args, unet):
    """{eta: uint8 [N, 3, S, S]} by the network of a file: --count at eta 0, at most 64 at the others."""
    sampler = our_sampler(args, unet, "auto")
    noises = [noise_stream(0, [i], (3, args.size, args.size))()[0] for i in range(args.count)]
    counts = {eta: args.count if eta == 0 else min(64, args.count) for eta in ETAS}
    return {eta: to_uint8(torch.stack(list(sampler(noises[:n], eta, f"eta {eta}")))) for eta, n in counts.items()}


def colours(images):
    """Deviations over uint8 pictures [N, 3, S, S] of r - g and g - b, and the means of r, g and b; all of [-1, 1]."""
    r, g, b = (images.float() / 127.5 - 1).mean((2, 3)).unbind(1)
    return [float(v) for v in ((r - g).std(), (g - b).std(), r.mean(), g.mean(), b.mean())]


def remaining_noise(images):
    """The mean of |x - the mean of its 3x3 neighbourhood|, of the pixels 0..255 that have all of it."""
    x = images.float()
    return float((x[..., 1:-1, 1:-1] - F.avg_pool2d(x, 3, stride=1)).abs().mean())


@cli
def main(argv=None):
    parser = Parser(__doc__)
    option = parser.add_argument
    option("--unet", help="a network's weights (default: random ones of width --channel)")
    option("--channel", type=whole(1, 512), default=128, help="the course's: 128")
    option("--size", type=whole(32, 2048, 32), default=256)
    option("--count", type=whole(), default=1, help="how many pictures")
    option("--steps", type=whole(1, 500), default=50)
    option("--only", action="append", choices=[*VARIANTS, "ours fp16"], help="these variants (fp16 needs a GPU)")
    option("--quality", nargs="+", metavar="UNET", help="the table of quality instead, of these networks")
    option("--data", default="hw2_data/face/photos", help="folder of real pictures for --quality")
    option("--device", type=pick_device, default="auto")
    add_out_option(parser)
    option("--worker", help=argparse.SUPPRESS)
    option("--pictures", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return work(args)
    if args.quality:
        return save_table(quality_table(args), args.out)
    lines = [
        f"{describe(args)}, channel {args.channel}",
        "",
        "| variant | s an evaluation | of plain | s a picture | peak GB | greatest difference of x_0 | MSE of pixels |",
        "|---|---|---|---|---|---|---|",
    ]
    variants = args.only or VARIANTS
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        unet = args.unet or folder / "unet.pt"
        if not args.unet:
            random_weights(args.channel, unet)
        common = ["--unet", unet, *(f"--{name}={getattr(args, name)}" for name in ("count", "size", "steps", "device"))]
        files = {v: folder / f"{v}.pt" for v in variants}
        results = {v: in_own_process(__file__, "--worker", v, *common, "--pictures", file) for v, file in files.items()}
        pictures = {v: load_checkpoint(file) for v, file in files.items()}
    plain_step = results["plain fp32"]["seconds"] / args.count / args.steps if "plain fp32" in results else None
    lines += [row(args, v, results[v], pictures[v], pictures.get("ours fp32"), plain_step) for v in variants]
    print("\n".join(lines))
    save_table(lines, args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
