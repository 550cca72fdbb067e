"""DDIM.

latents, _ = DDIMSampler(model).sample(50, batch_size, [4, 64, 64], c, eta=0.0)
"""

from __future__ import annotations

import torch

from ldm.compat import ImageToImage
from ldm.models.diffusion.sampling import Sampler


def ddim_times(T, steps):
    """The times 1 + i (T // steps), i = 0 .. steps - 1, of CompVis's samplers."""
    if not 1 <= steps < T:
        raise ValueError(f"{steps} DDIM steps: take 1 to {T - 1}")
    return [1 + i * (T // steps) for i in range(steps)]


def ddim_step(x, eps, abar_t, abar_s, sigma=0.0):
    """(x_s without its noise, x_0 prediction) of x_t (Song et al. 2021, eq. 12)."""
    x_0 = (x - (1 - abar_t) ** 0.5 * eps) / abar_t**0.5
    return abar_s**0.5 * x_0 + max(0.0, 1 - abar_s - sigma**2) ** 0.5 * eps, x_0


@torch.no_grad()
def ddim(eps_model, x_T, alphas_cumprod, steps, eta=0.0, noise=None, last=None):
    """DDIM (Song et al. 2021, eq. 12, 16), a generator of (t, x_t, x_0 prediction).

    eta = 0 is deterministic, eta = 1 draws as much noise as DDPM; `noise()` gives [B, C, H, W]. As in CompVis's code
    the last step goes to t = 0, not to the data itself. `last`: only so many of the last steps, for an x_t of their
    first time in place of x_T.
    """
    noise = noise if noise is not None else lambda: torch.randn_like(x_T)
    abar = alphas_cumprod.cpu().double().tolist()
    times = ddim_times(len(abar), steps)[:last]
    x = x_T
    for t, s in zip(reversed(times), reversed([0] + times[:-1])):
        sigma = eta * ((1 - abar[s]) / (1 - abar[t]) * (1 - abar[t] / abar[s])) ** 0.5
        x, x_0 = ddim_step(x, eps_model(x, t), abar[t], abar[s], sigma)
        if sigma > 0:
            x = x + sigma * noise()
        yield s, x, x_0


class DDIMSampler(ImageToImage, Sampler):
    """DDIM; `sample` returns (latents, {"x_inter": [...], "pred_x0": [...]}), one of each every log_every_t steps."""

    def steps(self, eps_model, x_T, S, eta, noise):
        return ddim(eps_model, x_T, self.model.alphas_cumprod, S, eta, noise)
