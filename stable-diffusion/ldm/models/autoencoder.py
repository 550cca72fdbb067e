"""The autoencoder between images and latents (Rombach et al. 2022, section 3.1)."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import free_memory

TILE, OVERLAP = 64, 16  # of the tiled decoder, in latent pixels


class AutoencoderKL(nn.Module):
    """encode: images [B, 3, H, W] in [-1, 1] -> posterior over [B, embed_dim, H/f, W/f]; decode: the way back.
    One image at a time: that bounds memory and keeps a picture independent of its batch. `training`, what configs say
    on it (lossconfig, monitor ...), is not used."""

    def __init__(self, ddconfig, embed_dim, **training):
        super().__init__()
        self.encoder, self.decoder = Encoder(**ddconfig), Decoder(**ddconfig)
        self.embed_dim, z_channels = embed_dim, ddconfig["z_channels"]
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)
        self.factor = 2 ** (len(ddconfig["ch_mult"]) - 1)
        self.widest = ddconfig["ch"] * max(ddconfig["ch_mult"][:2])  # channels of the largest feature map

    def encode(self, x):
        moments = torch.cat([self.quant_conv(self.encoder(image)) for image in x.split(1)])
        return DiagonalGaussianDistribution(moments.float())

    def decode(self, z, tiled=None):
        """Latents [B, embed_dim, h, w] -> images; `tiled` None: in tiles only where memory is short."""
        if tiled is None:  # decoding one image takes about six of the largest feature maps at once
            size = 6 * self.widest * z.shape[2] * z.shape[3] * self.factor**2 * z.element_size()
            tiled = size > 0.9 * free_memory(z.device)
        decode = self._decode_tiled if tiled else self._decode_whole
        return torch.cat([decode(latent) for latent in z.split(1)])

    def _decode_whole(self, z):
        return self.decoder(self.post_quant_conv(z))

    def _decode_tiled(self, z):
        """Tiles of 64 x 64 latents that overlap by 16, blended linearly: the memory of one tile for any size."""
        starts = [sorted({*range(0, n - TILE, TILE - OVERLAP), max(0, n - TILE)}) for n in z.shape[2:]]
        height, width = (n * self.factor for n in z.shape[2:])
        image = weight = 0
        for y, x in itertools.product(*starts):
            tile = self._decode_whole(z[:, :, y : y + TILE, x : x + TILE]).float()
            rows, columns = (_ramp(size, self.factor).to(tile.device) for size in tile.shape[2:])
            ramp, left, top = rows[:, None] * columns, x * self.factor, y * self.factor
            around = left, width - left - len(columns), top, height - top - len(rows)
            image, weight = image + F.pad(tile * ramp, around), weight + F.pad(ramp, around)
        return (image / weight).to(z.dtype)


def _ramp(size, factor):
    """Weights of a tile's pixels: rising over the overlap at both ends, 1 between."""
    distance = torch.arange(size).add(0.5)
    return torch.minimum(distance, size - distance).div(OVERLAP * factor).clamp(max=1.0)
