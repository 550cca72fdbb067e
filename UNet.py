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
# The digit is the resolution, 0 being the picture's; the sizes of the maps are those of a 256x256 picture.
#       256x256        128x128     64x64       32x32       16x16       8x8
DOWN = "Stem0 R0 R0 D0  R1 R1 D1    R2 R2 D2    R3 R3 D3    A4 A4 D4    R5 R5".split()
MID = "A5 R5".split()
UP = "R5 R5 R5 U5  A4 A4 A4 U4  R3 R3 R3 U3  R2 R2 R2 U2  R1 R1 R1 U1  R0 R0 R0".split()
#     8x8          16x16        32x32        64x64        128x128      256x256


# fmt: off
COURSE = {  # the course's constructor arguments, with the values of UNet.pt
    "in_channel": 3, "n_res_blocks": 2, "attn_strides": [16], "attn_heads": 1, "use_affine_time": False, "dropout": 0,
    "fold": 1,
}
# fmt: on
MULTIPLIER = 1, 1, 2, 2, 4, 4  # the widths of UNet.pt, by resolution, in units of `channel`


class UNet(nn.Module):
    """x_t [B, 3, H, W] and time int64 [B] -> the predicted noise eps (or v: `objective`) [B, 3, H, W].

    `channel` is the width of the largest map, a multiple of 4 that its groups divide, and `channel_multiplier` are the
    six resolutions' widths in units of it; 128 and MULTIPLIER are the course's network. Its further arguments (see
    COURSE) may only have the values that the weights of UNet.pt are for.
    """

    objective = "eps"  # what it predicts; load_unet makes it "v" where the checkpoint says so

    def __init__(self, in_channel=3, channel=128, channel_multiplier=MULTIPLIER, **course):
        super().__init__()
        for name, value in {"in_channel": in_channel, **course}.items():
            if name not in COURSE or (list(value) if isinstance(value, tuple) else value) != COURSE[name]:
                raise ValueError(f"UNet: {name}={value!r} is not the architecture of UNet.pt, the only one here")
        if len(channel_multiplier) != 6 or not all(type(m) is int and 0 < m <= 16 for m in channel_multiplier):
            raise ValueError(f"channel_multiplier {channel_multiplier}: take six whole numbers from 1 to 16")
        self.channel, self.channel_multiplier = channel, tuple(channel_multiplier)
        groups, c_time = norm_groups(channel), 4 * channel
        self.time = nn.Sequential(
            TimeEmbedding(channel), nn.Linear(channel, c_time), nn.SiLU(), nn.Linear(c_time, c_time)
        )
        c, skips = 3, []  # width so far; widths of the skips, one for every layer on the way down
        self.path = []  # names of the layers in the order of forward()
        for part, layers in (("down", DOWN), ("mid", MID), ("up", UP)):
            for i, layer in enumerate(layers, start=1):
                kind, c_out = layer[:-1], channel_multiplier[int(layer[-1])] * channel
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
        if tuple(stem.shape[1:]) != (3, 3, 3) or not 0 < len(stem) <= 512:
            raise ValueError("it must be [up to 512, 3, 3, 3]")
        unet = UNet(channel=len(stem), channel_multiplier=_multiplier(state_dict, len(stem)))
    except ValueError as e:
        raise UserError(f"{path}: no down1.weight of the face network ({e}); it is of another network") from None
    unet.objective = objective
    return load_weights(unet, state_dict, path).eval()


def _multiplier(state_dict, channel):
    """channel_multiplier of a state dict, by the last block of each resolution on the way down; where that says nothing
    sensible, something else that its shapes will not fit: load_weights names them."""
    multiplier = list(MULTIPLIER)
    for i, layer in enumerate(DOWN, start=1):
        bias = state_dict.get(f"down{i}.resblocks.conv2.bias")
        if bias is not None:
            multiplier[int(layer[-1])] = min(max(1, bias.numel() // channel), 16, 2048 // channel)
    return multiplier


@torch.no_grad()
def widened(unet, channel_multiplier, noise=0.2):
    """A copy of a UNet, wider by its multiplier, that predicts nearly the same: Net2WiderNet (Chen et al. 2016).

    The channels of a layer are repeated in their order, so that they stay in their groups; what reads a channel that
    is there n times weighs each by 1/n. So that copies can part, weights that are new get normal noise, `noise` times
    the deviation of their layer's. Raises UserError for a multiplier that has no room for a layer of the old network.
    """
    if any(new < old for new, old in zip(channel_multiplier, unet.channel_multiplier)):
        raise UserError(f"multiplier {channel_multiplier}: narrower than {unet.channel_multiplier}, where it starts")
    wide = UNet(channel=unet.channel, channel_multiplier=channel_multiplier)
    wide.time.load_state_dict(unet.time.state_dict())
    emb = torch.arange(4 * unet.channel)

    def fill(new, old, made, read=None):  # made, read: of each channel that comes out and goes in, its number in old
        weight = old.weight[made]
        if read is not None:
            weight = weight[:, read] / read.bincount()[read].view(1, -1, *[1] * (weight.dim() - 2))
            if weight.shape != old.weight.shape:
                weight += noise * weight.std() * torch.randn_like(weight)
        new.weight.copy_(weight), new.bias.copy_(old.bias[made])

    here, skips = torch.arange(3), []  # numbers in the old network of the channels so far, and those of the skips
    for name, layer in zip(unet.path, DOWN + MID + UP):
        new, old = getattr(wide, name), getattr(unet, name)
        wider, width = (net.channel_multiplier[int(layer[-1])] * net.channel for net in (wide, unet))
        made = torch.tensor([i * width // wider for i in range(wider)])
        if not isinstance(old, Block):
            fill(*((new, old) if layer[0] == "S" else (new[-1], old[-1])), made, here)
        else:
            if name.startswith("up"):
                here = torch.cat([here, int(here.max()) + 1 + skips.pop()])
            n, o = new.resblocks, old.resblocks
            fill(n.norm1, o.norm1, here)
            fill(n.conv1, o.conv1, made, here)
            fill(n.time[1], o.time[1], made, emb)
            fill(n.norm2, o.norm2, made)
            fill(n.conv2, o.conv2, made, made)
            if isinstance(o.skip, nn.Conv2d) and isinstance(n.skip, nn.Identity):
                raise UserError(f"multiplier {channel_multiplier}: {name} must go on changing the width, as it did")
            if isinstance(n.skip, nn.Conv2d):
                fill(n.skip, _identity(width) if isinstance(o.skip, nn.Identity) else o.skip, made, here)
            if old.attention is not None:
                n, o = new.attention, old.attention
                fill(n.norm, o.norm, made)
                fill(n.qkv, o.qkv, torch.cat([made, width + made, 2 * width + made]), made)
                for part in (n.qkv.weight, n.qkv.bias):  # q k^T grows with the width, sqrt(c) less
                    part[: 2 * wider] *= (width / wider) ** 0.25
                fill(n.out, o.out, made, made)
        here = made
        if name.startswith("down"):
            skips.append(made)
    fill(wide.out[0], unet.out[0], here)
    fill(wide.out[2], unet.out[2], torch.arange(3), here)
    return wide


def _identity(c):
    """A convolution that gives back its c channels: what nn.Identity would be with weights."""
    layer = _zero(nn.Conv2d(c, c, 1))
    nn.init.dirac_(layer.weight)
    return layer
