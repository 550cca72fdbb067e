"""Proves and measures the project on this machine's GPU, or CPU: every problem's graders' command, as shipped.

    python3 benchmarks/device.py --out device.md            # --sd-ckpt sd-v1-4.ckpt, else random weights of its size
    python3 benchmarks/device.py --quick --device cpu       # a few pictures by the small networks, minutes

Each command runs in a process of its own, three times: as shipped, in float32, and in float32 on the CPU with fewer
pictures. In float32 no picture may be further than one grey level from the CPU's, and no digit another one. Then Stable
Diffusion at full size (with --quick the small model that ships, in 2 steps): 25 steps of 1 and of 5 guided pictures,
without and, on a GPU, with torch.compile, and steps of Textual Inversion at batch 1 and 4. Exit code 0 where every
check holds and no command passes the course's limit.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import runpy
import shutil
import sys
import tempfile
import time

import numpy as np
import table
import torch
from p2 import random_weights
from p3 import write_checkpoint
from PIL import Image

import p3_invert
import p3_model
from p3_concepts import read_concepts
from utils import Parser, cli, noise_stream, pick_device, pick_precision

CHECKPOINTS, TASK = table.ROOT / "checkpoints", table.ROOT / "tiny/textual_inversion"
COLUMNS = "| what | pictures | seconds | of the limit | pictures a second | peak GB | furthest from the CPU, float32 |"


def commands(args, folder):
    """{problem: (script, the course's limit in minutes, arguments(output folder, whether for fewer pictures))}."""
    count, size = (2, 64) if args.quick else (10, 256)
    (folder / "noise").mkdir()
    for i in range(count):
        torch.save(noise_stream(0, [i], (3, size, size))(), folder / f"noise/{i:02}.pt")
    unet = CHECKPOINTS / "p2_faces.pt"
    if not args.quick:
        unet = folder / "UNet.pt"
        random_weights(128, unet)
    (folder / "one").mkdir()
    shutil.copy(folder / "noise/00.pt", folder / "one")
    small, steps = (["--num-per-digit", 2], ["--images", 1, "--steps", 8]) if args.quick else ([], [])
    sd = [CHECKPOINTS / "tiny.ckpt", "--embeddings", TASK / "embeddings", *steps]
    svhn = folder / "hw2_1/shipped/svhn"
    return {
        "hw2_1": ("p1_infer.py", 15, lambda out, few: [out, *small, *["--num-per-digit", 1] * few]),
        "hw2_2": ("p2_ddim.py", 5, lambda out, few: [folder / ("one" if few else "noise"), out, unet]),
        "hw2_3, small": ("p3_infer.py", 15, lambda out, few: [TASK / "input.json", out, *sd, *["--images", 1] * few]),
        "hw2_4": ("p4_infer.py", None, lambda out, few: [svhn, out / "digits.csv", "--target", "svhn"]),
    }


# ------------------------------------------------------------------------ in a process of its own


def run_command(device, script, *arguments):
    """Runs a script as its shell command does, and prints its peak memory."""
    sys.argv = [script, *arguments, "--device", str(device)]
    try:
        runpy.run_path(str(table.ROOT / script), run_name="__main__")
    except SystemExit as e:
        if e.code:
            raise
    print(json.dumps({"peak": table.peak_memory(device)}))


def run_stable_diffusion(device, ckpt, quick):
    """Prints seconds and peak memory of pictures and of steps of Textual Inversion, in the precision of hw2_3.sh."""
    model = p3_model.load_stable_diffusion(ckpt, device, pick_precision("auto", device))
    steps, size, results = 2 if quick else 25, p3_model.own_size(model), {}
    on_gpu = device.type == "cuda"

    def timed(name, count, function, *arguments):
        """function(*arguments) gives a number that is positive where all is well."""
        function(*arguments)  # compiles, and lets the libraries choose
        if on_gpu:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        begin = time.perf_counter()
        value = function(*arguments)
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begin
        good = bool(np.isfinite(value) and value > 0)
        results[name] = {"count": count, "seconds": seconds, "peak": table.peak_memory(device), "good": good}

    def draw(count):
        return float(p3_model.generate(model, "a rocket", range(count), steps).float().std())

    for count in (1, 5):
        timed(f"Stable Diffusion, {steps} steps, batch {count}", count, draw, count)
    tokens, concept = p3_model.learned_tokens(model), read_concepts(TASK / "input.json")[0]
    side = size // model.first_stage_model.factor
    for batch in (1, 4):
        moments = torch.ones(batch, 2, model.channels, side, side, device=device)
        examples = p3_invert.Examples(moments, moments[:1], [["a photo of {}"]] * batch)
        with tempfile.TemporaryDirectory() as work:
            inversion = p3_invert.Inversion(model, tokens, concept, p3_invert.Recipe(batch=batch, size=size), work)
            timed(f"a step of Textual Inversion, batch {batch}", batch, inversion.optimize, examples, 0)
    if on_gpu:
        model.model.diffusion_model.compile()
        timed(f"Stable Diffusion, {steps} steps, batch 5, compiled", 5, draw, 5)
    print(json.dumps(results))


# ------------------------------------------------------------------------ checks and table


def contents(folder):
    """{name: pixels, or lines of a csv} of what a command wrote."""
    files = [p for p in sorted(folder.rglob("*")) if p.suffix in (".png", ".csv") and not p.name.startswith(".")]
    return {
        str(p.relative_to(folder)): np.asarray(Image.open(p)).astype(int) if p.suffix == ".png" else p.read_text()
        for p in files
    }


def furthest(ours, cpus):
    """Grey levels between the same pictures of both; 255 where one is missing, or an answer is another."""
    distances = []
    for name, theirs in cpus.items():
        own = ours.get(name)
        if isinstance(theirs, str) or own is None:
            distances.append(0 if own == theirs else 255)
        else:
            distances.append(int(abs(own - theirs).max()))
    return max(distances, default=255)


def measure(args, folder, name, script, limit, arguments):
    """(row of the table, whether all is well) of a problem."""
    outs = {}
    fp32 = ["--precision", "fp32"]
    for run, device, precision in (("shipped", args.device, []), ("float32", args.device, fp32), ("cpu", "cpu", fp32)):
        outs[run] = folder / name.split(",")[0] / run
        outs[run].mkdir(parents=True)
        begin = time.time()
        command = [script, *arguments(outs[run], run != "shipped"), *precision]
        result = table.in_own_process(__file__, "--device", device, "--worker", *command)
        if run == "shipped":
            seconds, peak = time.time() - begin, result["peak"]
    made = contents(outs["shipped"])
    count = sum(len(v.splitlines()) - 1 if isinstance(v, str) else 1 for v in made.values())
    off = furthest(contents(outs["float32"]), contents(outs["cpu"]))
    share = f"{seconds / 60 / limit:.1%}" if limit else "-"
    row = f"| {name} | {count} | {seconds:.1f} | {share} | {count / seconds:.2f} | {peak / 1e9:.2f} | {off} |"
    return row, off <= 1 and count > 0 and (limit is None or seconds < 60 * limit)


def stable_diffusion_rows(args, folder):
    ckpt = args.sd_ckpt or CHECKPOINTS / "tiny.ckpt"
    if not args.sd_ckpt and not args.quick:
        ckpt = folder / "random.ckpt"
        write_checkpoint(ckpt, tiny=False)
    results = table.in_own_process(__file__, "--device", args.device, "--worker", "sd", ckpt, *["--quick"] * args.quick)
    for name, r in results.items():
        name = f"{name}{', small model' * (args.quick and not args.sd_ckpt)}"
        rate, peak = r["count"] / r["seconds"], r["peak"] / 1e9
        yield f"| {name} | {r['count']} | {r['seconds']:.2f} | - | {rate:.2f} | {peak:.2f} | - |", r["good"]


@cli
def main(argv=None):
    parser = Parser(__doc__)
    option = parser.add_argument
    option("--quick", action="store_true", help="a few pictures by the small networks")
    option("--sd-ckpt", metavar="FILE", help="sd-v1-4.ckpt (default: random weights of its size)")
    option("--device", type=pick_device, default="auto")
    table.add_out_option(parser)
    option("--worker", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        script, *arguments = args.worker
        if script == "sd":
            return run_stable_diffusion(args.device, arguments[0], "--quick" in arguments)
        return run_command(args.device, script, *arguments)
    lines, checks = [table.describe_machine(args.device), "", COLUMNS, "|---" * COLUMNS[1:].count("|") + "|"], []
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        rows = (measure(args, folder, name, *command) for name, command in commands(args, folder).items())
        for many in (rows, stable_diffusion_rows(args, folder)):
            for row, good in many:
                print(row, flush=True)
                lines.append(row)
                checks.append(good)
    table.save_table(lines, args.out)
    print(f"{sum(checks)} of {len(checks)} checks hold")
    return 0 if all(checks) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
