"""The small Stable Diffusion's training set: captioned pictures, their words, and what of them is computed only once.

pictures = Pictures("runs/emoji")                   # emoji.npz and emoji.json of tools/make_emoji_dataset.py
pictures.caption(row)                               # "a dog face, in the style of Noto"
"""

from __future__ import annotations

import json
import pathlib
import zipfile

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from classifiers import Inception
from p3_clip import openai_clip
from utils import UserError, affine_grid, load_checkpoint, save_checkpoint, to_float

# What captions may say, and how: {subject} with its article, {style}. The first is the one of previews and benchmarks.
CAPTIONS = [
    "{subject}, in the style of {style}",
    "{subject} in the style of {style}",
    "a picture of {subject} in the style of {style}",
    "a photo of {subject}",
    "{subject}",
    "a picture in the style of {style}",
]
SHARES = torch.tensor([4.0, 2, 2, 1, 2, 1])  # how often the diffusion model hears each


class Pictures:
    """Captioned pictures: images uint8 [N, 3, 64, 64]; subject, vendor and split int64 [N], which index the lists
    subjects (with their article), vendors and splits."""

    def __init__(self, folder):
        folder = pathlib.Path(folder)
        try:
            with np.load(folder / "emoji.npz") as arrays:
                self.images = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2).contiguous()
                columns = (torch.from_numpy(arrays[k].astype(np.int64)) for k in ("subject", "vendor", "split"))
                self.subject, self.vendor, self.split = columns
            info = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
            self.subjects, self.vendors = [s["phrase"] for s in info["subjects"]], [v["name"] for v in info["vendors"]]
            self.splits = info["splits"]
        except (OSError, LookupError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as e:
            raise UserError(f"{folder}: no emoji.npz and emoji.json of tools/make_emoji_dataset.py ({e})") from None

    def rows(self, split):
        """Indices of the pictures of "train", "val", "subject" or "style"."""
        return torch.nonzero(self.split == self.splits.index(split))[:, 0]

    def caption(self, row, form=0):
        """The caption of a picture in one of the forms of CAPTIONS."""
        subject, style = self.subjects[self.subject[row]], self.vendors[self.vendor[row]]
        return CAPTIONS[form].format(subject=subject, style=style)

    def captions(self, rows):
        """Every caption of those pictures, once."""
        return list(dict.fromkeys(self.caption(r, f) for r in rows for f in range(len(CAPTIONS))))


def moved(x):
    """Images [B, C, H, W] in [-1, 1], each turned by up to 0.25 radians, shrunk or grown by a quarter and shifted by a
    tenth, on white."""
    turn, size, shift = ((torch.rand(len(x), k) * 2 - 1) * most for k, most in ((1, 0.25), (1, 0.25), (2, 0.2)))
    grid = affine_grid(x, turn[:, 0], 1 + size.expand(-1, 2), shift)
    return F.grid_sample(x - 1, grid, align_corners=False) + 1


def distorted(x):
    """Images [B, C, H, W] in [-1, 1], each moved, mirrored half of the time, in other colours (darker by up to 30 %, so
    below -1 too), and with a square of half the side blotted out at random: what leaves subject and style to be seen,
    so that a CLIP learns these rather than the pictures."""
    b, _, h, w = x.shape
    x = moved(x)
    x = torch.where(torch.rand(b, 1, 1, 1, device=x.device) < 0.5, x.flip(-1), x)
    contrast, colour = (torch.rand(b, c, 1, 1, device=x.device) * 2 - 1 for c in (1, 3))
    x = 1 - (1 - x) * (1 + 0.2 * contrast + 0.1 * colour)  # white stays
    top, left = (torch.rand(2, b, 1, 1, 1, device=x.device) * 1.5 - 0.25).unbind(0)
    down, right = torch.linspace(0, 1, h, device=x.device)[:, None], torch.linspace(0, 1, w, device=x.device)
    blot = ((down - top).abs() < 0.25) & ((right - left).abs() < 0.25)
    return torch.where(blot, 1.0, x)


def restyled(x):
    """Images [B, 3, H, W] in [-1, 1], each in greys, in other colours, as lines or as a glyph, at random: what leaves
    the subject to be seen, and not the style."""
    gains = 0.4 + torch.rand(len(x), 3, 1, 1, device=x.device)
    grey, recoloured = x.mean(1, keepdim=True), 1 - (1 - x.roll(1, 1)) * gains
    glyph = torch.where(grey < (grey.mean((2, 3), keepdim=True) + 0.2).clamp(max=0.9), -1.0, 1.0)
    kinds = torch.stack([y.expand_as(x) for y in (grey, recoloured, outlines(x), glyph)])
    return kinds[torch.randint(4, (len(x),), device=x.device), torch.arange(len(x), device=x.device)]


def outlines(x):
    """Black where the slightly blurred image [B, 3, H, W] changes in any colour, white elsewhere: [B, 1, H, W]."""
    x = F.avg_pool2d(F.pad(x, [1] * 4, mode="replicate"), 3, 1)
    down, right = F.pad(x.diff(dim=2), [0, 0, 0, 1]), F.pad(x.diff(dim=3), [0, 1])
    return 1 - (6 * (down**2 + right**2).sum(1, keepdim=True).sqrt()).clamp(max=2)


class Words:
    """The words (tokens of CLIP's vocabulary) of some captions, numbered anew in their order.

    ids [V] are their numbers in the whole vocabulary; the start and the end of a text are among them. `length` is that
    of the longest caption, at most as asked.
    """

    def __init__(self, captions, length):
        self.length = length
        tokens = self.tokens(captions)
        self.ids, self.length = tokens.unique(), int((tokens > 0).sum(1).max())

    def tokens(self, captions):
        return openai_clip.tokenize(captions, context_length=self.length, truncate=True)

    def __call__(self, captions):
        """New numbers [B, length]."""
        return torch.searchsorted(self.ids, self.tokens(captions))


def cache_sight(images, path, device, most=512):
    """What Inception sees in images uint8 [N, 3, H, W], as directions [N, S]: its features along at most `most` of
    their principal components, each divided by the root of its deviation. Read from `path` if it has as many, or
    computed and written there."""
    sight = load_checkpoint(path)["sight"].float() if path.is_file() else images[:0]
    if len(sight) == len(images):
        return sight
    features = torch.from_numpy(Inception(device)(images))
    features -= features.mean(0)
    _, scale, axes = torch.linalg.svd(features, full_matrices=False)
    sight = F.normalize(features @ axes[:most].T / scale[:most].clamp(min=1e-6).sqrt(), dim=1)
    save_checkpoint({"sight": sight.half()}, path)
    return sight


@torch.no_grad()
def cache_latents(autoencoder, images):
    """Mean and deviation of the latents of each picture: half [N, 2, 4, h, w]."""
    cached = []
    for part in tqdm(images.split(64), "latents", leave=False):
        posterior = autoencoder.encode(to_float(part.to(autoencoder.quant_conv.weight.device)))
        cached.append(torch.stack([posterior.mean, posterior.std], dim=1).half().cpu())
    return torch.cat(cached)
