"""Ground floor, shared by every script: the course's betas, device, precision, seeds, checkpoints, image files.

from utils import UserError, cli, load_checkpoint, noise_stream, pick_device, pick_precision
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import pathlib
import pickle
import random
import sys
import types
import warnings
import zipfile

import numpy as np
import torch
from PIL import Image


class UserError(Exception):
    """Something the user can mend; the message is one line that names the file and the remedy."""


def cli(main):
    """Decorator of a script's main(): a UserError or a failed file operation ends with one line on stderr and exit
    code 2."""

    @functools.wraps(main)
    def run(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as e:
            message = str(e)
        except OSError as e:
            message = f"{e.filename}: {e.strerror}" if e.filename else str(e)
        except KeyboardInterrupt as e:
            print(str(e) or "interrupted", file=sys.stderr)
            raise SystemExit(130) from None
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2)

    return run


# ------------------------------------------------------------------------ noise schedule and seeds


def beta_scheduler(n_timestep=1000, linear_start=1e-4, linear_end=2e-2):
    """The course's schedule (DDPM, Ho et al. 2020, section 4): betas linear in t, float64 [n_timestep]."""
    return torch.linspace(linear_start, linear_end, n_timestep, dtype=torch.float64)


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def noise_stream(seed, indices, shape, device="cpu"):
    """A function that draws standard normal noise [len(indices), *shape], each picture from its own CPU generator.

    Picture i uses the seed `seed + i`, so that it is the same on any device and in any batch. The first call gives
    x_T, later calls the noise of a stochastic sampler's steps.
    """
    generators = [torch.Generator().manual_seed(seed + int(i)) for i in indices]
    return lambda: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)


# ------------------------------------------------------------------------ device and precision


def add_device_options(parser, seed=0):
    """The options that every script has."""
    parser.add_argument("--seed", type=int, default=seed)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps ... (default: auto)")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])


def pick_device(name="auto"):
    """torch.device of `name`; "auto" takes a GPU where there is one."""
    if name == "auto":
        has_mps = getattr(torch.backends, "mps", None) is not None and torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: no such device; take cpu, cuda or mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; take --device cpu"
        )
    return device


@functools.lru_cache(maxsize=None)
def cpu_has_fast_bf16():
    """Whether this CPU multiplies bfloat16 matrices in hardware (AMX, or AVX-512 BF16) and this torch uses it."""
    if torch_version() < (2, 0):
        return False
    try:
        flags = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def torch_version():
    return tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2])


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


def reuse_freed_memory():
    """Has glibc keep large freed blocks for the next layer, instead of giving them back to the system and having
    them zeroed and mapped anew: 15 % of the face U-Net's time on a CPU, a fifth of a training step of Problem 1.

    Without glibc, nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block in a mapping of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def autocast(device, dtype):
    """torch.autocast for `dtype`, or nothing for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


# ------------------------------------------------------------------------ files


@contextlib.contextmanager
def atomic(path):
    """Gives a temporary path beside `path`, renamed to it on success and removed on failure: no half-written file
    stays."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def output_folder(path):
    """Makes the folder, and raises UserError where files cannot be written into it."""
    path = pathlib.Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with atomic(path / ".writable") as probe:
            probe.touch()
        (path / ".writable").unlink()
    except OSError as e:
        raise UserError(f"{path}: cannot write there ({e.strerror}); choose another output folder") from None
    return path


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


def to_uint8(x):
    """[-1, 1] floats to [0, 255] uint8, rounded to the nearest level."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


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

_SAFE_GLOBALS = {
    "collections": {"OrderedDict", "defaultdict"},
    "torch._utils": {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter"},
    "torch": {
        "Size",
        "device",
        "float16",
        "float32",
        "float64",
        "bfloat16",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "bool",
    },
    "torch.serialization": {"_get_layout"},
    "torch.nn.parameter": {"Parameter"},
    "torch.storage": {"_TypedStorage", "TypedStorage", "UntypedStorage", "_UntypedStorage"},
    "numpy": {"dtype", "ndarray", "float64", "float32", "int64", "int32"},
    "numpy.core.multiarray": {"scalar", "_reconstruct"},
    "numpy._core.multiarray": {"scalar", "_reconstruct"},
    "_codecs": {"encode"},
    "builtins": {"set", "frozenset", "slice", "complex", "int", "float", "bool", "str", "list", "dict", "tuple"},
    "__builtin__": {"set"},
    "copyreg": {"_reconstructor"},
    "argparse": {"Namespace"},
    "pathlib": {"PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
}
_IGNORED_PACKAGES = {"pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities", "omegaconf"}


class _Ignored:
    """Stands for a trainer's object in a checkpoint: it is never imported, takes any state and keeps none."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def append(self, value):
        pass

    def extend(self, values):
        pass


class _SafeUnpickler(pickle.Unpickler):
    """Resolves only names that build tensors and plain containers, so that loading runs no code of the file."""

    def find_class(self, module, name):
        if name in _SAFE_GLOBALS.get(module, ()) or (module == "torch" and name.endswith("Storage")):
            if module == "pathlib":
                return pathlib.PurePosixPath
            return super().find_class(module, name)
        if module.split(".")[0] in _IGNORED_PACKAGES:
            return _Ignored
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


_safe_pickle = types.ModuleType("safe_pickle")
_safe_pickle.Unpickler = _SafeUnpickler
_safe_pickle.UnpicklingError = pickle.UnpicklingError
_safe_pickle.load = lambda f, **kwargs: _SafeUnpickler(f, **kwargs).load()


def load_checkpoint(path, map_location="cpu"):
    """Reads a torch or Lightning checkpoint, of torch 1.x or 2.x, without ever running code that it may carry.

    torch.load's `weights_only` is missing before torch 1.13 and refuses Lightning's objects later, so the pickle is
    read with an unpickler of our own: tensors, numbers, strings and containers are built, trainer objects become
    empty stand-ins, and any other name (os.system, say) is refused. Raises UserError, in one line, for a missing,
    truncated, foreign or hostile file.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; `bash hw2_download_ckpt.sh` restores those of this project")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(n.endswith("constants.pkl") for n in archive.namelist()):
                    raise UserError(
                        f"{path}: a TorchScript archive, not a checkpoint; save a state dict with torch.save instead"
                    )
        options = {"weights_only": False} if torch_version() >= (1, 13) else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location=map_location, pickle_module=_safe_pickle, **options)
    except pickle.UnpicklingError as e:
        if "it asks for" in str(e):
            raise UserError(
                f"{path}: refused, the checkpoint would run code: {e}; get it from a source you trust"
            ) from None
        raise UserError(f"{path}: not a checkpoint, or a damaged one ({e}); fetch or train it again") from None
    except (
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        TypeError,
        UnicodeDecodeError,
        zipfile.BadZipFile,
    ) as e:
        reason = str(e).split("\n")[0][:120]
        raise UserError(f"{path}: not a checkpoint, or a damaged one ({reason}); fetch or train it again") from None


def save_checkpoint(checkpoint, path):
    """torch.save to a temporary name, then renamed; raises UserError where it cannot be written."""
    try:
        with atomic(path) as temporary:
            torch.save(checkpoint, temporary)
    except RuntimeError as e:  # torch's own writer, on a full disk
        raise UserError(f"{path}: could not be written ({e}); is the disk full?") from None


def half(state_dict):
    """The same state dict with its floating-point tensors in float16, on the CPU."""
    return {k: v.detach().cpu().half() if v.is_floating_point() else v.detach().cpu() for k, v in state_dict.items()}


def load_weights(model, state_dict, path):
    """Strict load_state_dict of tensors of any precision; raises UserError naming the first key that is missing,
    foreign or misshapen."""
    own, net = model.state_dict(), type(model).__name__
    for key, value in own.items():
        if key not in state_dict:
            raise UserError(f"{path}: lacks the key {key}; it is a checkpoint of another network than {net}")
        given, wanted = tuple(state_dict[key].shape), tuple(value.shape)
        if given != wanted:
            raise UserError(f"{path}: {key} has shape {given} where {net} has {wanted}; it is of another network")
    foreign = [k for k in state_dict if k not in own]
    if foreign:
        raise UserError(f"{path}: the key {foreign[0]} is unknown; it is a checkpoint of another network than {net}")
    model.load_state_dict(state_dict)
    return model
