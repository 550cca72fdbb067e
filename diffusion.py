"""Ground floor: the mathematics of diffusion models, free of networks, data and files.

    alpha_bar = schedule("linear", 1000)
    for t, x_t, x_0 in dpm_solver_pp(eps_model, x_T, alpha_bar, timesteps(1000, 20)):
        ...                                     # every step of the reverse process; the last x_t is the picture

Notation (DDPM, Ho et al. 2020): x_0 is data in [-1, 1]; alpha_bar: float64 [T], the product of 1 - beta;
x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps with t in 0 .. T-1. "Time -1" is the data itself, alpha_bar = 1.

A sampler is a generator of (t, x_t, x_0 prediction), one item for every network evaluation: t is the time just reached.
`eps_model(x_t, t)` takes [B, C, H, W] and the int t, the same for the whole batch, and returns the predicted noise
[B, C, H, W]; `time_batch` is that t for a network that wants it as a tensor.

Schedules are float64 on the CPU and stay there: what depends on t is computed from them before it meets a picture,
which may be on a device without float64. So nothing is ever read back from a device, which would have to finish first.
"""

from __future__ import annotations

import math

import torch

# ------------------------------------------------------------------------ the forward process


def schedule(name="linear", T=1000):
    """alpha_bar, float64 [T].

    "linear": betas from 1e-4 to 2e-2 at T = 1000, scaled by 1000/T for others (Ho et al. 2020, section 4).
    "cosine": alpha_bar = f(t+1)/f(0), f(t) = cos^2((t/T + s)/(1 + s) pi/2), s = 0.008, betas at most 0.999 (Nichol &
    Dhariwal 2021, eq. 17).
    """
    if name == "linear":
        beta = torch.linspace(1e-4 * 1000 / T, 2e-2 * 1000 / T, T, dtype=torch.float64).clamp(max=0.999)
    elif name == "cosine":
        f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f"schedule {name!r}: take linear or cosine")
    return torch.cumprod(1 - beta, dim=0)


def alpha_sigma(alpha_bar, t):
    """(sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t)): of an int t, floats (t = -1: 1, 0); of int64 [B] on the CPU, float64
    [B, 1, 1, 1], to be brought to the pictures by `beside`."""
    if isinstance(t, int):
        a = float(alpha_bar[t]) if t >= 0 else 1.0
        return math.sqrt(a), math.sqrt(1 - a)
    a = alpha_bar[t].view(-1, 1, 1, 1)
    return a.sqrt(), (1 - a).sqrt()


def beside(x, *values):
    """CPU tensors on the device and in the floating-point precision of x, without waiting for the device."""
    return [v.to(x.dtype).to(x.device, non_blocking=True) for v in values]


def q_sample(x_0, t, eps, alpha_bar):
    """x_t ~ q(x_t | x_0) for the noise eps (Ho et al. 2020, eq. 4): [B, C, H, W], t int64 [B] on the CPU."""
    a, s = beside(x_0, *alpha_sigma(alpha_bar, t))
    return a * x_0 + s * eps


def training_loss(
    model, x_0, alpha_bar, objective="eps", min_snr=None, t=None, eps=None, perturb=0.0, teacher=None, plus=0.0
):
    """The simple loss (Algorithm 1 and eq. 14 of Ho et al. 2020), one value per image: [B], float32.

    t, int64 [B] on the CPU, is by default uniform over all T times, 0 and T-1 among them; the model gets it on the
    device of x_0. `model(x_t, t)` predicts eps, or with objective "v" the velocity v = sqrt(alpha_bar) eps - sqrt(1 -
    alpha_bar) x_0 (Salimans & Ho 2022). `min_snr` = gamma caps the weight that the loss gives to x_0 errors at
    min(SNR + plus, gamma) (Hang et al. 2023, section 3.4; with plus 1 they weigh what they weigh in v, where there is
    more noise than picture: Salimans & Ho 2022, section 4); None is the plain mean squared error. `perturb` = gamma
    adds gamma times other noise to the input's, of which the target knows nothing: input perturbation (Ning et al.
    2023, algorithm 1), against the errors that sampling piles up. With a `teacher` the target is teacher(x_t, t), [B,
    C, H, W].
    """
    if t is None:
        t = torch.randint(len(alpha_bar), (len(x_0),))
    if eps is None:
        eps = torch.randn_like(x_0)
    noise = eps + perturb * torch.randn_like(eps) if perturb else eps
    alpha, sigma = alpha_sigma(alpha_bar, t)
    a, s = beside(x_0, alpha, sigma)
    x_t, times = q_sample(x_0, t, noise, alpha_bar), t.to(x_0.device, non_blocking=True)
    target = teacher(x_t, times).float() if teacher else eps if objective == "eps" else a * eps - s * x_0
    loss = (model(x_t, times).float() - target).square().flatten(1).mean(1)
    if min_snr is not None:
        snr = (alpha / sigma).square().flatten()
        weight = (snr + plus).clamp(max=min_snr) / (snr if objective == "eps" else snr + 1)
        loss = loss * beside(loss, weight)[0]
    return loss


def time_shares(alpha_bar, mean, std, uniform=0.1):
    """How often a training is to take each time, float64 [T], of sum 1: log(sqrt(1 - alpha_bar) / sqrt(alpha_bar)) is
    normal with that mean and deviation (Karras et al. 2022, table 1: -1.2 and 1.2), but for a share that is `uniform`.

    Uniform times spend themselves on noise: of the linear schedule's 1000, the upper 500 have an SNR below 0.09.
    """
    log_sigma = 0.5 * torch.log((1 - alpha_bar) / alpha_bar)
    log_density = -0.5 * ((log_sigma - mean) / std) ** 2
    share = torch.exp(log_density - log_density.max()) * torch.gradient(log_sigma)[0]
    return (1 - uniform) * share / share.sum() + uniform / len(share)


# ------------------------------------------------------------------------ what the samplers call


def eps_from_v(v_model, alpha_bar):
    """Makes an eps_model of a network that predicts v: eps = sqrt(alpha_bar) v + sqrt(1 - alpha_bar) x_t (Salimans &
    Ho 2022, appendix D)."""

    def eps_model(x_t, t):
        a, s = alpha_sigma(alpha_bar, t)
        return a * v_model(x_t, t) + s * x_t

    return eps_model


def guided(eps_cond, eps_both, scale, interval=(0, 10**9)):
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6) as an eps_model: eps = eps_u + scale (eps_c - eps_u).

    scale 1 is the conditional model, 0 the unconditional one; the paper's w is scale - 1. A tensor [B, 1, 1, 1] gives
    each picture its own. Guidance acts only at times interval[0] <= t < interval[1] (Kynkaanniemi et al. 2024);
    outside, one evaluation is saved. `eps_cond(x_t, t)` gives eps_c, `eps_both(x_t, t)` gives (eps_c, eps_u).
    """
    none = not torch.is_tensor(scale) and scale == 1

    def eps_model(x_t, t):
        if none or not interval[0] <= t < interval[1]:
            return eps_cond(x_t, t)
        eps_c, eps_u = eps_both(x_t, t)
        return eps_u + scale * (eps_c - eps_u)

    return eps_model


def timesteps(T, steps, spacing="trailing"):
    """The times a sampler visits: `steps` + 1 decreasing ints, the last one being where it stops.

    "trailing": from T-1 in equal strides to -1, the data (Lin et al. 2024, section 3.3).
    "course":   1 + multiples of T // steps, downwards, ending at 0: 981, 961, ..., 1, 0 for 50 of 1000 (the course's
    DDIM).
    """
    if not 1 <= steps <= T:
        raise ValueError(f"{steps} steps: take 1 to {T}")
    if spacing == "trailing":
        return [round(T * (steps - i) / steps) - 1 for i in range(steps + 1)]
    if spacing == "course":
        if steps == T:
            raise ValueError(f"{steps} steps: the course's spacing takes fewer than {T}")
        return [1 + i * (T // steps) for i in reversed(range(steps))] + [0]
    raise ValueError(f"spacing {spacing!r}: take trailing or course")


def predict_x0(x_t, eps, a, s, clip=True):
    """x_0 = (x_t - sigma eps) / alpha (Ho et al. 2020, eq. 15), clamped to [-1, 1] when `clip`."""
    x_0 = (x_t - s * eps) / a
    return x_0.clamp(-1, 1) if clip else x_0


def run(process):
    """The final x_t of a sampler: [B, C, H, W]."""
    for item in process:
        final = item[1]
    return final


def time_batch(x_t, t):
    """The int t of every picture of x_t, for a network that wants it as a tensor: int64 [B]."""
    return torch.full((len(x_t),), t, dtype=torch.long, device=x_t.device)


# ------------------------------------------------------------------------ samplers


@torch.no_grad()
def ddpm(eps_model, x_t, alpha_bar, times, noise=None, clip=True, variance="small"):
    """Ancestral sampling (Algorithm 2 of Ho et al. 2020), with skipped times as Nichol & Dhariwal 2021, section 4.

    x_s is drawn from q(x_s | x_t, x_0) with the predicted x_0 (eq. 6, 7); variance "small" is that posterior's (beta
    tilde), "large" is beta_t. `noise()` gives [B, C, H, W], as utils.noise_stream does.
    """
    noise = noise or (lambda: torch.randn_like(x_t))
    for t, s in zip(times[:-1], times[1:]):
        (a_t, s_t), (a_s, s_s) = alpha_sigma(alpha_bar, t), alpha_sigma(alpha_bar, s)
        x_0 = predict_x0(x_t, eps_model(x_t, t), a_t, s_t, clip)
        beta = 1 - (a_t / a_s) ** 2
        x_t = a_s * beta / s_t**2 * x_0 + (a_t / a_s) * s_s**2 / s_t**2 * x_t
        if s >= 0:
            sigma = math.sqrt(beta) if variance == "large" else math.sqrt(beta) * s_s / s_t
            x_t = x_t + sigma * noise()
        yield s, x_t, x_0


@torch.no_grad()
def ddim(eps_model, x_t, alpha_bar, times, eta=0.0, noise=None, clip=True):
    """DDIM (Song et al. 2021, eq. 12 with the sigma of eq. 16): eta 0 is deterministic, eta 1 over all T times is
    `ddpm`.

    When x_0 is clipped, eps stays as predicted, as in the course's reference.
    """
    noise = noise or (lambda: torch.randn_like(x_t))
    for t, s in zip(times[:-1], times[1:]):
        (a_t, s_t), (a_s, s_s) = alpha_sigma(alpha_bar, t), alpha_sigma(alpha_bar, s)
        eps = eps_model(x_t, t)
        x_0 = predict_x0(x_t, eps, a_t, s_t, clip)
        sigma = eta * s_s / s_t * math.sqrt(max(0.0, 1 - (a_t / a_s) ** 2))
        x_t = a_s * x_0 + math.sqrt(max(0.0, s_s**2 - sigma**2)) * eps
        if sigma > 0:
            x_t = x_t + sigma * noise()
        yield s, x_t, x_0


@torch.no_grad()
def dpm_solver_pp(eps_model, x_t, alpha_bar, times, clip=True):
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): second order, one evaluation a step, deterministic.

    With lambda = log(alpha/sigma), h = lambda_s - lambda_t and D extrapolated from the last two x_0 predictions,
    x_s = sigma_s/sigma_t x_t - alpha_s (exp(-h) - 1) D. First and last step are of first order (the last one, to the
    data, must be: h is infinite there, and x_s = D).
    """
    before = None  # x_0 prediction and lambda of the step before
    for t, s in zip(times[:-1], times[1:]):
        (a_t, s_t), (a_s, s_s) = alpha_sigma(alpha_bar, t), alpha_sigma(alpha_bar, s)
        x_0 = predict_x0(x_t, eps_model(x_t, t), a_t, s_t, clip)
        lambda_t = math.log(a_t / s_t)
        D = x_0
        if before is not None and s_s > 0:
            r = (lambda_t - before[1]) / (math.log(a_s / s_s) - lambda_t)
            D = x_0 + (x_0 - before[0]) / (2 * r)
        x_t = s_s / s_t * x_t + (a_s - a_t * s_s / s_t) * D  # alpha_s exp(-h) = alpha_t sigma_s / sigma_t
        before = x_0, lambda_t
        yield s, x_t, x_0


# ------------------------------------------------------------------------ between two noises


def slerp(a, b, alpha):
    """Spherical interpolation (Shoemake 1985) of two noises of one shape, over all their elements; alpha 0 gives a,
    1 gives b.

    sin((1-alpha) theta)/sin(theta) a + sin(alpha theta)/sin(theta) b, theta = arccos(<a, b>/(|a| |b|)), in float64 on
    the CPU; parallel vectors fall back to `lerp`. Equal norms keep their norm: noise stays at the radius,
    sqrt(dimension), that the network knows.
    """
    if alpha in (0, 1):
        return (b if alpha else a).clone()
    x, y = a.cpu().double(), b.cpu().double()
    cosine = (x.flatten() @ y.flatten() / (x.norm() * y.norm())).clamp(-1, 1)
    theta = torch.arccos(cosine)
    if torch.sin(theta) < 1e-6:
        return lerp(a, b, alpha)
    return ((torch.sin((1 - alpha) * theta) * x + torch.sin(alpha * theta) * y) / torch.sin(theta)).to(a)


def lerp(a, b, alpha):
    """Linear interpolation (1 - alpha) a + alpha b; of two independent noises, at 0.5, it has only 0.71 of their
    norm."""
    return (1 - alpha) * a + alpha * b
