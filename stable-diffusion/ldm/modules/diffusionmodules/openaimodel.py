"""The denoising U-Net of latent diffusion (Rombach et al. 2022; residual blocks of Dhariwal & Nichol 2021)."""

import math

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ldm.modules.attention import Memory, SpatialTransformer, named
from ldm.modules.diffusionmodules.model import conv3, upsample


def timestep_embedding(timesteps, dim, max_period=10000):
    """cos(t w_i) and sin(t w_i), w_i = max_period^(-i / (dim/2)) (Vaswani et al. 2017, section 3.5): [B, dim]."""
    frequencies = torch.exp(torch.arange(dim // 2, device=timesteps.device) * (-math.log(max_period) / (dim // 2)))
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResBlock(nn.Module):
    """Two convolutions with the time embedding added between: x [B, C, H, W], emb [B, E] -> [B, out, H, W]."""

    def __init__(self, c_in, c_emb, c_out):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, c_in), nn.SiLU(), conv3(c_in, c_out))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(c_emb, c_out))
        self.out_layers = nn.Sequential(nn.GroupNorm(32, c_out), nn.SiLU(), nn.Identity(), conv3(c_out, c_out))
        self.skip_connection = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, emb):
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class TimestepEmbedSequential(nn.Sequential):
    """Layers in a row; each gets what it reads: residual blocks the time, transformers the prompt."""

    def forward(self, x, emb, context=None):
        reads = {ResBlock: [emb], SpatialTransformer: [context]}
        for layer in self:
            x = layer(x, *reads.get(type(layer), []))
        return x


# Entries of CompVis's configs: what they are by default, the last two only to be asked for; those of other variants.
OPTIONS = {"num_heads": 8, "transformer_depth": 1, "context_dim": None, "use_checkpoint": False}
OPTIONS.update(image_size=None, legacy=False)
FIXED = {"use_spatial_transformer": True, "num_head_channels": -1, "dropout": 0}
OUTER = 2  # blocks of either side that run at every step


class UNetModel(nn.Module):
    """eps(x_t, t, prompt): x [B, in_channels, H, W], timesteps [B], context [B, M, context_dim] -> eps, as x.

    H and W are multiples of 2^(levels - 1). A Memory may be the context, and have deep features used again (DeepCache,
    Ma et al. 2024): then only the OUTER outermost blocks of each side run. `use_checkpoint` recomputes activations in
    the backward pass instead of keeping them; without gradients it has no effect. `options`: see OPTIONS.
    """

    def __init__(
        self, in_channels, model_channels, out_channels, num_res_blocks, attention_resolutions, channel_mult, **options
    ):
        super().__init__()
        fixed, options = {k: options.pop(k, v) for k, v in FIXED.items()}, {**OPTIONS, **options}
        if fixed != FIXED or set(options) > set(OPTIONS):
            raise ValueError(f"UNetModel: of {fixed} and {options}, only Stable Diffusion v1's are supported")
        self.in_channels, self.out_channels, self.model_channels = in_channels, out_channels, model_channels
        self.use_checkpoint, self.image_size = options["use_checkpoint"], options["image_size"]
        emb, heads, depth = 4 * model_channels, options["num_heads"], options["transformer_depth"]

        def res(c_in, c_out):
            return ResBlock(c_in, emb, c_out)

        def attn(c):
            return SpatialTransformer(c, heads, c // heads, depth, options["context_dim"])

        # The loops below write out, for Stable Diffusion v1 (320 channels x 1, 2, 4, 4; attention at strides 1, 2, 4):
        #   input_blocks                     middle_block          output_blocks, each on [h, skip] concatenated
        #   0      conv(4, 320)              res(1280, 1280)       0,1    res(2560, 1280)
        #   1,2    res(320, 320) attn        attn(1280)            2      res(2560, 1280) up
        #   3      down(320)                 res(1280, 1280)       3,4    res(2560, 1280) attn
        #   4      res(320, 640) attn                              5      res(1920, 1280) attn up
        #   5      res(640, 640) attn                              6      res(1920, 640) attn
        #   6      down(640)                                       7      res(1280, 640) attn
        #   7      res(640, 1280) attn                             8      res(960, 640) attn up
        #   8      res(1280, 1280) attn                            9      res(960, 320) attn
        #   9      down(1280)                                      10,11  res(640, 320) attn
        #   10,11  res(1280, 1280)
        levels = [(m * model_channels, 2**i in attention_resolutions) for i, m in enumerate(channel_mult)]
        c, skips, inputs, outputs = model_channels, [model_channels], [[conv3(in_channels, model_channels)]], []
        for level, (width, attends) in enumerate(levels, start=1):
            for _ in range(num_res_blocks):
                inputs.append([res(c, width)] + ([attn(width)] if attends else []))
                c = width
                skips.append(c)
            if level < len(levels):
                inputs.append([named(op=conv3(c, c, stride=2))])
                skips.append(c)
        middle = [res(c, c), attn(c), res(c, c)]
        for level, (width, attends) in reversed(list(enumerate(levels))):
            for i in range(num_res_blocks + 1):
                row = [res(c + skips.pop(), width)] + ([attn(width)] if attends else [])
                c = width
                outputs.append(row + ([upsample(c)] if level > 0 and i == num_res_blocks else []))

        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.input_blocks = nn.ModuleList(TimestepEmbedSequential(*row) for row in inputs)
        self.middle_block = TimestepEmbedSequential(*middle)
        self.output_blocks = nn.ModuleList(TimestepEmbedSequential(*row) for row in outputs)
        self.out = nn.Sequential(nn.GroupNorm(32, c), nn.SiLU(), conv3(c, out_channels))

    def forward(self, x, timesteps, context=None):
        def run(block, h):
            if self.use_checkpoint and torch.is_grad_enabled():
                return checkpoint(block, h, emb, context, use_reentrant=False)
            return block(h, emb, context)

        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(x.dtype))
        memory = context if isinstance(context, Memory) else Memory(None)
        again = memory.calls % memory.every > 0
        skips, h = [], x
        for block in self.input_blocks[: OUTER if again else None]:
            h = run(block, h)
            skips.append(h)
        if not again:
            h = run(self.middle_block, h)
            for block in self.output_blocks[:-OUTER]:
                h = run(block, torch.cat([h, skips.pop()], dim=1))
            memory.deep = h
        memory.calls, h = memory.calls + 1, memory.deep
        for block in self.output_blocks[-OUTER:]:
            h = run(block, torch.cat([h, skips.pop()], dim=1))
        return self.out(h)
