"""Stable Diffusion's speed and memory beside diffusers: the same random weights, the same inputs, the same run.

    python3 benchmarks/p3.py                       # full size: 5 GB of disk and of memory, minutes on a CPU
    python3 benchmarks/p3.py --tiny                # the same on a small network, to see that it works

For each implementation and precision, in a process of its own: seconds to load the networks of a checkpoint (ours with
the text encoder, diffusers' without; neither makes a tokenizer) and the peak memory of that, seconds of one network
evaluation under guidance (a batch of two) and of one decoded image (medians after a warm-up), what a picture of 25
steps takes by these, peak memory of it all, and the largest difference of the predicted eps from our float32, as a part
of its standard deviation. "diffusers, cl" has its network in channels_last; of "ours, --fast" the evaluation is the
mean over a picture's steps, and eps that of the first one.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

import table  # isort: skip  (it puts ldm on the path)
import torch
from ldm.models.diffusion.sampling import LAST, guided
from ldm.util import CONFIGS, instantiate_from_config, load_model, read_config
from omegaconf import OmegaConf

from utils import Parser, UserError, cli, load_checkpoint, pick_device, reuse_freed_memory, whole

TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TINY = {
    "unet_config": {"params": {"model_channels": 32, "context_dim": 32}},
    "first_stage_config": {"params": {"ddconfig": {"ch": 32}}},
    "cond_stage_config": {"params": {"config": TEXT}},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WHO = {"ours": "ours", "ours-fast": "ours, --fast", "diffusers": "diffusers", "diffusers-cl": "diffusers, cl"}


def main_config(tiny):
    """OmegaConf of the model."""
    config = read_config(CONFIGS["v1-inference"])
    return OmegaConf.merge(config, {"model": {"params": TINY}}) if tiny else config


def write_checkpoint(path, tiny):
    """A checkpoint of random weights, named and stored as sd-v1-4.ckpt is."""
    torch.manual_seed(0)
    model = instantiate_from_config(main_config(tiny).model)
    torch.save({"state_dict": model.state_dict(), "global_step": 0}, path)
    with open(path, "rb") as f:
        os.fsync(f.fileno())  # else the first to load it shares the disk with what is still being written


def diffusers_configs(folder, tiny):
    """diffusers' configuration of the two networks, as files."""
    params = main_config(tiny).model.params
    unet, vae = params.unet_config.params, params.first_stage_config.params.ddconfig
    widths = [unet.model_channels * m for m in unet.channel_mult]
    # fmt: off
    files = {
        "unet": {"_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
                 "block_out_channels": widths, "cross_attention_dim": unet.context_dim, "attention_head_dim": 8,
                 "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
                 "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3},
        "vae": {"_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "layers_per_block": 2,
                "latent_channels": 4, "block_out_channels": [vae.ch * m for m in vae.ch_mult],
                "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4},
    }
    # fmt: on
    for name, content in files.items():
        (pathlib.Path(folder) / name).mkdir(exist_ok=True)
        (pathlib.Path(folder) / name / "config.json").write_text(json.dumps(content))


def load_ours(opt, dtype):
    """(network, decoder) of ldm, as methods of the model."""
    model = load_model(main_config(opt.tiny), opt.ckpt, opt.device, dtype)
    return model.apply_model, model.decode_first_stage


def load_diffusers(opt, dtype):
    """(network, decoder) of diffusers, as functions that take and give float32."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with tempfile.TemporaryDirectory() as folder:
        diffusers_configs(folder, opt.tiny)
        load = {"torch_dtype": dtype, "local_files_only": True}
        unet = UNet2DConditionModel.from_single_file(opt.ckpt, config=folder, subfolder="unet", **load).to(opt.device)
        vae = AutoencoderKL.from_single_file(opt.ckpt, config=folder, subfolder="vae", **load).to(opt.device)
    if opt.who == "diffusers-cl":
        unet, vae = (m.to(memory_format=torch.channels_last) for m in (unet, vae))
    return (
        lambda x, t, c: unet(x.to(dtype), t, c.to(dtype)).sample.float(),
        lambda z: vae.decode((z / 0.18215).to(dtype)).sample.float(),
    )


def seconds(function, repeats, device):
    """Median time of a call, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def fast_seconds(model, x, c, repeats, device):
    """Seconds of an evaluation in the fast mode: the mean of pairs, one whole and one that uses deep features again,
    before guidance ends and after."""
    eps = guided(model, c[1:], c[:1], 7.5, fast=True)
    early, late = (seconds(lambda t=t: [eps(x, t), eps(x, t)], repeats, device) / 2 for t in (999, 0))
    return (1 - LAST) * early + LAST * late


@torch.no_grad()
def measure(opt):
    """One implementation in one precision; prints a line of JSON, and leaves eps beside the checkpoint."""
    device = torch.device(opt.device)
    if opt.threads:
        torch.set_num_threads(opt.threads)
    ours = opt.who.startswith("ours")
    importlib.import_module("ldm.modules.encoders.modules" if ours else "diffusers.loaders.single_file")
    begin = time.perf_counter()
    network, decode = (load_ours if ours else load_diffusers)(opt, DTYPES[opt.precision])
    result = {"load_s": time.perf_counter() - begin, "load_gib": table.peak_memory(device) / 2**30}
    reuse_freed_memory()  # of both, as all scripts of this project do
    width = main_config(opt.tiny).model.params.unet_config.params.context_dim
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, opt.size // 8, opt.size // 8, generator=draw).to(device)
    c = torch.randn(2, 77, width, generator=draw).to(device)
    t = torch.full((2,), 500.0, device=device)
    if opt.who == "ours-fast":
        result["eval_s"] = fast_seconds(network.__self__, x, c, opt.repeats, device)
    else:
        result["eval_s"] = seconds(lambda: network(torch.cat([x, x]), t, c), opt.repeats, device)
    result["decode_s"] = seconds(lambda: decode(x), opt.repeats, device)
    result["peak_gib"] = table.peak_memory(device) / 2**30
    torch.save(network(torch.cat([x, x]), t, c).cpu(), f"{opt.ckpt}.{opt.who}.{opt.precision}.eps")
    print(json.dumps(result))


def rows(results, exact):
    """Lines of Markdown."""
    lines = [
        "| | precision | load, s | its peak, GiB | evaluation, s | decode, s | picture, s | peak, GiB | eps off |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (who, precision), r in results.items():
        off = f"{float((r['eps'] - exact).abs().max() / exact.std()):.1e}"
        lines.append(
            f"| {WHO[who]} | {precision} | {r['load_s']:.1f} | {r['load_gib']:.2f} | {r['eval_s']:.2f} | "
            f"{r['decode_s']:.2f} | {25 * r['eval_s'] + r['decode_s']:.1f} | {r['peak_gib']:.2f} | {off} |"
        )
    return lines


def parse_args(argv):
    parser = Parser(__doc__)
    option = parser.add_argument
    option("--tiny", action="store_true", help="a small network, and 64 pixels")
    option("--size", type=whole(64, 2048, 64), help="side of the picture (default: 512)")
    option("--precision", nargs="+", choices=list(DTYPES), help="default: fp32 bf16; on a GPU fp32 fp16")
    option("--who", nargs="+", choices=list(WHO), help="default: all that are installed")
    option("--repeats", type=whole(), default=3, help="timed calls, of which the median counts (default: 3)")
    option("--threads", type=whole(0), default=0, help="of torch on the CPU (default: torch's choice)")
    option("--device", default="auto")
    option("--work", help="folder for the checkpoint, kept and used again (default: a temporary one)")
    table.add_out_option(parser)
    option("--worker", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run_worker(opt, who, precision, ckpt):
    options = [f"--{name}={getattr(opt, name)}" for name in ("size", "device", "repeats", "threads")]
    result = table.in_own_process(__file__, "--worker", who, precision, ckpt, *options, *["--tiny"] * opt.tiny)
    return {**result, "eps": load_checkpoint(f"{ckpt}.{who}.{precision}.eps")}


@cli
def main(argv=None):
    opt = parse_args(argv)
    opt.size = opt.size or (64 if opt.tiny else 512)
    opt.device = str(pick_device(opt.device))
    if opt.worker:
        opt.who, opt.precision, opt.ckpt = opt.worker
        return measure(opt)
    precisions = opt.precision or (["fp32", "fp16"] if opt.device.startswith("cuda") else ["fp32", "bf16"])
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(opt.work or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        ckpt = folder / ("tiny.ckpt" if opt.tiny else "random.ckpt")
        if not ckpt.exists():
            print(f"writing {ckpt}", file=sys.stderr)
            write_checkpoint(ckpt, opt.tiny)
        peer = importlib.util.find_spec("diffusers")
        pairs = [(who, p) for p in precisions for who in opt.who or WHO if who.startswith("ours") or opt.who or peer]
        if ("ours", "fp32") not in pairs:
            raise UserError("--who and --precision: ours in fp32 must be among them, to compare with")
        results = {}
        for who, precision in pairs:
            print(f"{who}, {precision}", file=sys.stderr)
            results[who, precision] = run_worker(opt, who, precision, ckpt)
        size = ckpt.stat().st_size / 2**30
    machine = table.describe_machine(pick_device(opt.device), opt.threads)
    lines = [
        f"{machine}; checkpoint {size:.2f} GiB, {opt.size}x{opt.size}",
        "",
        *rows(results, results["ours", "fp32"]["eps"]),
    ]
    print("\n".join(lines))
    table.save_table(lines, opt.out)


if __name__ == "__main__":
    main()
