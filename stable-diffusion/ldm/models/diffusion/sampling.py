"""What the samplers share: classifier-free guidance, and the call that CompVis's samplers have."""

from __future__ import annotations

import torch
from tqdm import tqdm


def guided(model, cond, uncond=None, scale=1.0):
    """eps(x_t, t) of `model` under classifier-free guidance, eps_u + scale (eps_c - eps_u) (Ho & Salimans 2022, eq. 6).

    Scale 1, or no `uncond`, is the conditional model. cond and uncond: [B, 77, C], or [1, 77, C] for the whole batch (a
    list, or {"c_crossattn": list}, will do). The two go through the network as one batch [uncond; cond].
    """
    cond, uncond = _tensor(cond), _tensor(uncond)

    def eps_model(x, t):
        t = torch.full((len(x),), float(t), device=x.device)
        c = cond.expand(len(x), -1, -1)
        if uncond is None or scale == 1.0:
            return model.apply_model(x, t, c)
        both = torch.cat([uncond.expand(len(x), -1, -1), c])
        eps_u, eps_c = model.apply_model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return eps_u + scale * (eps_c - eps_u)

    return eps_model


def _tensor(cond):
    if isinstance(cond, dict):
        cond = cond["c_crossattn"]
    return torch.cat(list(cond), dim=1) if isinstance(cond, (list, tuple)) else cond


class Sampler:
    """`sample` as CompVis has it, over the generator `steps(eps_model, x_T, S, eta, noise)` of a subclass."""

    def __init__(self, model, **unused):
        self.model = model

    @torch.no_grad()
    def trajectory(
        self,
        S,
        batch_size,
        shape,
        conditioning=None,
        unconditional_guidance_scale=1.0,
        unconditional_conditioning=None,
        eta=0.0,
        x_T=None,
        noise=None,
    ):
        """A generator of (t, x_t, x_0 prediction), S items; shape is [C, H/8, W/8] of one latent.

        x_T: [B, *shape], else drawn. `noise()` gives normal noise [B, *shape]: x_T, and that of stochastic steps.
        """
        device = self.model.device
        draw = noise if noise is not None else lambda: torch.randn(batch_size, *shape)
        x = (draw() if x_T is None else x_T).to(device)
        eps_model = guided(self.model, conditioning, unconditional_conditioning, unconditional_guidance_scale)
        yield from self.steps(eps_model, x, S, eta, lambda: draw().to(x))

    def sample(
        self,
        S,
        batch_size,
        shape,
        conditioning=None,
        callback=None,
        img_callback=None,
        eta=0.0,
        verbose=True,
        x_T=None,
        log_every_t=100,
        unconditional_guidance_scale=1.0,
        unconditional_conditioning=None,
        noise=None,
        mask=None,
        score_corrector=None,
        **unused,
    ):
        """(latents [B, C, H/8, W/8], intermediates or None) after S steps; the arguments are those of `trajectory`."""
        if mask is not None or score_corrector is not None:
            raise ValueError("sample: mask (inpainting) and score_corrector are not supported")
        inter = {"x_inter": [] if x_T is None else [x_T], "pred_x0": [] if x_T is None else [x_T]}
        items = self.trajectory(
            S,
            batch_size,
            shape,
            conditioning,
            unconditional_guidance_scale,
            unconditional_conditioning,
            eta,
            x_T,
            noise,
        )
        for i, (_, x, x_0) in enumerate(tqdm(items, total=S, desc=type(self).__name__, disable=not verbose)):
            if callback:
                callback(i)
            if img_callback:
                img_callback(x_0, i)
            if i % log_every_t == 0 or i == S - 1:
                inter["x_inter"].append(x)
                inter["pred_x0"].append(x_0)
        return x, self.intermediates(inter)

    def intermediates(self, collected):
        return collected
