"""Building models from YAML configs, and what every module of ldm shares."""

from __future__ import annotations

import contextvars
import importlib
import pathlib

import torch

from ldm import ModelError
from ldm.checkpoint import load_weights, read_checkpoint, read_state_dict
from ldm.compat import count_params, default, exists  # noqa: F401  where CompVis's code has them

CONFIGS = {path.stem: path for path in pathlib.Path(__file__).resolve().parents[1].glob("configs/*/*.yaml")}
_trust = contextvars.ContextVar("trust", default=False)


def get_obj_from_str(path, trust=False):
    """What a dotted path such as "ldm.models.autoencoder.AutoencoderKL" names: a class of ldm or torch.nn.Identity,
    since a config may come from anyone. With `trust`, anything that Python can import."""
    module, _, name = str(path).rpartition(".")
    error = ModelError(f"target {path!r}: not a class of ldm; for one you trust, instantiate_from_config(trust=True)")
    if not trust and module.split(".")[0] != "ldm" and path != "torch.nn.Identity":
        raise error
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as e:
        raise ModelError(f"target {path!r}: cannot be imported ({e}); correct the config") from None
    if not trust and not (isinstance(found, type) and found.__module__.split(".")[0] in ("ldm", "torch")):
        raise error
    return found


def instantiate_from_config(config, trust=False):
    """Calls config["target"] with the keywords config["params"]; `trust` (see get_obj_from_str) holds for the targets
    inside these too."""
    if "target" not in config:
        raise ModelError(f"config without a `target`: {str(config)[:80]}")
    context = contextvars.copy_context()
    context.run(_trust.set, trust or _trust.get())
    return context.run(lambda: get_obj_from_str(config["target"], _trust.get())(**(config.get("params") or {})))


def read_config(path):
    """The OmegaConf of a YAML file."""
    from omegaconf import OmegaConf

    try:
        config = OmegaConf.load(path)
        config.model.target  # noqa: B018  a YAML without a model fails here
    except Exception as e:  # the YAML parser and OmegaConf have error classes of their own, many of them
        wrong = f"not a model config ({' '.join(str(e).split())[:100]})"
        raise ModelError(f"{path}: {'no such config' if isinstance(e, FileNotFoundError) else wrong}") from None
    return config


def load_model(config, ckpt, device="cpu", dtype=torch.float32):
    """The model of a config with the weights of `ckpt`: frozen, in eval mode, network and autoencoder in `dtype`, the
    text encoder in float32. A config is a path, its OmegaConf, or None for the one in configs/stable-diffusion/ that
    the checkpoint names (if none, v1). Memory peaks at the model's own size."""
    content = read_checkpoint(ckpt)  # first: its errors come at once
    stored = read_state_dict(ckpt, content)
    if config is None:
        config = next((p for name, p in CONFIGS.items() if name == content.get("config")), CONFIGS["v1-inference"])
    config = read_config(config) if isinstance(config, (str, pathlib.Path)) else config
    model = uninitialised(config.model)
    return load_weights(model, stored, ckpt, device, dtype).to(device).eval().requires_grad_(False)


def uninitialised(config):
    """A model whose layers are left as the allocator gives them: no time spent, no page touched before weights come."""
    fills = ("normal_", "uniform_")
    try:
        for name in fills:
            setattr(torch.Tensor, name, lambda self, *args, **kwargs: self)
        return instantiate_from_config(config)
    finally:
        for name in fills:
            delattr(torch.Tensor, name)  # the method of the class below it


def free_memory(device):
    """Bytes that may still be allocated on `device`; infinite where the system does not say."""
    if torch.device(device).type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        meminfo = pathlib.Path("/proc/meminfo").read_text().split()
        return int(meminfo[meminfo.index("MemAvailable:") + 1]) * 1024
    except (OSError, ValueError):
        return float("inf")


def noise_stream(seed, indices, shape, device="cpu"):
    """A function that draws standard normal noise [len(indices), *shape], image i from a CPU generator of its own with
    the seed `seed + i`: the same in any batch, on any device. The first call gives x_T, later ones what steps add."""
    generators = [torch.Generator().manual_seed(seed + int(i)) for i in indices]
    return lambda: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
