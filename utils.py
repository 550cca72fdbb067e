"""Ground floor, shared by every script: options, the course's betas, device, precision, seeds, checkpoints, files.

from utils import Parser, UserError, cli, load_checkpoint, noise_stream, pick_precision, whole
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import hashlib
import io
import json
import math
import os
import pathlib
import signal
import sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "stable-diffusion"))
from ldm import ModelError  # noqa: E402
from ldm.checkpoint import Inert, atomic, is_finite, read_checkpoint  # noqa: E402
from ldm.util import noise_stream  # noqa: E402, F401

UserError = ModelError  # one kind of error: what the user can mend, told in one line
CHECKPOINTS = pathlib.Path(__file__).resolve().parent / "checkpoints"


def cli(main):
    """Decorator of a script's main(). What the user can mend, a failed file operation and too little memory end with
    one line on stderr and exit code 2; Ctrl-C and SIGTERM with one that says how to go on, and 130 or 143."""

    @functools.wraps(main)
    def run(*args, **kwargs):
        code = 130

        def terminate(*_):
            nonlocal code
            code = 143
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise KeyboardInterrupt

        for stream in (sys.stdout, sys.stderr):  # a file's name may be no UTF-8
            with contextlib.suppress(AttributeError):
                stream.reconfigure(errors="backslashreplace")
        before = signal.signal(signal.SIGTERM, terminate)
        try:
            result = main(*args, **kwargs)
            flush_output()
            return result
        except UserError as e:
            message = str(e)
        except OSError as e:
            message = f"{e.filename or 'standard output or a temporary file'}: {e.strerror or e}"
        except (MemoryError, RuntimeError) as e:
            if isinstance(e, RuntimeError) and not ("allocate memory" in str(e) or "out of memory" in str(e)):
                raise
            message = f"too little memory ({str(e)[:150]}); take a smaller --batch-size or smaller pictures"
        except KeyboardInterrupt as e:
            last_line(str(e) or "interrupted; run the same line again")
            raise SystemExit(code) from None
        finally:
            signal.signal(signal.SIGTERM, before)
        last_line(f"error: {' '.join(message.split())}")
        raise SystemExit(2)

    return run


def last_line(text):
    """Writes it on stderr, below the progress bars that an error has left open."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    print(text, file=sys.stderr)


def flush_output():
    """What is printed must not fail as late as the interpreter's end, where it would be a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = None
        raise


# ------------------------------------------------------------------------ options


class Parser(argparse.ArgumentParser):
    """The parser of every script, under `cli`: its description is shown as written, a mistake is one line."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise UserError(message)


def whole(low=1, high=math.inf, step=1):
    """`type` of an option: a whole number from `low` to `high`, a multiple of `step`."""
    return _number(int, f"a multiple of {step}" if step > 1 else "a whole number", low, high, lambda n: n % step == 0)


def real(low=-math.inf, high=math.inf, positive=False):
    """`type` of an option: a finite number from `low` to `high`; only a positive one, if so said."""
    return _number(float, "a positive number" if positive else "a number", low, high, lambda x: x > 0 or not positive)


def _number(kind, wanted, low, high, fits):
    if low > -math.inf:
        wanted += f", {low} to {high}" if high < math.inf else f", {low} or more"

    def parse(text):
        with contextlib.suppress(ValueError, OverflowError):
            n = kind(text)
            if math.isfinite(n) and low <= n <= high and fits(n):
                return n
        raise UserError(f"take {wanted}, not {text[:40]!r}")

    return parse


SEED = whole(0, 2**32 - 1)


def add_device_options(parser, seed=0):
    """The options that every script has; `parser` makes args.device a torch.device."""
    parser.add_argument("--seed", type=SEED, default=seed)
    parser.add_argument("--device", type=pick_device, default="auto", help="auto, cpu, cuda:1, mps ... (default: auto)")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])


# ------------------------------------------------------------------------ noise schedule


def beta_scheduler(n_timestep=1000, linear_start=1e-4, linear_end=2e-2):
    """The course's schedule (DDPM, Ho et al. 2020, section 4): betas linear in t, float64 [n_timestep]."""
    return torch.linspace(linear_start, linear_end, n_timestep, dtype=torch.float64)


# ------------------------------------------------------------------------ device and precision


def pick_device(name="auto"):
    """torch.device of `name`, `type` of an option; "auto" takes a GPU where there is one. UserError for a device that
    is not there, or computes nothing."""
    if name == "auto":
        has_mps = getattr(torch.backends, "mps", None) is not None and torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        device = torch.device(str(name))
        usable(device)
    except Exception:  # each kind of device has errors of its own
        cuda = torch.cuda.device_count()
        raise UserError(f"{name}: no such device here, where torch has {cuda} CUDA devices; take cpu") from None
    if device.type == "cuda":  # float32 is to be float32, and the same picture the same bytes
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    return device if device.type != "cpu" else torch.device("cpu")


def usable(device):
    """Raises where the device is not there, or computes nothing."""
    float(torch.ones(1, device=device) + 1)


def pick_precision(name, device):
    """torch dtype of the heavy arithmetic. "auto": fp16 on GPUs, bf16 on CPUs with matrix units for it, else fp32."""
    if name == "auto":
        if device.type == "cuda":
            name = "fp16"
        else:
            name = "bf16" if device.type == "cpu" and cpu_has_fast_bf16() else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU; on a CPU take bf16 or fp32")
    if name == "bf16" and device.type == "cpu" and torch_version() < (2, 0):
        raise UserError("--precision bf16 on a CPU needs torch 2.0 or newer; take fp32")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def torch_version():
    return tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2])


def cpu_has_fast_bf16():
    """Whether this CPU multiplies bfloat16 matrices in hardware (AMX, or AVX-512 BF16) and this torch uses it."""
    try:
        flags = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return torch_version() >= (2, 0) and ("amx_bf16" in flags or "avx512_bf16" in flags)


def reuse_freed_memory():
    """Has glibc, where it is, keep freed blocks for the next layer, not have them zeroed and mapped anew: on a CPU 15 %
    of the time of inference, a fifth of a training step."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block in a mapping of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def fast_layout(device, dtype):
    """The memory format that is faster for convolutions: channels_last on CPUs from torch 2.0 on, and in half precision
    on GPUs (benchmarks/p2.py)."""
    fast = torch_version() >= (2, 0) if device.type == "cpu" else dtype != torch.float32
    return torch.channels_last if fast else torch.contiguous_format


def training_precision(name, device):
    """pick_precision for a training: its "auto" is bf16 on GPUs that multiply it (from compute capability 8 on); on
    others fp16, whose gradients need `grad_scaler`."""
    if name == "auto" and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8:
        return torch.bfloat16
    return pick_precision(name, device)


def grad_scaler(device, dtype):
    """Keeps float16 gradients from vanishing; does nothing in other precisions."""
    enabled = dtype == torch.float16
    new = getattr(getattr(torch, "amp", None), "GradScaler", None)  # before torch 2.3: in torch.cuda.amp
    return new(device.type, enabled=enabled) if new else torch.cuda.amp.GradScaler(enabled=enabled)


def attention(q, k, v):
    """softmax(q k^T / sqrt(c)) v of [B, positions, c], by torch's fused kernel where it has one (2.0 and later)."""
    if hasattr(F, "scaled_dot_product_attention"):
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
    return plain_attention(q, k, v)


def plain_attention(q, k, v):
    return torch.softmax(q @ k.transpose(1, 2) * q.shape[-1] ** -0.5, dim=-1) @ v


def autocast(device, dtype):
    """torch.autocast for `dtype`, or nothing for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


# ------------------------------------------------------------------------ files


def output_folder(path):
    """Makes the folder, and raises UserError where files cannot be written into it."""
    path = pathlib.Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / f".{os.getpid()}.tmp").touch()
        (path / f".{os.getpid()}.tmp").unlink()
    except OSError as e:
        raise UserError(f"{path}: cannot write there ({e.strerror}); choose another output folder") from None
    return path


def output_file(path):
    """The path, with its folder made; UserError where a file cannot be written there."""
    path = pathlib.Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file in it")
    output_folder(path.absolute().parent)
    return path


def read_json(path, remedy="correct its path"):
    """What a JSON file holds. UserError where it is missing, damaged, nested too deep, or has what JSON has not: NaN,
    infinity, half of a surrogate pair."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; {remedy}")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not JSON ({str(e)[:120]}); correct it") from None
    return content


Image.MAX_IMAGE_PIXELS = None  # Pillow only warns of what is up to twice as large


def open_image(path, remedy="remove it or fetch it again", upright=True):
    """The picture in a file as a PIL image, RGB, turned `upright` as its EXIF orientation says; raises UserError."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > 90e6:
                raise ValueError(f"{image.width}x{image.height} pixels, of which 90 million are the most")
            return (ImageOps.exif_transpose(image) if upright else image).convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path}: no such picture; {remedy}") from None
    except Exception as e:  # Pillow raises many kinds
        raise UserError(f"{path}: not a readable picture ({str(e)[:120]}); {remedy}") from None


def save_png(image, path):
    """Writes uint8 [H, W, 3] or [3, H, W] (tensor or array) as a PNG: to a temporary name first, then renamed."""
    image = np.asarray(image)
    if image.shape[0] == 3 and image.shape[-1] != 3:
        image = image.transpose(1, 2, 0)
    with atomic(path) as temporary:
        Image.fromarray(image).save(temporary, format="PNG")


def to_float(images):
    """[0, 255] uint8 to [-1, 1] floats."""
    return images.float() / 127.5 - 1


def save_json(content, path):
    """Writes a JSON file: to a temporary name first, then renamed."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def to_uint8(x):
    """[-1, 1] floats to [0, 255] uint8, rounded to the nearest level."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def affine_grid(x, turn, zoom, shift, shear=0.0):
    """F.grid_sample's grid [B, H, W, 2] of pictures x [B, C, H, W], each turned by its `turn` [B] (radians), zoomed by
    its `zoom` [B, 2] in x and y and moved by its `shift` [B, 2], where 2 is the whole side."""
    rows = [turn.cos(), shear - turn.sin(), shift[:, 0]], [turn.sin(), turn.cos(), shift[:, 1]]
    theta = torch.stack([torch.stack(row, 1) for row in rows], 1) / zoom[:, :, None]
    return F.affine_grid(theta.to(x, non_blocking=True), list(x.shape), align_corners=False)


def image_grid(images, columns, pad=2):
    """uint8 [N, 3, H, W] -> one uint8 picture [3, rows*(H+pad)+pad, columns*(W+pad)+pad] on white, row by row."""
    n, c, h, w = images.shape
    rows = -(-n // columns)
    sheet = torch.full((c, rows * (h + pad) + pad, columns * (w + pad) + pad), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        y, x = (i // columns) * (h + pad) + pad, (i % columns) * (w + pad) + pad
        sheet[:, y : y + h, x : x + w] = image
    return sheet


# ------------------------------------------------------------------------ checkpoints


def load_checkpoint(path):
    """The content of a torch, Lightning, TorchScript or safetensors file, its tensors on the CPU; runs no code that the
    file may carry. Raises UserError, in one line, for a missing, damaged, foreign or hostile one."""
    if not pathlib.Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint; `bash hw2_download_ckpt.sh` restores those of this project")
    content = read_checkpoint(path, lazy=False)
    return _attributes(content) if isinstance(content, Inert) else content


def _attributes(module):
    """{dotted name: tensor} of a TorchScript module, as its state_dict() names them."""
    tensors, todo, seen = {}, [("", module)], set()
    while todo:
        prefix, module = todo.pop()
        if id(module) in seen or not isinstance(module.state, dict) or len(prefix) > 1000:
            continue
        seen.add(id(module))
        inner = {f"{prefix}{k}": v for k, v in module.state.items() if isinstance(k, str) and len(k) < 100}
        todo += [(f"{k}.", v) for k, v in inner.items() if isinstance(v, Inert)]
        tensors.update({k: v for k, v in inner.items() if isinstance(v, torch.Tensor)})
    return tensors


def save_checkpoint(content, path):
    """torch.save to a temporary name, then renamed. The same content gives the same bytes."""
    buffer = io.BytesIO()  # given a name, torch.save writes it into the file; its own writer aborts on a full disk
    torch.save(content, buffer)
    with atomic(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def weights_id(network):
    """Sixteen hexadecimal digits of the last layer's weights, which tell this network from others."""
    return digest(list(network.parameters())[-2:])


def digest(tensors):
    """Sixteen hexadecimal digits of the values of tensors, in their order."""
    sha = hashlib.sha256()
    for x in tensors:
        sha.update(x.detach().float().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


def json_id(content):
    """Sixteen hexadecimal digits of what JSON can say."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def half(state_dict):
    """The same state dict with its floating-point tensors in float16, on the CPU."""
    return {k: v.detach().cpu().half() if v.is_floating_point() else v.detach().cpu() for k, v in state_dict.items()}


def load_weights(model, state_dict, path):
    """Strict load_state_dict of tensors of any precision; raises UserError naming the first key that is missing,
    foreign, misshapen or not finite."""
    own, net = model.state_dict(), type(model).__name__
    if not isinstance(state_dict, dict):
        raise UserError(f"{path}: its state_dict is none; it is no checkpoint")
    for key, value in own.items():
        if key not in state_dict:
            raise UserError(f"{path}: lacks the key {key}; it is a checkpoint of another network than {net}")
        if not torch.is_tensor(state_dict[key]):
            raise UserError(f"{path}: {key} is no tensor; the file is damaged, fetch or train it again")
        given, wanted = tuple(state_dict[key].shape), tuple(value.shape)
        if given != wanted:
            raise UserError(f"{path}: {key} has shape {given} where {net} has {wanted}; it is of another network")
        if not is_finite(state_dict[key]):
            raise UserError(f"{path}: {key} has NaN or infinity in it; fetch or train it again")
    foreign = [k for k in state_dict if k not in own]
    if foreign:
        raise UserError(f"{path}: the key {foreign[0]} is unknown; it is a checkpoint of another network than {net}")
    model.load_state_dict(state_dict)
    return model
