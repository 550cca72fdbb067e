"""DDIM and PLMS."""

import torch

from ldm.compat import ImageToImage
from ldm.models.diffusion.sampling import Sampler, uniform_times

# Adams-Bashforth weights of the newest, the last ... eps
WEIGHTS = [(1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24)]


def ddim_step(x, eps, abar_t, abar_s, sigma=0.0):
    """(x_s without its noise, x_0 prediction) of x_t (Song et al. 2021, eq. 12)."""
    x_0 = (x - (1 - abar_t) ** 0.5 * eps) / abar_t**0.5
    return abar_s**0.5 * x_0 + max(0.0, 1 - abar_s - sigma**2) ** 0.5 * eps, x_0


@torch.no_grad()
def ddim(eps_model, x_T, alphas_cumprod, steps, eta=0.0, noise=None, last=None, plms=False):
    """DDIM (Song et al. 2021, eq. 12, 16), a generator of (t, x_t, x_0 prediction).

    eta = 0 is deterministic, eta = 1 draws DDPM's noise; `noise()` gives [B, C, H, W]. The last step goes to t = 0, as
    CompVis's. `last`: only so many of the last steps, from an x_t in place of x_T. `plms`: along an eps extrapolated
    from the last four, at the first step by the improved Euler rule (Liu et al. 2022, eq. 12).
    """
    abar, x, seen = alphas_cumprod.cpu().double().tolist(), x_T, []
    times = uniform_times(len(abar), steps)[:last]
    for t, s in zip(reversed(times), reversed([0] + times[:-1])):
        eps = eps_model(x, t)
        if plms:
            seen = [eps, *seen[:3]]
            eps = sum(w * e for w, e in zip(WEIGHTS[len(seen) - 1], seen))
            if len(seen) == 1:
                eps = (eps + eps_model(ddim_step(x, eps, abar[t], abar[s])[0], max(s, times[0]))) / 2
        sigma = eta * ((1 - abar[s]) / (1 - abar[t]) * (1 - abar[t] / abar[s])) ** 0.5
        x, x_0 = ddim_step(x, eps, abar[t], abar[s], sigma)
        if sigma > 0:
            x = x + sigma * (torch.randn_like(x) if noise is None else noise())
        yield s, x, x_0


class DDIMSampler(ImageToImage, Sampler):
    """DDIM; `sample` returns (latents, {"x_inter": [...], "pred_x0": [...]}), one of each every log_every_t steps."""

    def steps(self, eps_model, x_T, S, eta, noise):
        return ddim(eps_model, x_T, self.model.alphas_cumprod, S, eta, noise)


class PLMSSampler(Sampler):
    """PLMS; `sample` returns what DDIMSampler's does. Deterministic: eta must be 0."""

    def steps(self, eps_model, x_T, S, eta, noise):
        if eta:
            raise ValueError(f"eta {eta}: PLMS is deterministic; take 0, or DDIMSampler")
        return ddim(eps_model, x_T, self.model.alphas_cumprod, S, plms=True)
