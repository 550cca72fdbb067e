"""Latent diffusion: U-Net, autoencoder and text encoder together, with the forward process and the training loss."""

from __future__ import annotations

import contextlib
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from ldm.util import instantiate_from_config

# Entries of CompVis's configs that concern training the network from scratch: taken, and not used.
TRAINING_ONLY = set(
    "num_timesteps_cond log_every_t first_stage_key cond_stage_key monitor use_ema scheduler_config loss_type model_lr "
    "concat_mode scale_by_std ckpt_path ignore_keys load_only_unet learn_logvar logvar_init v_posterior clip_denoised "
    "l_simple_weight original_elbo_weight personalization_config unfreeze_model embedding_reg_weight".split()
)


class DiffusionWrapper(nn.Module):
    """Carries the network under the checkpoint's name, model.diffusion_model."""

    def __init__(self, unet_config):
        super().__init__()
        self.diffusion_model = instantiate_from_config(unet_config)

    def forward(self, x, t, c_crossattn):
        return self.diffusion_model(x, t, context=torch.cat(list(c_crossattn), dim=1))


class LatentDiffusion(nn.Module):
    """Stable Diffusion v1. Latents are [B, 4, H/8, W/8], images [B, 3, H, W] in [-1, 1], conditionings [B, 77, 768].

    The network runs in its own precision; what goes in and comes out keeps the caller's: samplers work in float32.
    """

    def __init__(
        self,
        first_stage_config,
        cond_stage_config,
        unet_config,
        timesteps=1000,
        beta_schedule="linear",
        linear_start=1e-4,
        linear_end=2e-2,
        image_size=64,
        channels=4,
        scale_factor=1.0,
        conditioning_key="crossattn",
        cond_stage_trainable=False,
        parameterization="eps",
        **training,
    ):
        super().__init__()
        if (parameterization, beta_schedule, conditioning_key) != ("eps", "linear", "crossattn"):
            raise ValueError("LatentDiffusion: only eps, linear schedule and cross-attention are supported")
        unknown = sorted(set(training) - TRAINING_ONLY)
        if unknown:
            warnings.warn(f"LatentDiffusion: {', '.join(unknown)} in the config: unknown, not used", stacklevel=2)
        self.num_timesteps, self.image_size, self.channels = timesteps, image_size, channels
        self.scale_factor, self.parameterization = scale_factor, parameterization
        self.cond_stage_trainable = cond_stage_trainable
        self.model = DiffusionWrapper(unet_config)
        self.first_stage_model = instantiate_from_config(first_stage_config).eval().requires_grad_(False)
        self.cond_stage_model = instantiate_from_config(cond_stage_config)
        # "linear" is linear in sqrt(beta), in latent diffusion's terms
        self._register_schedule(torch.linspace(linear_start**0.5, linear_end**0.5, timesteps, dtype=torch.float64) ** 2)

    def _register_schedule(self, betas):
        """The constants of Ho et al. 2020 as float32 buffers [T], under the names that checkpoints have."""
        alphas = 1.0 - betas
        abar = torch.cumprod(alphas, dim=0)
        abar_prev = torch.cat([torch.ones(1, dtype=abar.dtype), abar[:-1]])
        variance = betas * (1.0 - abar_prev) / (1.0 - abar)
        constants = {
            "betas": betas,
            "alphas_cumprod": abar,
            "alphas_cumprod_prev": abar_prev,
            "sqrt_alphas_cumprod": abar.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1.0 - abar).sqrt(),
            "log_one_minus_alphas_cumprod": (1.0 - abar).log(),
            "sqrt_recip_alphas_cumprod": (1.0 / abar).sqrt(),
            "sqrt_recipm1_alphas_cumprod": (1.0 / abar - 1.0).sqrt(),
            "posterior_variance": variance,
            "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
            "posterior_mean_coef1": betas * abar_prev.sqrt() / (1.0 - abar),
            "posterior_mean_coef2": (1.0 - abar_prev) * alphas.sqrt() / (1.0 - abar),
        }
        self.schedule_names = tuple(constants)
        for name, values in constants.items():
            self.register_buffer(name, values.float())

    def _apply(self, fn, *args, **kwargs):
        """model.half() and the like move the schedule, but leave it in float32."""
        before = {name: self._buffers[name] for name in self.schedule_names}
        super()._apply(fn, *args, **kwargs)
        for name, values in before.items():
            self._buffers[name] = values.to(self._buffers[name].device)
        return self

    @property
    def device(self):
        return self.betas.device

    @property
    def dtype(self):
        """Precision of the U-Net."""
        return next(self.model.parameters()).dtype

    @contextlib.contextmanager
    def ema_scope(self, context=None):
        """Does nothing: the weights of sd-v1-4.ckpt are the averaged ones already."""
        yield

    # ------------------------------------------------------------------------------------------------ text and images

    def get_learned_conditioning(self, prompts):
        """Prompts (a list of B strings, or one string) -> [B, 77, width of the text encoder]."""
        return self.cond_stage_model.encode(prompts)

    @torch.no_grad()
    def encode_first_stage(self, x):
        """Images -> DiagonalGaussianDistribution over unscaled latents."""
        return self.first_stage_model.encode(x.to(next(self.first_stage_model.parameters()).dtype))

    def get_first_stage_encoding(self, posterior):
        """A latent of a posterior (sampled), or of a tensor of unscaled latents, brought to unit variance."""
        return self.scale_factor * (posterior if isinstance(posterior, torch.Tensor) else posterior.sample())

    @torch.no_grad()
    def decode_first_stage(self, z, tiled=None):
        """Latents -> images, one at a time; tiled: see AutoencoderKL.decode."""
        dtype = next(self.first_stage_model.parameters()).dtype
        return self.first_stage_model.decode((z / self.scale_factor).to(dtype), tiled).to(z.dtype)

    # ------------------------------------------------------------------------------------------------ diffusion

    def q_sample(self, x_start, t, noise=None):
        """x_t ~ q(x_t | x_0) = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps (Ho et al. 2020, eq. 4); t int64 [B]."""
        noise = torch.randn_like(x_start) if noise is None else noise
        a = self.sqrt_alphas_cumprod[t].view(-1, 1, 1, 1)
        s = self.sqrt_one_minus_alphas_cumprod[t].view(-1, 1, 1, 1)
        return (a * x_start + s * noise).to(x_start.dtype)

    def apply_model(self, x_noisy, t, cond):
        """eps predicted from x_t, t [B] (may be fractions) and cond: a tensor, a list, or {"c_crossattn": list}."""
        if isinstance(cond, dict):
            cond = cond["c_crossattn"]
        if isinstance(cond, torch.Tensor):
            cond = [cond]
        return self.model(x_noisy.to(self.dtype), t, [c.to(self.dtype) for c in cond]).to(x_noisy.dtype)

    def p_losses(self, x_start, cond, t, noise=None):
        """(loss, dict of parts): mean squared error of the predicted eps (Ho et al. 2020, eq. 14)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        eps = self.apply_model(self.q_sample(x_start, t, noise), t, cond)
        loss = F.mse_loss(eps.float(), noise.float())
        prefix = "train" if self.training else "val"
        return loss, {f"{prefix}/loss_simple": loss.detach(), f"{prefix}/loss": loss.detach()}

    def forward(self, x, c):
        """p_losses of latents x at times drawn from 0 .. T-1; c may be prompts, or their conditioning."""
        t = torch.randint(self.num_timesteps, (len(x),), device=x.device)
        if isinstance(c, str) or isinstance(c, (list, tuple)) and isinstance(c[0], str):
            c = self.get_learned_conditioning(c)
        return self.p_losses(x, c, t)
