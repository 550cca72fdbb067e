"""Problem 2 in one table: time, memory and difference of our DDIM in fp32 and bf16, a plain loop, and diffusers.

    python3 benchmarks/p2.py --out table.md                             # full size, random weights, one 256x256 picture
    python3 benchmarks/p2.py --count 10 --steps 2 --only "ours fp32"    # the memory that ten pictures take

All variants run the same weights on the same noises, each in a process of its own, so that its peak memory is its own:
- "ours ...": p2_ddim.py's sampler as it is;
- "plain fp32": the same network one picture at a time, in the default layout, with attention written out and nothing
  in place, and DDIM from diffusion.py;
- "diffusers fp32": its UNet2DModel, configured as google/ddpm-celebahq-256 with the paddings and epsilons of the
  course's network, with our weights renamed, and its DDIMScheduler.
Differences are of the final pictures to those of "ours fp32": the greatest of x_0, in [-1, 1], and the mean squared
error of the written pixels, 0..255, which the course bounds by 20.
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
from p2_ddim import Sampler
from utils import cli, noise_stream, pick_device, plain_attention

VARIANTS = ["plain fp32", "diffusers fp32", "ours fp32", "ours bf16"]


# ------------------------------------------------------------------------ the variants: noises -> pictures, both lists


def ours(args, precision):
    options = {"seed": 0, "batch_size": None, "precision": precision, "eta": 0.0}
    sampler = Sampler(argparse.Namespace(**{**vars(args), **options}))
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

    channel = unet.time[1].in_features
    # fmt: off
    model = UNet2DModel(
        block_out_channels=[channel * n for n in (1, 1, 2, 2, 4, 4)], layers_per_block=2, attention_head_dim=None,
        down_block_types=["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"], downsample_padding=1,
        up_block_types=["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4, norm_num_groups=room.norm_groups(channel),
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
    args.device = pick_device(args.device)
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


def measure(args, variant, unet, pictures):
    options = [f"--{option}={getattr(args, option)}" for option in ("count", "size", "steps", "device")]
    return in_own_process(__file__, "--worker", variant, "--unet", unet, "--pictures", pictures, *options)


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
    pictures = f"{args.count} of {args.size}x{args.size}, {args.steps} steps, channel {args.channel}"
    return f"{describe_machine(pick_device(args.device))}; {pictures}"


@cli
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--unet", help="a network's weights (default: random ones of width --channel)")
    option("--channel", type=int, default=128, help="the course's: 128")
    option("--size", type=int, default=256)
    option("--count", type=int, default=1, help="how many pictures")
    option("--steps", type=int, default=50)
    option("--only", action="append", choices=[*VARIANTS, "ours fp16"], help="these variants (fp16 needs a GPU)")
    option("--device", default="auto")
    add_out_option(parser)
    option("--worker", help=argparse.SUPPRESS)
    option("--pictures", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return work(args)
    lines = [
        describe(args),
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
        results = {v: measure(args, v, unet, folder / f"{v}.pt") for v in variants}
        pictures = {v: torch.load(folder / f"{v}.pt") for v in variants}
    plain_step = results["plain fp32"]["seconds"] / args.count / args.steps if "plain fp32" in results else None
    lines += [row(args, v, results[v], pictures[v], pictures.get("ours fp32"), plain_step) for v in variants]
    print("\n".join(lines))
    save_table(lines, args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
