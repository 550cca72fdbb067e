"""Names that scripts for CompVis's and the course's ldm use, and nothing else here; each says who calls it."""

import contextlib
import itertools
import types

import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from ldm.models.diffusion.dpm_solver import dpm_solver_pp
from ldm.models.diffusion.sampling import guided, uniform_times


def exists(value):
    """Imported from ldm.util by modules that students added to the course's ldm."""
    return value is not None


def default(value, otherwise):
    """As `exists`; `otherwise` may be a function that makes the value."""
    return value if value is not None else otherwise() if callable(otherwise) else otherwise


def count_params(model, verbose=False):
    """Students' scripts that report the size of what they train."""
    total = sum(p.numel() for p in model.parameters())
    if verbose:
        print(f"{type(model).__name__} has {total * 1e-6:.2f} M params.")
    return total


class LambdaLinearScheduler:
    """CompVis's configs, by ldm.lr_scheduler: a factor for LambdaLR, cycles of linear warm-up and linear decay.

    Cycle i lasts cycle_lengths[i] steps: f_start[i] to f_max[i] over warm_up_steps[i], then to f_min[i] at its end.
    """

    def __init__(self, warm_up_steps, f_min, f_max, f_start, cycle_lengths, verbosity_interval=0):
        ends = itertools.accumulate(cycle_lengths)
        self.cycles = list(zip(ends, warm_up_steps, f_min, f_max, f_start, cycle_lengths))

    def schedule(self, n, **kwargs):
        end, warm_up, f_min, f_max, f_start, length = next((c for c in self.cycles if n <= c[0]), self.cycles[-1])
        n -= end - length
        if n < warm_up:
            return f_start + (f_max - f_start) * n / warm_up
        return f_min + (f_max - f_min) * (length - n) / length

    __call__ = schedule


class TrainingNames:
    """Of LatentDiffusion: students' own copies of its p_losses, and of its samplers; txt2img.py calls ema_scope."""

    l_simple_weight, original_elbo_weight = 1.0, 0.0

    def ema_scope(self, context=None):
        """Does nothing: the weights of sd-v1-4.ckpt are the averaged ones already."""
        return contextlib.nullcontext()

    def get_loss(self, pred, target, mean=True):
        """The squared error, of each element unless `mean`."""
        return F.mse_loss(pred, target, reduction="mean" if mean else "none")

    @torch.no_grad()
    def p_sample_loop(self, cond, shape, return_intermediates=False, timesteps=None, **options):
        """Samplers without guidance: latents of `shape` [B, C, h, w] by DDPM, as DDIM with eta 1, in all steps
        or in `timesteps` (of which CompVis's code would make the last of a thousand)."""
        from ldm.models.diffusion.ddim import DDIMSampler

        steps = min(timesteps or self.num_timesteps, self.num_timesteps - 1)
        latents, inter = DDIMSampler(self).sample(steps, shape[0], shape[1:], cond, **{"eta": 1.0, **options})
        return (latents, inter["x_inter"]) if return_intermediates else latents


class Divergences:
    """Of DiagonalGaussianDistribution: students' own trainings of the autoencoder."""

    def normal(self):
        return Normal(self.mean, self.std, validate_args=False)

    def kl(self, other=None):
        """KL(self || other), of N(0, I) by default, in nats: [B]."""
        return kl_divergence(self.normal(), other.normal() if other else Normal(0.0, 1.0)).flatten(1).sum(1)

    def nll(self, sample, dims=(1, 2, 3)):
        """-log p(sample), summed over `dims`."""
        return -self.normal().log_prob(sample).sum(tuple(dims))


class ImageToImage:
    """Of DDIMSampler: CompVis's img2img.py (SDEdit, Meng et al. 2022), and students' scripts made from it."""

    def make_schedule(self, ddim_num_steps, ddim_discretize="uniform", ddim_eta=0.0, verbose=True):
        self.ddim_timesteps, self.eta = uniform_times(self.model.num_timesteps, ddim_num_steps), ddim_eta
        self.ddim_alphas = self.model.alphas_cumprod[self.ddim_timesteps]

    def stochastic_encode(self, x0, t, *, noise=None):
        """Latents x0 as noisy as before the schedule's last t steps; t int64 [B]. t = all steps is the noisiest."""
        times = torch.as_tensor(self.ddim_timesteps, device=t.device)
        return self.model.q_sample(x0, times[t.clamp(max=len(times) - 1)], noise)

    @torch.no_grad()
    def decode(self, x_latent, cond, t_start, **guidance):
        """The schedule's last t_start steps from a latent of stochastic_encode; guidance: see guided."""
        from ldm.models.diffusion import ddim

        steps, eps_model = len(self.ddim_timesteps), guided(self.model, cond, **guidance)
        way = ddim.ddim(eps_model, x_latent, self.model.alphas_cumprod, steps, self.eta, last=t_start)
        return [x_latent, *(x for _, x, _ in way)][-1]


class NoiseScheduleVP:
    """By ldm.models.diffusion.dpm_solver.dpm_solver, with the next two: copies of CompVis's sampler.py."""

    def __init__(self, schedule="discrete", betas=None, alphas_cumprod=None):
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0) if alphas_cumprod is None else alphas_cumprod


def model_wrapper(model, noise_schedule, condition=None, unconditional_condition=None, guidance_scale=1.0, **unused):
    """See NoiseScheduleVP. model(x, t, c) -> eps, t in [0, T - 1], under classifier-free guidance."""
    return guided(types.SimpleNamespace(apply_model=model), condition, unconditional_condition, guidance_scale)


class DPM_Solver:
    """See NoiseScheduleVP. Whatever the options, sample() is DPM-Solver++(2M), CompVis's only use of it."""

    def __init__(self, model_fn, noise_schedule, **unused):
        self.eps_model, self.alphas_cumprod = model_fn, noise_schedule.alphas_cumprod

    def sample(self, x, steps=20, **unused):
        *_, (_, x, _) = dpm_solver_pp(self.eps_model, x, self.alphas_cumprod, steps)
        return x
