"""Stable Diffusion as Problem 3 uses it: loading, learned embeddings on disk, pictures of a prompt.

model = load_stable_diffusion("model.ckpt", device, torch.float16)
pictures = generate(model, "A photo of a dog", range(4))         # uint8 [4, 3, 512, 512]
"""

from __future__ import annotations

import hashlib
import pathlib
import re
import sys
import urllib.parse

import torch

from utils import UserError, noise_stream, reuse_freed_memory, to_uint8, whole  # isort: skip  puts ldm on the path

from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.modules.textual_inversion import LearnedTokens, read_embeddings
from ldm.util import free_memory, load_model

ROOT = pathlib.Path(__file__).resolve().parent


def add_model_options(parser):
    """What both scripts of Textual Inversion ask about the model."""
    parser.add_argument("--config", help="the model's YAML (default: what the checkpoint names, else v1-inference)")
    parser.add_argument(
        "--size", type=whole(64, 4096, 64), help="side of a picture, a multiple of 64 (default: the model's own)"
    )


def load_stable_diffusion(ckpt, device, dtype, config=None):
    """The frozen LatentDiffusion of a checkpoint in CompVis's layout, network and autoencoder in `dtype`."""
    reuse_freed_memory()
    return load_model(config, ckpt, device, dtype)


def own_size(model):
    """The side in pixels of the pictures that a model was trained on: 512 for Stable Diffusion v1."""
    return model.image_size * model.first_stage_model.factor


def weights_id(model):
    """Sixteen hexadecimal digits of the last layer's weights, which tell this network from others."""
    digest = hashlib.sha256()
    for p in list(model.model.parameters())[-2:]:
        digest.update(p.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def generate(model, prompts, indices, steps=25, scale=7.5, size=None, seed=0, fast=False):
    """Pictures uint8 [len(indices), 3, size, size] of one prompt, or of a list with one for each: DPM-Solver++(2M),
    guidance scale `scale`; `fast` does half the work (ldm's sampling.py says which).

    Picture i starts from the noise of the seed `seed + i`, the same in any batch but for rounding: float32
    on CPUs with AMX may differ by one level of 255 with the size of the batch.
    """
    side = (size or own_size(model)) // model.first_stage_model.factor
    shape = [model.channels, side, side]
    cond, uncond = (
        model.get_learned_conditioning([prompts] if isinstance(prompts, str) else prompts),
        model.get_learned_conditioning([""]),
    )
    x_T = noise_stream(seed, indices, shape)()
    options = {"unconditional_guidance_scale": scale, "unconditional_conditioning": uncond, "fast": fast}
    latents, _ = DPMSolverSampler(model).sample(steps, len(indices), shape, cond, x_T=x_T, verbose=False, **options)
    return to_uint8(model.decode_first_stage(latents)).cpu()


def fitting_batch(model, size, most=5):
    """How many pictures to make at once: as many as memory holds, at most `most`. On a CPU as many as have the pixels
    of one of 512x512, up to 25: more are not faster.

    A guided picture of 512x512 is reckoned as 1 GB in half precision, most of it for sliced attention (torch < 2.0).
    """
    if model.device.type == "cpu":
        return min(25, max(1, 512**2 // size**2))
    picture = 2**30 * (size / 512) ** 2 * torch.empty(0, dtype=model.dtype).element_size() / 2
    return int(max(1, min(most, 0.8 * free_memory(model.device) / picture)))


# -------------------------------------------------------------------------------- embeddings


def learned_tokens(model):
    """The LearnedTokens patch of this model's text encoder, without any token yet."""
    return LearnedTokens(model.cond_stage_model)


def embedding_path(folder, token):
    """Where the embedding of a token is kept: <new1> in new1.safetensors, and no other token there."""
    bare = re.fullmatch("<.*>", token, re.DOTALL) is None
    name = urllib.parse.quote(token if bare else token[1:-1], safe="")
    return pathlib.Path(folder) / f"{'=' * bare}{name}.safetensors"


def load_embeddings(tokens, folder, wanted):
    """Adds those of the `wanted` tokens that the files of a folder have for this text encoder; returns the others.

    Takes every format that ldm reads, a bare tensor for the token that its file is named after, and .safetensors before
    others. A file learned with another text encoder is passed over, with a warning.
    """
    files = [p for p in pathlib.Path(folder).glob("*") if p.suffix in (".safetensors", ".pt", ".bin")]
    for path in sorted(files, key=lambda p: (p.suffix != ".safetensors", p)):
        named_after = [t for t in wanted if embedding_path(folder, t).stem == path.stem]
        vectors, metadata = read_embeddings(path, *named_after[:1])
        useful = [t for t in vectors if t in wanted and t not in tokens]
        if not useful:
            continue
        if metadata.get("base_model") not in (None, tokens.base_model):
            print(f"warning: {path}: learned with another text encoder; not used", file=sys.stderr)
            continue
        for token in useful:
            try:
                tokens.add(token, vectors[token], **metadata)
            except UserError as e:
                raise UserError(f"{path}: {e}") from None
    return [t for t in wanted if t not in tokens]


def embedding_id(tokens, prompt):
    """Sixteen hexadecimal digits of the learned vectors that a prompt uses."""
    digest = hashlib.sha256()
    for token in sorted(t for t in tokens.tokens if t in prompt):
        digest.update(token.encode() + tokens[token].detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
