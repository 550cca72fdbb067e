"""Encoder and decoder of the autoencoder (Esser et al. 2021, without their attention but in the middle)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from ldm.modules.attention import attention


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels, out_channels, dropout=0.0):
        super().__init__()
        self.norm1, self.conv1 = norm(in_channels), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2, self.conv2 = norm(out_channels), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.nin_shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head attention among the pixels of [B, C, H, W]."""

    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).mT[:, None] for layer in (self.q, self.k, self.v))  # [B, 1, H*W, C]
        h = attention(q, k, v)[:, 0].mT.unflatten(2, x.shape[2:])
        return x + self.proj_out(h)


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # only to the right and below, as the weights were trained


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    def __init__(self, c, dropout):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = ResnetBlock(c, c, dropout), AttnBlock(c), ResnetBlock(c, c, dropout)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """Residual blocks at one resolution, then the way to the next one."""

    def __init__(self, blocks, **resample):
        super().__init__()
        self.block = nn.ModuleList(blocks)
        for name, layer in resample.items():  # "upsample" or "downsample", as checkpoints have it
            self.add_module(name, layer)

    def forward(self, x):
        for layer in [*self.block, *list(self.children())[1:]]:
            x = layer(x)
        return x


class Encoder(nn.Module):
    """Image [B, in_channels, H, W] in [-1, 1] -> moments [B, 2 * z_channels, H/f, W/f], f = 2^(levels - 1)."""

    def __init__(self, ch, ch_mult, num_res_blocks, in_channels, z_channels, double_z=True, dropout=0.0, **unused):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        c = ch
        for level, width in enumerate(m * ch for m in ch_mult):
            blocks = [ResnetBlock(width if i else c, width, dropout) for i in range(num_res_blocks)]
            c = width
            self.down.append(Level(blocks, **({"downsample": Downsample(c)} if level < len(ch_mult) - 1 else {})))
        self.mid = Middle(c, dropout)
        self.norm_out = norm(c)
        self.conv_out = nn.Conv2d(c, 2 * z_channels if double_z else z_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        h = self.mid(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latent [B, z_channels, h, w] -> image [B, out_ch, h*f, w*f], about in [-1, 1]."""

    def __init__(self, ch, ch_mult, num_res_blocks, out_ch, z_channels, dropout=0.0, **unused):
        super().__init__()
        c = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, c, 3, padding=1)
        self.mid = Middle(c, dropout)
        levels = []
        for level, width in reversed(list(enumerate(m * ch for m in ch_mult))):
            blocks = [ResnetBlock(width if i else c, width, dropout) for i in range(num_res_blocks + 1)]
            c = width
            levels.insert(0, Level(blocks, **({"upsample": Upsample(c)} if level > 0 else {})))
        self.up = nn.ModuleList(levels)  # numbered from the image inwards, run from the latent outwards
        self.norm_out = norm(c)
        self.conv_out = nn.Conv2d(c, out_ch, 3, padding=1)

    def forward(self, z):
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))
