"""PLMS, the default of CompVis's first txt2img: DDIM's steps along an eps extrapolated from the last four."""

from __future__ import annotations

import torch

from ldm.models.diffusion.ddim import ddim_step, ddim_times
from ldm.models.diffusion.sampling import Sampler

# Adams-Bashforth weights of the newest, the last ... eps
WEIGHTS = [(1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24)]


@torch.no_grad()
def plms(eps_model, x_T, alphas_cumprod, steps):
    """PLMS (Liu et al. 2022, eq. 12; first step by the improved Euler rule), yields (t, x_t, x_0 prediction)."""
    abar, x, before = alphas_cumprod.double().tolist(), x_T, []
    times = ddim_times(len(abar), steps)
    for t, s in zip(reversed(times), reversed([0] + times[:-1])):
        eps = eps_model(x, t)
        before = [eps, *before[:3]]
        eps = sum(w * e for w, e in zip(WEIGHTS[len(before) - 1], before))
        if len(before) == 1:
            eps = (eps + eps_model(ddim_step(x, eps, abar[t], abar[s])[0], max(s, times[0]))) / 2
        x, x_0 = ddim_step(x, eps, abar[t], abar[s])
        yield s, x, x_0


class PLMSSampler(Sampler):
    """PLMS; `sample` returns what DDIMSampler's does. Deterministic: eta must be 0."""

    def steps(self, eps_model, x_T, S, eta, noise):
        if eta:
            raise ValueError(f"eta {eta}: PLMS is deterministic; take 0, or DDIMSampler")
        return plms(eps_model, x_T, self.model.alphas_cumprod, S)
