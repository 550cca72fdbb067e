"""Makes pictures from prompts with Stable Diffusion v1.

    python3 scripts/txt2img.py --prompt "an astronaut riding a horse" --ckpt sd-v1-4.ckpt --outdir outputs

Writes OUTDIR/samples/00000.png ... and OUTDIR/grid-0000.png. Picture i has the seed SEED + i, whatever the batch.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import numpy as np
import torch
from PIL import Image
from tqdm import trange

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ldm.checkpoint import atomic  # noqa: E402
from ldm.models.diffusion.ddim import DDIMSampler  # noqa: E402
from ldm.models.diffusion.dpm_solver import DPMSolverSampler  # noqa: E402
from ldm.modules.textual_inversion import LearnedTokens  # noqa: E402
from ldm.util import ModelError, cpu_has_fast_bf16, load_model, noise_stream, reuse_freed_memory  # noqa: E402

CKPT = "models/ldm/stable-diffusion-v1/model.ckpt", "ldm/models/stable-diffusion-v1/model.ckpt"  # places under ROOT


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompt", default="a painting of a virus monster playing guitar")
    add("--from-file", help="a text file of prompts, one a line, each used once an iteration")
    add("--outdir", default="outputs/txt2img-samples")
    add("--skip_grid", action="store_true", help="no picture of all pictures")
    add("--skip_save", action="store_true", help="no single pictures")
    add("--ddim_steps", type=int, default=50, help="sampling steps, of either sampler (default: 50)")
    add("--ddim_eta", type=float, default=0.0, help="0 is deterministic; more makes DDIM the sampler (default: 0)")
    add("--sampler", choices=["dpm", "ddim"], default="dpm", help="DPM-Solver++(2M) or DDIM (default: dpm)")
    add("--fixed_code", action="store_true", help="the same starting noises in every iteration")
    add("--n_iter", type=int, default=2, help="iterations (default: 2)")
    add("--H", type=int, default=512, help="height in pixels, a multiple of 64 (default: 512)")
    add("--W", type=int, default=512, help="width in pixels, a multiple of 64 (default: 512)")
    add("--C", type=int, default=4, help="latent channels (default: 4)")
    add("--f", type=int, default=8, help="pixels a latent pixel (default: 8)")
    add("--n_samples", type=int, default=3, help="batch size: pictures of a prompt an iteration (default: 3)")
    add("--n_rows", type=int, default=0, help="columns of the grid (default: n_samples)")
    add("--scale", type=float, default=7.5, help="guidance scale (default: 7.5)")
    add("--config", help="the model's YAML (default: the one that the checkpoint names, else v1-inference.yaml)")
    add("--ckpt", help=f"checkpoint, .ckpt or .safetensors (default: {' or '.join(CKPT)})")
    add("--embedding_path", nargs="*", default=[], help="files of learned embeddings for placeholders in prompts")
    add("--seed", type=int, default=42)
    add(
        "--precision",
        choices=["full", "autocast"],
        default="autocast",
        help="autocast: half precision on a GPU, bfloat16 on a CPU that multiplies it fast; full: float32",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def pick_dtype(precision, device):
    if precision == "autocast" and device.startswith("cuda"):
        return torch.float16
    return torch.bfloat16 if precision == "autocast" and device == "cpu" and cpu_has_fast_bf16() else torch.float32


def batches(opt):
    """Prompts of each batch of one iteration."""
    if opt.from_file is None:
        return [[opt.prompt] * opt.n_samples]
    prompts = [p for p in pathlib.Path(opt.from_file).read_text(encoding="utf-8").splitlines() if p.strip()]
    if not prompts:
        raise ModelError(f"{opt.from_file}: holds no prompt")
    return [prompts[i : i + opt.n_samples] for i in range(0, len(prompts), opt.n_samples)]


def check(opt):
    """Bad options end here, before anything is loaded or written."""
    step = 8 * opt.f
    if opt.H < step or opt.W < step or opt.H % step or opt.W % step:
        raise ModelError(f"--H {opt.H} --W {opt.W}: take multiples of {step}")
    for name in ("ddim_steps", "n_iter", "n_samples"):
        if getattr(opt, name) < 1:
            raise ModelError(f"--{name} {getattr(opt, name)}: take 1 or more")
    if opt.device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"--device {opt.device}: this machine has no CUDA device; take --device cpu")
    if opt.ckpt is None:
        opt.ckpt = next((ROOT / p for p in CKPT if (ROOT / p).is_file()), None)
    if opt.ckpt is None or not pathlib.Path(opt.ckpt).is_file():
        raise ModelError(f"{opt.ckpt or ROOT / CKPT[0]}: no such checkpoint; fetch sd-v1-4.ckpt, or give --ckpt FILE")


def watermarker():
    """Marks a uint8 picture [H, W, 3] as machine-made, where the package invisible-watermark is installed."""
    try:
        from imwatermark import WatermarkEncoder
    except ImportError:
        return lambda image: image
    encoder = WatermarkEncoder()
    encoder.set_watermark("bytes", b"StableDiffusionV1")
    return lambda image: encoder.encode(np.ascontiguousarray(image[:, :, ::-1]), "dwtDct")[:, :, ::-1]


def save(image, path):
    with atomic(path) as temporary:
        Image.fromarray(np.ascontiguousarray(image)).save(temporary, format="PNG")


def next_number(folder, prefix=""):
    """One more than the largest number among prefix00000.png ... in the folder: nothing is written over."""
    numbers = [p.stem[len(prefix) :] for p in folder.glob(f"{prefix}*.png")]
    return max((int(n) + 1 for n in numbers if n.isdigit()), default=0)


def grid(images, columns):
    """Pictures [H, W, 3], row by row, two black pixels apart."""
    from torchvision.utils import make_grid  # only now: it takes a second to import

    return make_grid(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), columns).permute(1, 2, 0).numpy()


@torch.no_grad()
def generate(model, opt):
    """Yields uint8 pictures [H, W, 3], one at a time."""
    sampler = (DDIMSampler if opt.sampler == "ddim" or opt.ddim_eta > 0 else DPMSolverSampler)(model)
    shape = [opt.C, opt.H // opt.f, opt.W // opt.f]
    done = 0
    for _ in trange(opt.n_iter, desc="iterations"):
        if opt.fixed_code:
            done = 0
        for prompts in batches(opt):
            noise = noise_stream(opt.seed, range(done, done + len(prompts)), shape)
            uc = model.get_learned_conditioning([""] * len(prompts)) if opt.scale != 1.0 else None
            latents, _ = sampler.sample(
                opt.ddim_steps,
                len(prompts),
                shape,
                model.get_learned_conditioning(prompts),
                unconditional_guidance_scale=opt.scale,
                unconditional_conditioning=uc,
                eta=opt.ddim_eta,
                noise=noise,
            )
            for latent in latents.split(1):
                image = ((model.decode_first_stage(latent) + 1) / 2).clamp(0, 1)[0]
                yield (255 * image).permute(1, 2, 0).cpu().numpy().astype(np.uint8)
            done += len(prompts)


def run(opt):
    check(opt)
    batches(opt)
    samples = pathlib.Path(opt.outdir) / "samples"
    samples.mkdir(parents=True, exist_ok=True)
    model = load_model(opt.config, opt.ckpt, opt.device, pick_dtype(opt.precision, opt.device))
    reuse_freed_memory()
    tokens = LearnedTokens(model.cond_stage_model)
    for path in opt.embedding_path:
        print(f"{path}: {', '.join(tokens.load(path))}")
    mark, images, number = watermarker(), [], next_number(samples)
    first = number
    for image in generate(model, opt):
        image = mark(image)
        images.append(image)
        if not opt.skip_save:
            save(image, samples / f"{number:05}.png")
            number += 1
    written = [f"{number - first} pictures to {samples}"] if not opt.skip_save else []
    if not opt.skip_grid:
        path = samples.parent / f"grid-{next_number(samples.parent, 'grid-'):04}.png"
        save(grid(images, opt.n_rows or opt.n_samples), path)
        written.append(f"all of them to {path}")
    print("wrote " + " and ".join(written or ["nothing: --skip_save and --skip_grid"]))


def main(argv=None):
    try:
        run(parse_args(argv))
    except (ModelError, OSError) as e:
        message = f"{e.filename}: {e.strerror}" if getattr(e, "filename", None) else str(e)
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
