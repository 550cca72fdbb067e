"""Latent diffusion: U-Net, autoencoder and text encoder together, with the forward process and the training loss."""

import difflib
import warnings

import torch
from torch import nn

from ldm.checkpoint import TABLE
from ldm.compat import TrainingNames
from ldm.models.diffusion.sampling import as_tensor
from ldm.modules.attention import Memory, named
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.util import instantiate_from_config

# Entries of CompVis's configs: what they are by default, and those that may be nothing else. Others are on training the
# network from scratch, and not used.
DEFAULTS = {"linear_start": 1e-4, "linear_end": 2e-2, "image_size": 64, "channels": 4, "cond_stage_trainable": False}
FIXED = {"parameterization": "eps", "beta_schedule": "linear", "conditioning_key": "crossattn"}


class LatentDiffusion(TrainingNames, nn.Module):
    """Stable Diffusion v1. Latents are [B, 4, H/8, W/8], images [B, 3, H, W] in [-1, 1], conditionings [B, 77, 768].
    The network runs in its own precision, `dtype`; what goes in and comes out keeps the caller's."""

    def __init__(self, first_stage_config, cond_stage_config, unet_config, timesteps=1000, scale_factor=1.0, **config):
        super().__init__()
        for name, value in FIXED.items():
            if config.pop(name, value) != value:
                raise ValueError(f"LatentDiffusion: {name} other than {value!r} is not supported")
        for name in set(config) - set(DEFAULTS):
            if meant := difflib.get_close_matches(name, DEFAULTS, 1, 0.8):
                warnings.warn(f"LatentDiffusion: {name} in the config is not used; {meant[0]} would be", stacklevel=2)
        self.scale_factor, self.parameterization = scale_factor, "eps"
        for name, value in DEFAULTS.items():
            setattr(self, name, config.get(name, value))
        self.model = named(diffusion_model=instantiate_from_config(unet_config))
        self.first_stage_model = instantiate_from_config(first_stage_config).eval().requires_grad_(False)
        self.cond_stage_model = instantiate_from_config(cond_stage_config)
        self.register_schedule(None, "linear", timesteps, self.linear_start, self.linear_end)
        self._register_load_state_dict_pre_hook(self.unpack_words)

    def register_schedule(
        self, given_betas=None, beta_schedule="linear", timesteps=1000, linear_start=1e-4, linear_end=2e-2
    ):
        """The constants of Ho et al. 2020 as float32 buffers [T], by the checkpoints' names, from given betas [T] or,
        "linear" in latent diffusion's terms, those linear in sqrt(beta)."""
        if given_betas is None and beta_schedule != "linear":
            raise ValueError(f"beta_schedule {beta_schedule!r}: give the betas themselves")
        betas = torch.linspace(linear_start**0.5, linear_end**0.5, timesteps, dtype=torch.float64) ** 2
        betas = betas if given_betas is None else torch.as_tensor(given_betas, dtype=torch.float64)
        self.num_timesteps, device = len(betas), next(self.model.parameters()).device
        abar = torch.cumprod(1.0 - betas, dim=0)
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
            "posterior_mean_coef2": (1.0 - abar_prev) * (1.0 - betas).sqrt() / (1.0 - abar),
        }
        self.schedule_names = tuple(constants)
        for name, values in constants.items():
            self.register_buffer(name, values.float().to(device))
        self.register_buffer("logvar", torch.zeros(len(betas), device=device), persistent=False)

    def unpack_words(self, state_dict, prefix="", *unused):
        """A small checkpoint has the text encoder's rows for the ids `known_words`; other words get their mean."""
        known, rows = state_dict.pop(prefix + "known_words", None), state_dict.get(prefix + TABLE)
        if known is not None and rows is not None:
            table = self.cond_stage_model.transformer.get_input_embeddings().weight.detach().clone()
            rows = rows.view(len(known), table.shape[1])  # else a RuntimeError, before anything large is made
            table[: self.cond_stage_model.tokenizer.vocab_size] = rows.float().mean(0)  # words that were added stay
            table[known.long()] = rows.to(table)
            state_dict[prefix + TABLE] = table

    def _apply(self, fn, *args, **kwargs):
        """model.half() and the like move the schedule, but leave it in float32."""
        before = {name: self._buffers[name] for name in self.schedule_names}
        super()._apply(fn, *args, **kwargs)
        self._buffers.update({name: values.to(self._buffers[name].device) for name, values in before.items()})
        return self

    device = property(lambda self: self.betas.device)
    dtype = property(lambda self: next(self.model.parameters()).dtype)

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
    def decode_first_stage(self, z, predict_cids=False, force_not_quantize=False, tiled=None):
        """Latents -> images, one at a time; tiled: see AutoencoderKL.decode. No code is predicted or quantised."""
        dtype = next(self.first_stage_model.parameters()).dtype
        return self.first_stage_model.decode((z / self.scale_factor).to(dtype), tiled).to(z.dtype)

    def q_sample(self, x_start, t, noise=None):
        """x_t ~ q(x_t | x_0) = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps (Ho et al. 2020, eq. 4); t int64 [B]."""
        noise = torch.randn_like(x_start) if noise is None else noise
        a, s = (c[t][:, None, None, None] for c in (self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod))
        return (a * x_start + s * noise).to(x_start.dtype)

    def remember(self, cond, every=1, perturbed=0):
        """A conditioning [B, 77, C] as the Memory of a sampling run, whose batch it has; itself for other networks."""
        ours = isinstance(self.model.diffusion_model, UNetModel)
        return Memory(cond.to(self.dtype), every, perturbed) if ours else cond

    def apply_model(self, x_noisy, t, cond):
        """eps predicted from x_t, t [B] (may be fractions) and cond: a tensor, a list, {"c_crossattn": list}, or what
        `remember` made of one."""
        cond = cond if isinstance(cond, Memory) else as_tensor(cond).to(self.dtype)
        return self.model.diffusion_model(x_noisy.to(self.dtype), t, cond).to(x_noisy.dtype)

    def p_losses(self, x_start, cond, t, noise=None):
        """(loss, dict of parts): mean squared error of the predicted eps (Ho et al. 2020, eq. 14)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        loss = self.get_loss(self.apply_model(self.q_sample(x_start, t, noise), t, cond).float(), noise.float())
        prefix = "train" if self.training else "val"
        return loss, {f"{prefix}/loss_simple": loss.detach(), f"{prefix}/loss": loss.detach()}

    def forward(self, x, c):
        """p_losses of latents x at times drawn from 0 .. T-1; c: conditionings, or prompts if cond_stage_trainable."""
        c = self.get_learned_conditioning(c) if self.cond_stage_trainable else c
        return self.p_losses(x, c, torch.randint(self.num_timesteps, (len(x),), device=x.device))
