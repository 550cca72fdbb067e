"""The face U-Net of Problem 2: DDPM's for 256x256 CelebA-HQ (Ho et al. 2020, appendix B), as in UNet.pt.

model = UNet().eval()                       # 113.7 M parameters; UNet(channel=32) is the same, narrower: 7.1 M
model.load_state_dict(load_checkpoint("hw2_data/face/UNet.pt"))
eps = model(x_t, t)                         # [B, 3, H, W] in and out, multiples of 32; t int64 [B], 0 .. 999
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from utils import UserError, attention, load_checkpoint, load_weights

# The architecture, layer by layer. The keys number the layers of DOWN, MID and UP from 1: down1 ... mid1 ... up23.
# Stem: the first convolution. R: residual block. A: residual block with attention. D: half the size. U: twice the size.
# The digit is the width that comes out, in units of `channel`. The sizes of the maps are those of a 256x256 picture.
#       256x256        128x128     64x64       32x32       16x16       8x8
DOWN = "Stem1 R1 R1 D1  R1 R1 D1    R2 R2 D2    R2 R2 D2    A4 A4 D4    R4 R4".split()
MID = "A4 R4".split()
UP = "R4 R4 R4 U4  A4 A4 A4 U4  R2 R2 R2 U2  R2 R2 R2 U2  R1 R1 R1 U1  R1 R1 R1".split()
#     8x8          16x16        32x32        64x64        128x128      256x256


# fmt: off
COURSE = {  # the course's constructor arguments, with the values of UNet.pt
    "in_channel": 3, "channel_multiplier": [1, 1, 2, 2, 4, 4], "n_res_blocks": 2, "attn_strides": [16], "attn_heads": 1,
    "use_affine_time": False, "dropout": 0, "fold": 1,
}
# fmt: on


class UNet(nn.Module):
    """x_t [B, 3, H, W] and time int64 [B] -> the predicted noise eps (or v: `objective`) [B, 3, H, W].

    `channel` is the width of the largest map, a multiple of 4 that its groups divide; 128 is the course's network. Its
    further arguments (see COURSE) may only have the values that the weights of UNet.pt are for.
    """

    objective = "eps"  # what it predicts; load_unet makes it "v" where the checkpoint says so

    def __init__(self, in_channel=3, channel=128, **course):
        super().__init__()
        for name, value in {"in_channel": in_channel, **course}.items():
            if name not in COURSE or (list(value) if isinstance(value, tuple) else value) != COURSE[name]:
                raise ValueError(f"UNet: {name}={value!r} is not the architecture of UNet.pt, the only one here")
        groups, c_time = norm_groups(channel), 4 * channel
        self.time = nn.Sequential(
            TimeEmbedding(channel), nn.Linear(channel, c_time), nn.SiLU(), nn.Linear(c_time, c_time)
        )
        c, skips = 3, []  # width so far; widths of the skips, one for every layer on the way down
        self.path = []  # names of the layers in the order of forward()
        for part, layers in (("down", DOWN), ("mid", MID), ("up", UP)):
            for i, layer in enumerate(layers, start=1):
                kind, c_out = layer[:-1], int(layer[-1]) * channel
                c_in = c + skips.pop() if part == "up" and kind != "U" else c
                if kind == "Stem":
                    module = nn.Conv2d(c_in, c_out, 3, padding=1)
                elif kind == "D":
                    module = nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride=2, padding=1))
                elif kind == "U":
                    module = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(c_in, c_out, 3, padding=1))
                else:
                    module = Block(c_in, c_out, c_time, groups, attention=kind == "A")
                self.add_module(f"{part}{i}", module)
                self.path.append(f"{part}{i}")
                c = c_out
                if part == "down":
                    skips.append(c)
        self.out = nn.Sequential(nn.GroupNorm(groups, c), nn.SiLU(), nn.Conv2d(c, 3, 3, padding=1))
        _zero(self.out[2])

    def forward(self, x, time):
        if x.shape[-1] % 32 or x.shape[-2] % 32:
            raise ValueError(f"a picture of {x.shape[-2]}x{x.shape[-1]}: height and width must be multiples of 32")
        emb = self.time[1:](self.time[0](time).to(x.dtype))  # [B, 4 channel]
        skips = []
        for name in self.path:
            layer = getattr(self, name)
            if name.startswith("up") and isinstance(layer, Block):
                x = torch.cat([x, skips.pop()], dim=1)
            x = layer(x, emb) if isinstance(layer, Block) else layer(x)
            if name.startswith("down"):
                skips.append(x)
        return self.out[2](silu(self.out[0](x)))


def norm_groups(channel):
    """Groups of every group norm: the course's 32 from 128 channels on, below that as many as keep 16 channels each.

    In a group of its own, a channel would lose the time projection, a constant, to the very next norm; and gradients of
    groups of 16 take a CPU a third of the time that groups of 4 take.
    """
    groups = 32 if channel >= 128 else max(1, channel // 16)
    if channel < 4 or channel % 4 or channel % groups:
        raise ValueError(f"channel {channel}: take a multiple of 16 below 128, of 32 above")
    return groups


class TimeEmbedding(nn.Module):
    """[sin, cos](t * 10000^(-2i/dim)), i = 0 .. dim/2 - 1 (Vaswani et al. 2017, section 3.5): int64 [B] -> [B, dim].
    `persistent`: whether state dicts have its frequencies, as the course's do."""

    def __init__(self, dim, persistent=True):
        super().__init__()
        i = torch.arange(dim // 2, dtype=torch.float32)
        self.register_buffer("inv_freq", torch.exp(-math.log(10000) * 2 * i / dim), persistent=persistent)

    def forward(self, t):
        angle = t[:, None].float() * self.inv_freq
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class Block(nn.Module):
    """A residual block, and attention after it where there is some; only to give the keys their names."""

    def __init__(self, c_in, c_out, c_time, groups, attention):
        super().__init__()
        self.resblocks = ResBlock(c_in, c_out, c_time, groups)
        self.attention = Attention(c_out, groups) if attention else None

    def forward(self, x, emb):
        x = self.resblocks(x, emb)
        return x if self.attention is None else self.attention(x)


class ResBlock(nn.Module):
    """skip(x) + conv2(silu(norm2(conv1(silu(norm1(x))) + time(emb)))); x [B, c_in, H, W] -> [B, c_out, H, W]."""

    def __init__(self, c_in, c_out, c_time, groups):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(c_time, c_out))
        self.norm2, self.conv2 = nn.GroupNorm(groups, c_out), _zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(silu(self.norm1(x)))
        h += self.time(emb)[:, :, None, None]  # in place: at 256x256 memory traffic is a tenth of the time,
        h = self.conv2(silu(self.norm2(h)))  # and no gradient needs a convolution's output
        h += self.skip(x)
        return h


class Attention(nn.Module):
    """x + out(softmax(q k^T / sqrt(c)) v) over all positions, in one head of c channels: [B, c, H, W], in and out."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm, self.qkv, self.out = nn.GroupNorm(groups, c), nn.Conv2d(c, 3 * c, 1), _zero(nn.Conv2d(c, c, 1))

    def forward(self, x):
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=2)  # [B, HW, c] each
        mixed = attention(q, k, v)
        return x + self.out(mixed.transpose(1, 2).view(b, c, h, w))


def silu(x):
    """SiLU, in the place of a tensor that nobody else reads, unless gradients need it."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def _zero(layer):
    """Zeroes the last layer of a residual branch, so that training starts from the identity (DDPM's initialisation)."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def load_unet(path):
    """UNet in eval mode, as wide as the file: a bare state dict, like the course's UNet.pt, or {state_dict, config}.

    Its objective is eps unless the config has another. Raises UserError, in one line, for a file that is no checkpoint,
    for another objective, and for a missing, foreign or misshapen key.
    """
    state_dict, config = load_checkpoint(path), {}
    if isinstance(state_dict, dict) and isinstance(state_dict.get("state_dict"), dict):
        state_dict, config = state_dict["state_dict"], state_dict.get("config", {})
    if not isinstance(state_dict, dict) or not all(torch.is_tensor(v) for v in state_dict.values()):
        raise UserError(f"{path}: no state dict in it; give the course's UNet.pt or a checkpoint of p2_train.py")
    objective = config.get("objective", "eps") if isinstance(config, dict) else "eps"
    if objective not in ("eps", "v"):
        raise UserError(f"{path}: its objective is {objective!r}, not eps or v; it is of another program")
    stem = state_dict.get("down1.weight", torch.empty(0))
    try:
        if tuple(stem.shape[1:]) != (3, 3, 3) or len(stem) > 512:
            raise ValueError("it must be [up to 512, 3, 3, 3]")
        unet = UNet(channel=len(stem))
        unet.objective = objective
    except ValueError as e:
        raise UserError(f"{path}: no down1.weight of the face network ({e}); it is of another network") from None
    return load_weights(unet, state_dict, path).eval()
