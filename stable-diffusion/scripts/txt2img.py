"""Makes pictures from prompts with Stable Diffusion v1.

    python3 scripts/txt2img.py --prompt "an astronaut riding a horse" --ckpt sd-v1-4.ckpt --outdir outputs

Writes OUTDIR/samples/00000.png ... and OUTDIR/grid-0000.png. Picture i has the seed SEED + i, whatever the batch.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import signal
import sys

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm, trange

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ldm.checkpoint import atomic  # noqa: E402
from ldm.models.diffusion.ddim import DDIMSampler  # noqa: E402
from ldm.models.diffusion.dpm_solver import DPMSolverSampler  # noqa: E402
from ldm.modules.textual_inversion import LearnedTokens  # noqa: E402
from ldm.util import ModelError, load_model, noise_stream  # noqa: E402

CKPT = "models/ldm/stable-diffusion-v1/model.ckpt", "ldm/models/stable-diffusion-v1/model.ckpt"  # places under ROOT


class Parser(argparse.ArgumentParser):
    """A mistake is one line that names the option."""

    def error(self, message):
        raise ModelError(message)


def number(kind, low, high):
    """`type` of an option: a whole or finite number from `low` to `high`."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"take a {'whole ' * (kind is int)}number, {low} to {high}, not {text[:40]!r}")

    return parse


def device(text):
    """`type` of an option: a device that is here, and computes."""
    try:
        float(torch.ones(1, device=text) + 1)
    except Exception:  # each kind of device has errors of its own
        raise argparse.ArgumentTypeError(f"{text}: no such device here; take cpu") from None
    return text


def parse_args(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompt", default="a painting of a virus monster playing guitar")
    add("--from-file", help="a text file of prompts, one a line, each used once an iteration")
    add("--outdir", default="outputs/txt2img-samples")
    add("--skip_grid", action="store_true", help="no picture of all pictures")
    add("--skip_save", action="store_true", help="no single pictures")
    add("--ddim_steps", type=number(int, 1, 1000), default=50, help="sampling steps, of either sampler (default: 50)")
    add(
        "--ddim_eta",
        type=number(float, 0, 1),
        default=0.0,
        help="0 is deterministic; more makes DDIM the sampler (default: 0)",
    )
    add("--sampler", choices=["dpm", "ddim"], default="dpm", help="DPM-Solver++(2M) or DDIM (default: dpm)")
    add("--fixed_code", action="store_true", help="the same starting noises in every iteration")
    add("--n_iter", type=number(int, 1, 1000000), default=2, help="iterations (default: 2)")
    add("--H", type=number(int, 64, 4096), default=512, help="height in pixels, a multiple of 64 (default: 512)")
    add("--W", type=number(int, 64, 4096), default=512, help="width in pixels, a multiple of 64 (default: 512)")
    add("--C", type=number(int, 1, 64), default=4, help="latent channels (default: 4)")
    add("--f", type=number(int, 1, 64), default=8, help="pixels a latent pixel (default: 8)")
    add("--n_samples", type=number(int, 1, 1000), default=3, help="batch size: pictures of a prompt (default: 3)")
    add("--n_rows", type=number(int, 0, 1000), default=0, help="columns of the grid (default: n_samples)")
    add("--scale", type=number(float, -100, 100), default=7.5, help="guidance scale (default: 7.5)")
    add("--pag", type=number(float, 0, 100), default=0.0, help="perturbed-attention guidance (default: 0)")
    add("--fast", action="store_true", help="half the work a picture: see ldm/models/diffusion/sampling.py")
    add("--config", help="the model's YAML (default: the one that the checkpoint names, else v1-inference.yaml)")
    add("--ckpt", help=f"checkpoint, .ckpt or .safetensors (default: {' or '.join(CKPT)})")
    add("--embedding_path", nargs="*", default=[], help="files of learned embeddings for placeholders in prompts")
    add("--seed", type=number(int, 0, 4294967295), default=42)
    told = "autocast: half precision on a GPU, float32 on a CPU; full: float32"
    add("--precision", choices=["full", "autocast"], default="autocast", help=told)
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def batches(opt):
    """Prompts of each batch of one iteration."""
    if opt.from_file is None:
        return [[opt.prompt] * opt.n_samples]
    try:
        prompts = [p for p in pathlib.Path(opt.from_file).read_text(encoding="utf-8").splitlines() if p.strip()]
    except UnicodeDecodeError as e:
        raise ModelError(f"{opt.from_file}: not a text in UTF-8 ({e}); write it anew") from None
    if not prompts:
        raise ModelError(f"{opt.from_file}: holds no prompt")
    return [prompts[i : i + opt.n_samples] for i in range(0, len(prompts), opt.n_samples)]


def check(opt):
    """Bad options end here, before anything is loaded or written."""
    step = 8 * opt.f
    if opt.H < step or opt.W < step or opt.H % step or opt.W % step:
        raise ModelError(f"--H {opt.H} --W {opt.W}: take multiples of {step}")
    if opt.ddim_steps == 1000 and (opt.sampler == "ddim" or opt.ddim_eta > 0):
        raise ModelError("--ddim_steps 1000: DDIM takes at most 999 of the 1,000 times")
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

    def mark(image):
        too_small = image.shape[0] * image.shape[1] < 256 * 256  # for the package
        return image if too_small else encoder.encode(np.ascontiguousarray(image[:, :, ::-1]), "dwtDct")[:, :, ::-1]

    return mark


def save(image, path):
    with atomic(path) as temporary:
        Image.fromarray(np.ascontiguousarray(image)).save(temporary, format="PNG")


def next_number(folder, prefix=""):
    """One more than the largest number among prefix00000.png ... in the folder: nothing is written over."""
    numbers = [p.stem[len(prefix) :] for p in folder.glob(f"{prefix}*.png")]
    return max((int(n) + 1 for n in numbers if n.isdecimal()), default=0)


def grid(images, columns):
    """Pictures [H, W, 3], row by row, two black pixels apart."""
    from torchvision.utils import make_grid  # only now: it takes a second to import

    return make_grid(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), columns).permute(1, 2, 0).numpy()


@torch.no_grad()
def generate(model, opt, prompts_of):
    """`prompts_of` each batch of an iteration; yields uint8 pictures [H, W, 3], one at a time."""
    sampler = (DDIMSampler if opt.sampler == "ddim" or opt.ddim_eta > 0 else DPMSolverSampler)(model)
    shape = [opt.C, opt.H // opt.f, opt.W // opt.f]
    done = 0
    for _ in trange(opt.n_iter, desc="iterations"):
        if opt.fixed_code:
            done = 0
        for prompts in prompts_of:
            noise = noise_stream(opt.seed, range(done, done + len(prompts)), shape)
            uc = model.get_learned_conditioning([""] * len(prompts)) if opt.scale != 1.0 else None
            guidance = {"unconditional_guidance_scale": opt.scale, "unconditional_conditioning": uc}
            guidance.update(fast=opt.fast, pag=opt.pag)
            c, steps = model.get_learned_conditioning(prompts), opt.ddim_steps
            items = sampler.trajectory(steps, len(prompts), shape, c, eta=opt.ddim_eta, noise=noise, **guidance)
            *_, (_, x, x_0) = tqdm(items, total=steps, desc=type(sampler).__name__)
            latents = x_0 if isinstance(sampler, DPMSolverSampler) else x  # as p3_infer.py; x keeps 3 % of noise
            for latent in latents.split(1):
                image = ((model.decode_first_stage(latent) + 1) / 2).clamp(0, 1)[0]
                yield (255 * image).permute(1, 2, 0).cpu().numpy().astype(np.uint8)
            done += len(prompts)


def run(opt):
    check(opt)
    prompts_of = batches(opt)
    samples = pathlib.Path(opt.outdir) / "samples"
    half = opt.precision == "autocast" and opt.device.startswith("cuda")
    model = load_model(opt.config, opt.ckpt, opt.device, torch.float16 if half else torch.float32)
    for option, own in (("C", model.channels), ("f", model.first_stage_model.factor)):
        if getattr(opt, option) != own:
            raise ModelError(f"--{option} {getattr(opt, option)}: this model has {own}; take --{option} {own}")
    tokens = LearnedTokens(model.cond_stage_model)
    for path in opt.embedding_path:
        print(f"{path}: {', '.join(tokens.load(path))}")
    samples.mkdir(parents=True, exist_ok=True)
    mark, images, first = watermarker(), [], next_number(samples)
    for image in generate(model, opt, prompts_of):
        image = mark(image)
        images.append(image)
        if not opt.skip_save:
            save(image, samples / f"{first + len(images) - 1:05}.png")
    written = [f"{len(images)} pictures to {samples}"] if not opt.skip_save else []
    if not opt.skip_grid:
        path = samples.parent / f"grid-{next_number(samples.parent, 'grid-'):04}.png"
        save(grid(images, opt.n_rows or opt.n_samples), path)
        written.append(f"all of them to {path}")
    print("wrote " + " and ".join(written or ["nothing: --skip_save and --skip_grid"]))


def main(argv=None):
    """One line and exit code 2 for what the user can mend, 130 for Ctrl-C, 143 for SIGTERM."""
    code = 130

    def terminate(*_):
        nonlocal code
        code = 143
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        return run(parse_args(argv))
    except KeyboardInterrupt:
        print("interrupted; the same line starts anew, and writes over no picture", file=sys.stderr)
        raise SystemExit(code) from None
    except (ModelError, OSError) as e:
        message = f"{e.filename}: {e.strerror}" if getattr(e, "filename", None) else str(e)
    except (MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not ("allocate memory" in str(e) or "out of memory" in str(e)):
            raise
        message = f"too little memory ({str(e)[:150]}); take smaller --n_samples, --H and --W"
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
