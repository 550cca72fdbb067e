"""Noise schedule and time embedding."""
from __future__ import annotations

import math

import torch


def make_beta_schedule(schedule, n_timestep, linear_start=1e-4, linear_end=2e-2):
    """betas, float64 [n_timestep]: "linear" in sqrt(beta), as latent diffusion calls it, or "sqrt_linear" in beta."""
    if schedule == "linear":
        return torch.linspace(linear_start**0.5, linear_end**0.5, n_timestep, dtype=torch.float64) ** 2
    if schedule == "sqrt_linear":
        return torch.linspace(linear_start, linear_end, n_timestep, dtype=torch.float64)
    raise ValueError(f"beta schedule {schedule!r}: take linear or sqrt_linear")


def timestep_embedding(timesteps, dim, max_period=10000):
    """cos(t w_i) and sin(t w_i), w_i = max_period^(-i / (dim/2)) (Vaswani et al. 2017, section 3.5), [B, dim].

    timesteps [B] may be fractions.
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=timesteps.device) * (-math.log(max_period) / half))
    angles = timesteps.float()[:, None] * frequencies
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return torch.nn.functional.pad(embedding, (0, dim % 2))
