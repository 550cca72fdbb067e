"""Stable Diffusion as Problem 3 uses it: loading, learned embeddings on disk, pictures of a prompt.

model = load_stable_diffusion("model.ckpt", device, torch.float16)
pictures = generate(model, "A photo of a dog", range(4))         # uint8 [4, 3, 512, 512]
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
import sys
import urllib.parse

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from utils import UserError, atomic, digest, is_finite, load_checkpoint  # isort: skip  puts ldm on the path
from utils import noise_stream, reuse_freed_memory, to_uint8, whole  # isort: skip

from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.modules.textual_inversion import LearnedTokens, fingerprint, read_embeddings
from ldm.util import free_memory, load_model

ROOT = pathlib.Path(__file__).resolve().parent


def add_model_options(parser):
    """What both scripts of Textual Inversion ask about the model."""
    parser.add_argument("--config", help="the model's YAML (default: what the checkpoint names, else v1-inference)")
    size = "side of a picture, a multiple of 64 (default: the model's own)"
    parser.add_argument("--size", type=whole(64, 4096, 64), help=size)


def load_stable_diffusion(ckpt, device, dtype, config=None):
    """The frozen LatentDiffusion of a checkpoint in CompVis's layout, network and autoencoder in `dtype`."""
    reuse_freed_memory()
    return load_model(config, ckpt, device, dtype)


def own_size(model):
    """The side in pixels of the pictures that a model was trained on: 512 for Stable Diffusion v1."""
    return model.image_size * model.first_stage_model.factor


def generate(model, prompts, indices, steps=25, scale=7.5, size=None, seed=0, fast=False, pag=0.0):
    """Pictures uint8 [len(indices), 3, size, size] of one prompt, or of a list with one for each: DPM-Solver++(2M),
    to x_0 itself, guidance scale `scale`; `fast` does half the work, `pag` shapes objects (ldm's sampling.py says how).

    Picture i starts from the noise of the seed `seed + i`, the same in any batch but for rounding: float32
    may differ by one level of 255 with the size of the batch.
    """
    latents = latents_of(model, prompts, indices, steps, scale, size, seed, fast, pag)
    return to_uint8(model.decode_first_stage(latents)).cpu()


@torch.no_grad()
def latents_of(model, prompts, indices, steps=25, scale=7.5, size=None, seed=0, fast=False, pag=0.0):
    """`generate` before it decodes: latents of unit variance, float32 [len(indices), 4, h, w] on the model's device."""
    side = (size or own_size(model)) // model.first_stage_model.factor
    shape = [model.channels, side, side]
    cond, uncond = model.get_learned_conditioning(prompts), model.get_learned_conditioning("")
    x_T = noise_stream(seed, indices, shape)()
    options = {"unconditional_guidance_scale": scale, "unconditional_conditioning": uncond, "fast": fast, "pag": pag}
    *_, (_, _, x_0) = DPMSolverSampler(model).trajectory(steps, len(indices), shape, cond, x_T=x_T, **options)
    return x_0  # where `sample` ends, at t = 0, latents keep 3 % of noise


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
    files = [p for p in pathlib.Path(folder).glob("[!.]*") if p.suffix in (".safetensors", ".pt", ".bin")]
    for path in sorted(files, key=lambda p: (p.suffix != ".safetensors", p)):
        named_after = [t for t in wanted if embedding_path(folder, t).stem == path.stem]
        vectors, metadata = read_embeddings(path, *named_after[:1])
        useful = [t for t in vectors if t in wanted and t not in tokens]
        if not useful:
            continue
        if metadata.get("base_model") not in (None, tokens.base_model):
            print(f"warning: {path}: learned with another text encoder; not used", file=sys.stderr)
            continue
        add_tokens(tokens, {t: vectors[t] for t in useful}, path, **metadata)
    return [t for t in wanted if t not in tokens]


def need_embeddings(tokens, folder, wanted):
    """load_embeddings of those of `wanted` that are not there yet; UserError where one has none."""
    missing = load_embeddings(tokens, folder, [t for t in wanted if t not in tokens])
    if missing:
        raise UserError(f"{folder}: {missing[0]} has no embedding for this model; p3_textual_inversion.py trains it")


def add_tokens(tokens, vectors, path, **metadata):
    """Adds the tokens of a file to those of a model; UserError, naming the file, where they do not fit."""
    for token, v in vectors.items():
        own = {k: m[token] if isinstance(m, dict) and token in m else m for k, m in metadata.items()}
        try:
            tokens.add(token, v, **own)
        except UserError as e:
            raise UserError(f"{path}: {e}") from None


def embedding_id(tokens, prompt):
    """Sixteen hexadecimal digits of the learned vectors that a prompt uses."""
    named = hashlib.sha256()
    for token in sorted(t for t in tokens.tokens if t in prompt):
        named.update(token.encode() + tokens[token].detach().float().cpu().numpy().tobytes())
    return named.hexdigest()[:16]


# -------------------------------------------------------------------------------- deltas of p3_custom_diffusion.py

DELTA = "custom_diffusion"  # the one entry of __metadata__


def keys_and_values(model):
    """{name: matrix [channels, width of the text encoder]} of all that read the prompt in the network: to_k and to_v of
    its cross-attention."""
    wanted = "attn2.to_k.weight", "attn2.to_v.weight"
    return {name: p for name, p in model.named_parameters() if name.endswith(wanted)}


def model_id(model):
    """Tells this model's text encoder and network from others, in any precision: rounding leaves signs as they are."""
    signs = digest(p.half() > 0 for p in list(model.model.parameters())[-2:])
    return f"{fingerprint(model.cond_stage_model.transformer)} {signs}"


def save_delta(path, model, vectors, captions, differences):
    """Writes what a training or a merge adds to a model, as safetensors: differences of keys_and_values, {name: half},
    and {token: vectors}; in the header the model_id and {token: the texts that it was trained with, {} for it}."""
    content = {token: v.detach().float().cpu().clone() for token, v in vectors.items()}
    told = json.dumps({"model": model_id(model), "captions": captions}, sort_keys=True)
    with atomic(path) as temporary:
        temporary.write_bytes(to_bytes({**differences, **content}, {DELTA: told}))


def read_delta(path, model):
    """(vectors, captions, differences) as save_delta got them; UserError for another file, or that of another model."""
    content, matrices = load_checkpoint(path), keys_and_values(model)
    try:
        with safe_open(str(path), "pt") as file:
            told = json.loads(file.metadata()[DELTA])
        same, captions = told["model"] == model_id(model), told["captions"]
        vectors = {token: content[token] for token in captions}
        differences = {name: content[name] for name in matrices if same}
        if not all(texts and all(isinstance(text, str) for text in texts) for texts in captions.values()):
            raise TypeError
    except (SafetensorError, LookupError, TypeError, ValueError, AttributeError, RecursionError):
        raise UserError(f"{path}: not a delta as p3_custom_diffusion.py writes them; train it again") from None
    if not same or any(d.shape != matrices[name].shape for name, d in differences.items()):
        raise UserError(f"{path}: a delta of another model; give the --ckpt that it was trained on, or train it again")
    if not all(map(is_finite, differences.values())):
        raise UserError(f"{path}: has NaN or infinity in it; train it again")
    return vectors, captions, differences


def load_delta(model, tokens, path):
    """Adds a delta's differences and tokens to a model. Returns sixteen hexadecimal digits that name its content."""
    vectors, _, differences = read_delta(path, model)
    add_tokens(tokens, vectors, path)
    for name, p in keys_and_values(model).items():
        p.data = (p.data.float() + differences[name].to(p.device)).to(p.dtype)
    return digest([*vectors.values(), *differences.values()])
