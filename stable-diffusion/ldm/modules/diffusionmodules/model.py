"""Encoder and decoder of the autoencoder (Esser et al. 2021, without their attention but in the middle)."""

import torch.nn.functional as F
from torch import nn

from ldm.modules.attention import attention, named


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


def conv3(c_in, c_out, **options):
    return nn.Conv2d(c_in, c_out, 3, **{"padding": 1, **options})


class ResnetBlock(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.norm1, self.conv1 = norm(in_channels), conv3(in_channels, out_channels)
        self.norm2, self.conv2 = norm(out_channels), conv3(out_channels, out_channels)
        self.nin_shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


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


def downsample(c):
    """Half the size; padded only to the right and below, as the weights were trained."""
    return named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=conv3(c, c, stride=2, padding=0))


def upsample(c):
    return named(twice=nn.Upsample(scale_factor=2.0, mode="nearest"), conv=conv3(c, c))


def middle(c):
    return named(block_1=ResnetBlock(c, c), attn_1=AttnBlock(c), block_2=ResnetBlock(c, c))


def level(c_in, c_out, blocks, **resample):
    """Residual blocks at one resolution, then the way to the next one, upsample or downsample."""
    blocks = [ResnetBlock(c_out if i else c_in, c_out) for i in range(blocks)]
    return named(block=nn.Sequential(*blocks), **{name: make(c_out) for name, make in resample.items()})


class Encoder(nn.Module):
    """Image [B, in_channels, H, W] in [-1, 1] -> moments [B, 2 * z_channels, H/f, W/f], f = 2^(levels - 1)."""

    def __init__(self, ch, ch_mult, num_res_blocks, in_channels, z_channels, double_z=True, **unused):
        super().__init__()
        c, levels = ch, []
        self.conv_in = conv3(in_channels, c)
        for i, width in enumerate(m * ch for m in ch_mult):
            way = {"downsample": downsample} if i < len(ch_mult) - 1 else {}
            levels.append(level(c, width, num_res_blocks, **way))
            c = width
        self.down, self.mid, self.norm_out = nn.Sequential(*levels), middle(c), norm(c)
        self.conv_out = conv3(c, 2 * z_channels if double_z else z_channels)

    def forward(self, x):
        return self.conv_out(F.silu(self.norm_out(self.mid(self.down(self.conv_in(x))))))


class Decoder(nn.Module):
    """Latent [B, z_channels, h, w] -> image [B, out_ch, h*f, w*f], about in [-1, 1]."""

    def __init__(self, ch, ch_mult, num_res_blocks, out_ch, z_channels, **unused):
        super().__init__()
        c, levels = ch * ch_mult[-1], []
        self.conv_in, self.mid = conv3(z_channels, c), middle(c)
        for i, width in reversed(list(enumerate(m * ch for m in ch_mult))):
            way = {"upsample": upsample} if i > 0 else {}
            levels.append(level(c, width, num_res_blocks + 1, **way))
            c = width
        self.up = nn.ModuleList(reversed(levels))  # numbered from the image inwards, run from the latent outwards
        self.norm_out, self.conv_out = norm(c), conv3(c, out_ch)

    def forward(self, z):
        h = self.mid(self.conv_in(z))
        for blocks in reversed(self.up):
            h = blocks(h)
        return self.conv_out(F.silu(self.norm_out(h)))
