"""Attention, and the transformer by which the network reads a prompt (Rombach et al. 2022, section 3.3)."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

COARSE = 12 * 12  # pixels of the largest maps to perturb: in Stable Diffusion, up to 768x768, the middle block's alone
SCORES = 2**26  # attention scores held at a time where torch has no fused attention: 256 MB in float32


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, eq. 1): q [B, heads, N, d]; k, v [B, heads, M, d] -> as q."""
    if hasattr(F, "scaled_dot_product_attention"):
        return F.scaled_dot_product_attention(q, k, v)
    return sliced_attention(q, k, v)


def sliced_attention(q, k, v, scores=SCORES):
    """The same for torch before 2.0, some queries at a time: at most `scores` attention scores exist at once."""
    rows = max(1, scores // (q.shape[0] * q.shape[1] * k.shape[2]))
    k = k.transpose(-1, -2)
    q = q * q.shape[-1] ** -0.5  # before the product, which could leave the range of float16
    return torch.cat([(part @ k).softmax(dim=-1).to(v.dtype) @ v for part in q.split(rows, dim=2)], dim=2)


def named(**layers):
    """Layers in a row, under the names that checkpoints have."""
    return nn.Sequential(OrderedDict(layers))


class Memory:
    """A conditioning [B, M, C] and what the network keeps of it from one step of sampling to the next, in place of a
    context: the keys and values of each layer, and the deep features that all but every `every`th call use again. Of
    the last `perturbed` of the batch self-attention is perturbed (see CrossAttention)."""

    def __init__(self, context, every=1, perturbed=0):
        self.context, self.every, self.perturbed = context, every, perturbed
        self.keys, self.calls, self.deep = {}, 0, None


class CrossAttention(nn.Module):
    """Multi-head attention of x [B, N, C] to context [B, M, context_dim], or to x itself where there is none: there, on
    COARSE maps, each pixel of the last `perturbed` of the batch attends to itself alone (Ahn et al. 2024)."""

    def __init__(self, query_dim, context_dim=None, heads=8, dim_head=64):
        super().__init__()
        self.heads, inner, context_dim = heads, heads * dim_head, query_dim if context_dim is None else context_dim
        self.to_q, self.to_k, self.to_v = (nn.Linear(c, inner, bias=False) for c in (query_dim, *[context_dim] * 2))
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim))

    def split(self, *ys):
        return [y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in ys]  # [B, heads, N or M, dim_head]

    def keys_and_values(self, context):
        """Of a tensor [B, M, context_dim], or of a Memory, where they are computed once."""
        if not isinstance(context, Memory):
            return self.split(self.to_k(context), self.to_v(context))
        if self not in context.keys:
            context.keys[self] = self.keys_and_values(context.context)
        return context.keys[self]

    def forward(self, x, context=None, perturbed=0):
        (q,), (k, v) = self.split(self.to_q(x)), self.keys_and_values(x if context is None else context)
        y = attention(q, k, v)
        if perturbed and x.shape[1] <= COARSE:
            y = torch.cat([y[:-perturbed], v[-perturbed:]])
        return self.to_out(y.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """(x W + b) * gelu(x V + c) (Shazeer 2020, eq. 6)."""

    def __init__(self, dim_in, dim_out):
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class BasicTransformerBlock(nn.Module):
    """Attention among the pixels, attention to the prompt, feed-forward: each after a layer norm and with a skip."""

    def __init__(self, dim, n_heads, d_head, context_dim=None):
        super().__init__()
        self.attn1 = CrossAttention(dim, None, n_heads, d_head)
        self.ff = named(net=nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim)))
        self.attn2 = CrossAttention(dim, context_dim, n_heads, d_head)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x, context=None):
        x = x + self.attn1(self.norm1(x), perturbed=getattr(context, "perturbed", 0))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map: x [B, C, H, W], context [B, M, context_dim] -> as x."""

    def __init__(self, in_channels, n_heads, d_head, depth=1, context_dim=None):
        super().__init__()
        inner = n_heads * d_head
        self.norm = nn.GroupNorm(32, in_channels, eps=1e-6)
        self.proj_in = nn.Conv2d(in_channels, inner, 1)
        blocks = (BasicTransformerBlock(inner, n_heads, d_head, context_dim) for _ in range(depth))
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = nn.Conv2d(inner, in_channels, 1)

    def forward(self, x, context=None):
        h = self.proj_in(self.norm(x))
        height, width = h.shape[2:]
        h = h.permute(0, 2, 3, 1).flatten(1, 2)  # [B, H*W, C]; no copy in channels_last
        for block in self.transformer_blocks:
            h = block(h, context)
        h = h.unflatten(1, (height, width)).permute(0, 3, 1, 2)  # [B, C, H, W]
        return x + self.proj_out(h)
