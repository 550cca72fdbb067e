"""What the samplers share: classifier-free guidance, and the call that CompVis's samplers have."""

import torch
from tqdm import tqdm

LAST, EVERY = 0.4, 2  # of the fast mode: the part of the times without guidance, and how often all blocks run


def guided(model, cond, unconditional_conditioning=None, unconditional_guidance_scale=1.0, fast=False, pag=0.0):
    """eps(x_t, t) of `model` under classifier-free guidance, eps_u + scale (eps_c - eps_u) (Ho & Salimans 2022, eq. 6);
    perturbed-attention guidance adds pag (eps_c - eps_p), eps_p with self-attention perturbed (Ahn et al. 2024).

    Scale 1, or no unconditional one, is the conditional model, without `pag`. Conditionings: [B, 77, C], or [1, 77, C]
    for the whole batch (a list, or {"c_crossattn": list}, will do). All go through the network as one batch [uncond;
    cond; cond]; of the prompt everything is computed once. `fast` does less, at some cost in quality: no guidance at
    the LAST times (Golnari et al. 2023), deep features anew at every EVERYth step alone (DeepCache, Ma et al. 2024).
    """
    cond, uncond, scale = as_tensor(cond), as_tensor(unconditional_conditioning), unconditional_guidance_scale
    remember, memories = getattr(model, "remember", lambda c, *_: c), {}

    def eps_model(x, t):
        alone = uncond is None or scale == 1.0 or fast and t < LAST * model.num_timesteps
        parts = [cond] if alone else [uncond, cond, cond] if pag else [uncond, cond]
        n = len(parts)
        if (n, len(x)) not in memories:
            c = torch.cat([c.expand(len(x), -1, -1) for c in parts])
            memories[n, len(x)] = remember(c, EVERY if fast else 1, len(x) if n == 3 else 0)
        t = torch.full((n * len(x),), float(t), device=x.device)
        eps_u, *eps = model.apply_model(torch.cat([x] * n), t, memories[n, len(x)]).chunk(n)
        return eps_u if alone else eps_u + scale * (eps[0] - eps_u) + pag * (eps[0] - eps[-1])  # 0 of two

    return eps_model


def uniform_times(T, steps):
    """The times 1 + floor(i T / steps), i = 0 .. steps - 1: those of DDIM in CompVis's code where T is a multiple."""
    if not 1 <= steps < T:
        raise ValueError(f"{steps} steps: take 1 to {T - 1}")
    return [1 + i * T // steps for i in range(steps)]


def as_tensor(cond):
    """A conditioning in any form that CompVis's code takes, as one tensor [B, M, C]."""
    cond = cond["c_crossattn"] if isinstance(cond, dict) else cond
    return torch.cat(list(cond), dim=1) if isinstance(cond, (list, tuple)) else cond


class Sampler:
    """`sample` as CompVis has it, over the generator `steps(eps_model, x_T, S, eta, noise)` of a subclass."""

    OPTIONS = "eta x_T noise unconditional_guidance_scale unconditional_conditioning fast pag".split()
    KEEPS = True  # whether `sample` returns intermediates

    def __init__(self, model, schedule="linear", **unused):
        self.model = model

    @torch.no_grad()
    def trajectory(self, S, batch_size, shape, conditioning=None, eta=0.0, x_T=None, noise=None, **guidance):
        """A generator of (t, x_t, x_0 prediction), S items; shape is [C, H/8, W/8] of one latent; guidance: see guided.
        x_T: [B, *shape], else drawn. `noise()` gives normal noise [B, *shape], for x_T and for stochastic steps; by
        default it comes from the generator of the model's device, as in CompVis's code."""
        device = self.model.device
        draw = noise if noise is not None else lambda: torch.randn(batch_size, *shape, device=device)
        x = (draw() if x_T is None else x_T).to(device)
        yield from self.steps(guided(self.model, conditioning, **guidance), x, S, eta, lambda: draw().to(x))

    def sample(self, S, batch_size, shape, conditioning=None, callback=None, img_callback=None, **options):
        """(latents [B, C, H/8, W/8], intermediates or None) after S steps. Of the options those of `trajectory`,
        `verbose` and `log_every_t` are used, CompVis's others ignored."""
        for name in ("mask", "score_corrector"):
            if options.get(name) is not None:
                raise ValueError(f"sample: {name} is not supported")
        chosen = {k: options[k] for k in self.OPTIONS if k in options}
        items = self.trajectory(S, batch_size, shape, conditioning, **chosen)
        first = [options["x_T"]] if options.get("x_T") is not None else []
        inter, every = {"x_inter": first, "pred_x0": list(first)}, options.get("log_every_t", 100)
        bar = tqdm(items, total=S, desc=type(self).__name__, disable=not options.get("verbose", True))
        for i, (_, x, x_0) in enumerate(bar):
            if callback:
                callback(i)
            if img_callback:
                img_callback(x_0, i)
            if i % every == 0 or i == S - 1:
                inter["x_inter"].append(x)
                inter["pred_x0"].append(x_0)
        return x, inter if self.KEEPS else None
