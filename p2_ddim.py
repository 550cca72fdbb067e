"""Problem 2: faces from given noise by DDIM, and the sheets of the report (by eta, and between two noises).

    python3 p2_ddim.py hw2_data/face/noise output/face hw2_data/face/UNet.pt --gt hw2_data/face/GT
    python3 p2_ddim.py --make-noise output/noise --count 10 --size 64 --seed 0

The recipe of the course's ground truth: 50 uniform steps t = 981, 961, ..., 1, then alpha_bar[0]; eta 0; predicted x_0
clamped to [-1, 1]; each picture stretched from its own minimum and maximum to [0, 255]. In the sheets [-1, 1] becomes
[0, 255] instead, so that contrast can be compared. With eta > 0, the steps of picture i draw from the seed + i, behind
what --make-noise draws from it.
"""

from __future__ import annotations

import pathlib
import sys

import numpy as np
import torch
from torchvision.utils import save_image
from tqdm import tqdm

import utils
from diffusion import ddim, eps_from_v, lerp, schedule, slerp, time_batch, timesteps
from UNet import load_unet
from utils import Parser, UserError, cli, real, whole

T = 1000
ETAS = [0.0, 0.25, 0.5, 0.75, 1.0]
ALPHAS = [i / 10 for i in range(11)]
MSE_BOUND = 20.0  # the course's, on 0..255


def parse(argv=None):
    parser = Parser(__doc__)
    option = parser.add_argument
    option("noise_dir", nargs="?", help="folder of *.pt, each a noise [3, S, S] or [1, 3, S, S], S divisible by 32")
    option("out", nargs="?", help="folder that gets one {stem}.png for each {stem}.pt")
    option("unet", nargs="?", help="the network: the course's UNet.pt, or a checkpoint of p2_train.py")
    option("--eta", type=real(0, 1), default=0.0, help="0 deterministic ... 1 as random as DDPM (default: 0)")
    option("--steps", type=divisor, default=50, help="a divisor of 1000, at most 500 (default: 50)")
    option("--gt", metavar="DIR", help="compares with DIR/{stem}.png, in OUT/errors.json; exit code 1 at 20 on average")
    option("--eta-grid", metavar="FILE", help="also a sheet: rows eta 0, 0.25 ... 1, columns the first four noises")
    option("--interpolate", choices=["slerp", "linear"], help="also a sheet, --grid: one row, alpha 0, 0.1 ... 1")
    option("--between", nargs=2, default=["00", "01"], metavar="STEM", help="its two ends (default: 00 01)")
    option("--grid", metavar="FILE", help="where --interpolate writes; norms and contrasts beside it, as .json")
    option("--batch-size", type=whole(), help="pictures at a time (default: what fits the memory)")
    option("--make-noise", metavar="DIR", help="only writes noise files, DIR/00.pt ...")
    option("--count", type=whole(1, 10_000), default=10, help="how many (default: 10)")
    option("--size", type=whole(32, 4096, 32), default=64, help="of which height and width (default: 64)")
    utils.add_device_options(parser)
    args = parser.parse_args(argv)
    if not args.make_noise and args.unet is None:
        raise UserError("give NOISE_DIR OUT UNET_PT, or --make-noise DIR")
    if args.interpolate and not args.grid or args.grid and not args.interpolate:
        raise UserError("--interpolate slerp|linear and --grid FILE go together: give both or neither")
    return args


def divisor(text):
    """`type` of --steps."""
    steps = whole(1, T // 2)(text)
    if T % steps:
        raise UserError(f"take a divisor of {T}, not {steps}")
    return steps


@cli
def main(argv=None):
    args = parse(argv)
    if args.make_noise:
        return make_noise(utils.output_folder(args.make_noise), args.count, args.size, args.seed)
    noises = read_noises(args.noise_dir)
    truths = read_truths(args.gt, noises) if args.gt else {}
    if args.interpolate:
        check_sizes(noises, args.between, args.noise_dir)
    if args.eta_grid:
        check_sizes(noises, list(noises)[:4], args.noise_dir)
    sampler = Sampler(args)
    out = utils.output_folder(args.out)
    sheets = [utils.output_file(f) for f in (args.eta_grid, args.grid) if f]
    errors = {}
    for stem, picture in zip(noises, sampler(list(noises.values()), args.eta, "pictures")):
        path = out / f"{stem}.png"
        with utils.atomic(path) as temporary:
            save_image(picture, temporary, format="PNG", normalize=True)
        if truths:
            errors[stem] = squared_error(path, truths[stem])
            tqdm.write(f"{stem}: mean squared error {errors[stem]:.4f}", file=sys.stdout)
    if args.eta_grid:
        write_eta_sheet(sampler, list(noises.values())[:4], sheets[0])
    if args.interpolate:
        a, b = (noises[stem] for stem in args.between)
        write_interpolation(sampler, a, b, args.interpolate, args.eta, sheets[-1])
    wrote = f"wrote {len(noises)} pictures to {out}" + "".join(f" and {sheet}" for sheet in sheets)
    if not truths:
        print(wrote)
        return 0
    mean = float(np.mean(list(errors.values())))
    passed = mean < MSE_BOUND
    utils.save_json({"errors": errors, "mean": mean, "bound": MSE_BOUND}, out / "errors.json")
    print(f"{wrote}; mean squared error {mean:.4f}, {'under' if passed else 'NOT UNDER'} the course's {MSE_BOUND:g}")
    return 0 if passed else 1


class Sampler:
    """DDIM of given noises through one network, in batches that fit the memory; the pictures and each sheet call it."""

    def __init__(self, args):
        self.path, self.seed, self.batch_size = args.unet, args.seed, args.batch_size
        self.device = args.device
        precision = "fp32" if args.precision == "auto" else args.precision  # the result is compared with a truth
        self.dtype = utils.pick_precision(precision, self.device)
        unet = load_unet(args.unet)
        self.channel = unet.time[1].in_features
        self.eps_model = make_eps_model(unet, self.device, self.dtype)
        self.alpha_bar = torch.cumprod(1 - utils.beta_scheduler(T), dim=0)
        self.times = timesteps(T, args.steps, "course")

    def __call__(self, noises, eta, label, indices=None):
        """Yields a picture [3, S, S] on the CPU for each noise [3, S, S], in order; `indices` seed their streams."""
        indices = range(len(noises)) if indices is None else indices
        with tqdm(total=len(noises) * (len(self.times) - 1), desc=label, unit="step") as bar:
            for i, j in self.batches(noises):
                x = torch.stack(noises[i:j]).to(self.device)  # [B, 3, S, S]
                noise = utils.noise_stream(self.seed, indices[i:j], x.shape[1:], self.device)
                noise()  # the first of a stream is x_T by --make-noise, which what the steps add must not repeat
                for _t, x, _x_0 in ddim(self.eps_model, x, self.alpha_bar, self.times, eta, noise):  # noqa: B020
                    bar.update(len(x))
                if not torch.isfinite(x).all():
                    raise UserError(f"{self.path}: its output is not finite; damaged weights, or take --precision fp32")
                yield from x.cpu()

    def batches(self, noises):
        """(start, end) of runs of noises of one size, so many that they fit the memory."""
        start = 0
        while start < len(noises):
            size = noises[start].shape[-1]
            end = start + 1
            while end < len(noises) and end - start < self.fitting(size) and noises[end].shape[-1] == size:
                end += 1
            yield start, end
            start = end

    def fitting(self, size):
        """How many pictures of this size fit: at the top of the U-Net one takes about 12 maps [channel, size, size]."""
        if self.batch_size:
            return self.batch_size
        free = 0.6 * torch.cuda.mem_get_info(self.device.index)[0] if self.device.type == "cuda" else 1e9
        return max(1, int(free / (12 * self.channel * size**2 * torch.finfo(self.dtype).bits / 8)))


def make_eps_model(unet, device, dtype):
    """eps_model(x_t, t), float32 in and out, of a UNet that computes in `dtype` and predicts eps or v."""
    if device.type == "cpu":
        utils.reuse_freed_memory()
    layout = utils.fast_layout(device, dtype)
    unet = unet.requires_grad_(False).to(device, memory_format=layout)
    for parameter in unet.parameters():
        parameter.data = parameter.data.to(dtype)  # not the time embedding's buffer, though

    def predict(x_t, t):
        return unet(x_t.to(dtype).contiguous(memory_format=layout), time_batch(x_t, t)).float()

    return eps_from_v(predict, schedule("linear", T)) if unet.objective == "v" else predict


def write_eta_sheet(sampler, noises, path):
    rows = [utils.to_uint8(torch.stack(list(sampler(noises, eta, f"eta {eta}")))) for eta in ETAS]
    utils.save_png(utils.image_grid(torch.cat(rows), columns=len(noises)), path)


def write_interpolation(sampler, a, b, kind, eta, path):
    """One row, alpha 0 ... 1; with eta > 0 all its pictures draw the same noise, so that only alpha differs.

    Prints, and writes beside it as JSON, for each alpha the norm of the noise as a part of the first one's, and the
    contrast of the picture: the standard deviation of its pixels, 0..255.
    """
    noises = [{"slerp": slerp, "linear": lerp}[kind](a, b, alpha) for alpha in ALPHAS]
    pictures = utils.to_uint8(torch.stack(list(sampler(noises, eta, kind, [0] * len(noises)))))
    utils.save_png(utils.image_grid(pictures, columns=len(noises)), path)
    told = {
        "alphas": ALPHAS,
        "norms": [round(float(x.norm() / a.norm()), 2) for x in noises],
        "contrasts": [round(float(x.float().std())) for x in pictures],
    }
    utils.save_json(told, path.with_suffix(".json"))
    for name in ("norms", "contrasts"):
        print(f"{kind}: {name} {' '.join(map(str, told[name]))}")


def read_noises(folder):
    """{stem: float32 [3, S, S]} of every *.pt in the folder, sorted by name; raises UserError."""
    folder = pathlib.Path(folder)
    files = sorted(folder.glob("[!.]*.pt"))
    if not files:
        raise UserError(f"{folder}: no *.pt in it; give a folder of noise files (--make-noise DIR makes some)")
    return {path.stem: read_noise(path) for path in files}


def read_noise(path):
    noise = utils.load_checkpoint(path)
    if not torch.is_tensor(noise) or not noise.is_floating_point():
        raise UserError(f"{path}: not a tensor of floats; give a noise [3, S, S] or [1, 3, S, S]")
    shape = list(noise.shape)
    if shape[:-3] not in ([], [1]) or shape[-3:-2] != [3] or shape[-1] != shape[-2] or shape[-1] % 32 or not shape[-1]:
        raise UserError(f"{path}: its shape is {shape}; give a noise [3, S, S] or [1, 3, S, S], S a multiple of 32")
    if not torch.isfinite(noise).all():
        raise UserError(f"{path}: it has NaN or infinity in it; write the noise again")
    return noise.detach().float().reshape(shape[-3:])


def read_truths(folder, noises):
    """{stem: uint8 [S, S, 3]} for each noise; raises UserError where one is missing or of another size."""
    truths = {}
    for stem, noise in noises.items():
        path = pathlib.Path(folder) / f"{stem}.png"
        truths[stem] = np.asarray(utils.open_image(path, "--gt wants one for every noise"))
        if truths[stem].shape[:2] != noise.shape[1:]:
            height, width = truths[stem].shape[:2]
            raise UserError(f"{path}: {height}x{width}, but its noise is of size {noise.shape[1]}; give another --gt")
    return truths


def squared_error(path, truth):
    """Mean squared error on 0..255 of the written PNG, as the course's grader computes it."""
    return float(np.mean((np.asarray(utils.open_image(path)).astype(np.float64) - truth) ** 2))


def check_sizes(noises, stems, folder):
    for stem in stems:
        if stem not in noises:
            raise UserError(f"{folder}/{stem}.pt: no such noise; --between two of {', '.join(list(noises)[:5])} ...")
    sizes = {noises[stem].shape[-1] for stem in stems}
    if len(sizes) > 1:
        raise UserError(f"{folder}: {' '.join(stems)} are of sides {sorted(sizes)}; a sheet needs noises of one size")


def make_noise(folder, count, size, seed):
    """Writes folder/00.pt ...: standard normal float32 [1, 3, size, size], file i from seed + i."""
    for i in range(count):
        utils.save_checkpoint(utils.noise_stream(seed, [i], (3, size, size))(), folder / f"{i:02d}.pt")
    print(f"wrote {count} noises of {size}x{size} to {folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
