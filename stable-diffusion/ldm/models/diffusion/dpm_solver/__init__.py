"""DPM-Solver++ for discrete-time models."""

import numpy as np
import torch

from ldm.models.diffusion.sampling import Sampler


@torch.no_grad()
def dpm_solver_pp(eps_model, x_T, alphas_cumprod, steps):
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2), times uniform in [1/T, 1]; yields (t, x_t, x_0 prediction).

    x_T: [B, C, H, W]; eps_model(x_t, t) with t in [0, T-1], not rounded; alphas_cumprod: [T], with log(alpha) linear
    between its times. With lambda = log(alpha/sigma), h = lambda_t - lambda_s and D extrapolated from the last two x_0
    predictions, x_t = sigma_t/sigma_s x_s - alpha_t (exp(-h) - 1) D. The first step is of first order; so is the last
    one when there are fewer than 15, for stability.
    """
    if steps < 1:
        raise ValueError(f"{steps} sampling steps: take 1 or more")
    T = len(alphas_cumprod)
    times = np.linspace(1.0, 1.0 / T, steps + 1)
    log_alpha = np.interp(times, np.arange(1, T + 1) / T, 0.5 * alphas_cumprod.cpu().double().log().numpy())
    alpha, sigma = np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))
    lam = log_alpha - np.log(sigma)
    x, before = x_T, None
    for s, t in enumerate(range(1, steps + 1)):
        eps = eps_model(x, (times[s] - 1.0 / T) * T)
        x_0 = (x - float(sigma[s]) * eps) / float(alpha[s])
        h, D = lam[t] - lam[s], x_0
        if before is not None and (t < steps or steps >= 15):
            r = (lam[s] - lam[s - 1]) / h
            D = x_0 + (x_0 - before) / float(2 * r)
        x = float(sigma[t] / sigma[s]) * x - float(alpha[t] * np.expm1(-h)) * D
        before = x_0
        yield (times[t] - 1.0 / T) * T, x, x_0


class DPMSolverSampler(Sampler):
    """DPM-Solver++(2M); `sample` returns (latents, None). Deterministic: eta is not used."""

    KEEPS = False

    def steps(self, eps_model, x_T, S, eta, noise):
        return dpm_solver_pp(eps_model, x_T, self.model.alphas_cumprod, S)
