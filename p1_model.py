"""The network of Problem 1: a small U-Net for 28x28 digits, conditional on time, digit and domain.

model = DigitUNet()
v = model(x_t, t, digit, domain)            # [B, 3, 28, 28] in and out, int64 [B] each; digit 10 = no digit
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

import utils
from classifiers import predict
from diffusion import ddim, ddpm, dpm_solver_pp, eps_from_v, guided, schedule, time_batch, timesteps
from digits import DOMAINS
from UNet import TimeEmbedding
from utils import UserError

NO_DIGIT = 10
GUIDANCE = [7.0, 4.0]  # scales that ship, of MNIST-M and of SVHN, which loses its variety sooner
CONFIG = {  # what a checkpoint may say
    "channels": range(16, 1025, 16),
    "deep": range(64, 1025, 64),
    "T": [1000],
    "schedule": ["linear", "cosine"],
    "objective": ["eps", "v"],
}


class ResBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))) * (1 + scale) + shift)), scale and shift from the condition (Dhariwal &
    Nichol 2021)."""

    def __init__(self, c_in, c_out, c_emb):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(c_in // 16, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(c_emb, 2 * c_out)
        self.norm2, self.conv2 = nn.GroupNorm(c_out // 16, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))


class Attention(nn.Module):
    """x + self-attention over all positions, 64 channels a head; plain softmax, as 49 positions need no more."""

    def __init__(self, c):
        super().__init__()
        self.heads = c // 64
        self.norm, self.qkv, self.out = nn.GroupNorm(c // 16, c), nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x, emb):
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w)
        q, k, v = qkv.unbind(1)  # [B, heads, 64, HW]
        weight = (q.transpose(2, 3) @ k * (c // self.heads) ** -0.5).softmax(-1)  # [B, heads, HW, HW]
        return x + self.out((v @ weight.transpose(2, 3)).reshape(b, c, h, w))


class Up(nn.Conv2d):
    """Doubles the size: nearest neighbour, then a convolution."""

    def __init__(self, c_in, c_out):
        super().__init__(c_in, c_out, 3, padding=1)

    def forward(self, x):
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class DigitUNet(nn.Module):
    """x_t [B, 3, 28, 28], t, digit (0..9, 10 = none) and domain (0 MNIST-M, 1 SVHN), int64 [B] -> eps or v, [B, 3,
    28, 28].

    The picture enters and leaves as 2x2 pixel blocks (space to depth), so that all layers work at 14x14 and 7x7:
    four times less work at the finest level, which is what makes it quick on a CPU. Guidance contrasts a digit with
    no digit *in the same domain*: the domain is always given, since nothing else should push a picture away from its
    domain's ordinary look.
    """

    def __init__(self, channels=64, deep=192):
        super().__init__()
        c, d, e = channels, deep, 4 * channels
        self.time = nn.Sequential(TimeEmbedding(128, persistent=False), nn.Linear(128, e), nn.SiLU(), nn.Linear(e, e))
        self.digit = nn.Embedding(NO_DIGIT + 1, e)
        self.domain = nn.Embedding(2, e)
        # fmt: off
        self.stem = nn.Conv2d(12, c, 3, padding=1)      # 14x14
        self.down = nn.ModuleList([
            ResBlock(c, c, e),                          # 14x14
            nn.Conv2d(c, d, 3, stride=2, padding=1),    # 7x7
            ResBlock(d, d, e),                          # 7x7
        ])                                              # the stem's and each of these outputs is a skip
        self.middle = nn.ModuleList([
            Attention(d),
            ResBlock(d, d, e),
            Attention(d),
        ])
        self.up = nn.ModuleList([
            ResBlock(2 * d, d, e),                      # 7x7, with the skip of the last ResBlock
            ResBlock(2 * d, d, e),                      # 7x7, with that of the convolution
            Up(d, c),                                   # 14x14
            ResBlock(2 * c, c, e),                      # 14x14, with that of the first ResBlock
            ResBlock(2 * c, c, e),                      # 14x14, with the stem's
        ])
        # fmt: on
        self.out = nn.Sequential(nn.GroupNorm(c // 16, c), nn.SiLU(), nn.Conv2d(c, 12, 3, padding=1))
        nn.init.zeros_(self.out[-1].weight)
        nn.init.zeros_(self.out[-1].bias)

    def encode(self, x, t, digit, domain):
        """(maps [B, deep, 7, 7] after the middle, skips, condition [B, 4 channels]): what the way up starts from."""
        emb = F.silu(self.time(t) + self.digit(digit) + self.domain(domain))
        x = self.stem(F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last))
        skips = [x]
        for layer in self.down:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
            skips.append(x)
        for layer in self.middle:
            x = layer(x, emb)
        return x, skips, emb

    def forward(self, x, t, digit, domain):
        x, skips, emb = self.encode(x, t, digit, domain)
        for layer in self.up:
            x = layer(torch.cat([x, skips.pop()], dim=1), emb) if isinstance(layer, ResBlock) else layer(x)
        return F.pixel_shuffle(self.out(x).float(), 2)


class Critic(nn.Module):
    """The way down of a U-Net and a layer on top: x_t, t, digit, domain -> [B, 1, 7, 7], the higher the more real."""

    def __init__(self, unet):
        super().__init__()
        self.unet = copy.deepcopy(unet)
        self.unet.up = self.unet.out = None
        self.head = nn.Conv2d(self.unet.middle[0].out.out_channels, 1, 1)

    def forward(self, x, t, digit, domain):
        return self.head(self.unet.encode(x, t, digit, domain)[0]).float()


def guidance_scale(text):
    """`type` of an option: the scale of all pictures, "5", or a list of one for each domain, "7/4"."""
    scales = [utils.real(-100, 100)(part) for part in text.split("/")]
    if len(scales) not in (1, len(DOMAINS)):
        raise UserError(f"take one scale, or one for each of {' and '.join(DOMAINS)} as in 7/4, not {text!r}")
    return scales if len(scales) > 1 else scales[0]


def eps_model_for(model, config, digit, domain, scale, interval=(0, 10**9)):
    """The guided eps_model(x_t, t) that the samplers of diffusion.py call, for a batch of digits and domains.

    digit, domain: int64 [B] on the model's device. config: {"objective", "schedule", "T"} as in the checkpoint.
    scale and interval: as in diffusion.guided, or a scale for each domain; a few-step network (p1_distill.py) has
    learned them, and takes none.
    """
    scale = 1 if "steps" in config else scale
    if isinstance(scale, (list, tuple)):
        scale = torch.tensor(scale, device=domain.device)[domain].view(-1, 1, 1, 1)

    none = torch.full_like(digit, NO_DIGIT)

    def given(x_t, t):
        return model(x_t, time_batch(x_t, t), digit, domain)

    def both(x_t, t):
        x_t = torch.cat([x_t, x_t])
        return model(x_t, time_batch(x_t, t), torch.cat([digit, none]), torch.cat([domain, domain])).chunk(2)

    predict = guided(given, both, scale, interval)
    return eps_from_v(predict, schedule(config["schedule"], config["T"])) if config["objective"] == "v" else predict


def reverse_process(eps_model, config, x_T, noise, sampler="dpm++", steps=16):
    """The sampler's generator of (t, x_t, x_0 prediction), each [B, 3, 28, 28] in [-1, 1]; noise() for "ddpm" as of
    utils.noise_stream. A few-step network goes its own way: DDIM through the times config["steps"] to the data."""
    alpha_bar = schedule(config["schedule"], config["T"])
    if "steps" in config:
        return ddim(eps_model, x_T, alpha_bar, [*config["steps"], -1], clip=False)
    times = timesteps(config["T"], steps)
    if sampler == "dpm++":
        return dpm_solver_pp(eps_model, x_T, alpha_bar, times)
    return {"ddim": ddim, "ddpm": ddpm}[sampler](eps_model, x_T, alpha_bar, times, noise=noise)


@torch.no_grad()
def stages(model, config, digit, domain, index, seed, dtype, guidance=GUIDANCE, interval=(200, 750), **sampler):
    """x_T and then x_t after every step, each float32 [B, 3, 28, 28] on the model's device, as a generator.

    digit, domain, index: int64 [B]; picture i has the noise of the seed + index[i]. The defaults are what ships.
    """
    device = next(model.parameters()).device
    noise = utils.noise_stream(seed, index, (3, 28, 28), device)
    x_T = noise()
    utils.reuse_freed_memory()
    yield x_T
    with utils.autocast(device, dtype):
        eps_model = eps_model_for(model, config, digit.to(device), domain.to(device), guidance, interval)
        for _, x_t, _ in reverse_process(eps_model, config, x_T, noise, **sampler):
            yield x_t


def judged_samples(model, config, judges):
    """What a training shows: (picture of 10 samples of each digit and domain, {name: their accuracy by the judges}).

    Sampled as it ships, in the precision of the training; judges: a classifier for each domain.
    """
    images, digit = [], torch.arange(100) // 10
    for d in range(2):
        *_, x = stages(model, config, digit, torch.full_like(digit, d), torch.arange(100) + 100 * d, 0, torch.float32)
        images.append(utils.to_uint8(x).cpu())
    right = [(predict(judge, x) == digit).float().mean().item() for judge, x in zip(judges, images)]
    accuracy = {f"accuracy_{name}": a for name, a in zip(DOMAINS, right)}
    return utils.image_grid(torch.cat(images), 20), {**accuracy, "accuracy": sum(right) / 2}


def load_digit_unet(path):
    """(DigitUNet in eval mode, channels_last, float32; config) of a checkpoint {state_dict, config}; raises
    UserError."""
    checkpoint = utils.load_checkpoint(path)
    config = checkpoint.get("config") if isinstance(checkpoint, dict) else None
    if not isinstance(config, dict) or "state_dict" not in checkpoint:
        raise UserError(f"{path}: no state_dict and config in it; it is not a checkpoint of p1_train.py")
    for name, possible in CONFIG.items():
        value = config.get(name)
        if type(value) is not type(possible[0]) or value not in possible:
            raise UserError(f"{path}: its config has {name} {str(value)[:40]!r}; train or fetch it again")
    steps = config.get("steps", [0])  # the times of a few-step network, downwards
    are_times = isinstance(steps, list) and all(type(t) is int for t in steps)
    if not are_times or not steps or steps != [t for t in range(config["T"] - 1, -1, -1) if t in steps]:
        raise UserError(f"{path}: its config has steps {str(steps)[:40]!r}; train or fetch it again")
    model = utils.load_weights(DigitUNet(config["channels"], config["deep"]), checkpoint["state_dict"], path)
    return model.eval().to(memory_format=torch.channels_last), config
