"""Models for the tests of stable-diffusion/: a tiny random one, and the course's reference where env HW2_REF has it."""

import os
import pathlib
import sys

import numpy as np
import pytest
import torch

SD = pathlib.Path(__file__).resolve().parents[1] / "stable-diffusion"
sys.path.insert(0, str(SD))

from ldm.util import instantiate_from_config, load_model, read_config  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

CONFIG = SD / "configs/stable-diffusion/v1-inference.yaml"
TINY_UNET = {
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [2, 1],
    "num_heads": 4,
    "context_dim": 32,
    "use_checkpoint": False,
}
TINY_VAE = {"ch": 32, "ch_mult": [1, 1, 2, 2], "num_res_blocks": 1}
TINY_TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def shrunk(unet, vae, text, image_size):
    """v1-inference.yaml with other sizes."""
    sizes = {
        "image_size": image_size,
        "unet_config": {"params": unet},
        "cond_stage_config": {"params": {"config": text}},
        "first_stage_config": {"params": {"ddconfig": vae}},
    }
    return OmegaConf.merge(read_config(CONFIG), {"model": {"params": sizes}})


def tiny_config():
    return shrunk(TINY_UNET, TINY_VAE, TINY_TEXT, 8)


def tiny_model():
    """A LatentDiffusion with random weights in which prompts, images and latents matter."""
    torch.manual_seed(0)
    model = instantiate_from_config(tiny_config().model)
    for name, p in model.named_parameters():
        if "token_embedding" in name or p.dim() > 1 and (".attn2.to_" in name or "self_attn" in name):
            torch.nn.init.normal_(p, std=1.0 if "token" in name else 0.3)
    return model.eval().requires_grad_(False)


def write_tiny(folder):
    """(yaml, checkpoint) of the tiny model, as files."""
    OmegaConf.save(tiny_config(), folder / "tiny.yaml")
    torch.save({"state_dict": tiny_model().state_dict(), "global_step": 1}, folder / "tiny.ckpt")
    return str(folder / "tiny.yaml"), str(folder / "tiny.ckpt")


def reference(name):
    """A file of the reference folder, or the test is skipped."""
    folder = os.environ.get("HW2_REF")
    if not folder:
        pytest.skip("the course's reference numbers: set HW2_REF to their folder")
    return pathlib.Path(folder) / name


def reference_model():
    """(model, arrays) of the course's shrunk model."""
    path = reference("ldm_small")
    text = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    config = shrunk({"model_channels": 32, "context_dim": 64}, {"ch": 32}, text, 16)
    arrays = np.load(path / "ref.npz")
    tensors = {k: torch.from_numpy(arrays[k]) for k in arrays.files if arrays[k].dtype.kind in "fiu"}
    return load_model(config, path / "model.ckpt"), tensors, [str(p) for p in arrays["prompts"]]
