"""The mathematics against closed forms, and against diffusers' schedulers where they are installed."""

import math

import pytest
import torch

from diffusion import (
    alpha_sigma,
    ddim,
    ddpm,
    dpm_solver_pp,
    eps_from_v,
    guided,
    q_sample,
    run,
    schedule,
    time_shares,
    timesteps,
    training_loss,
)

ALPHA_BAR = schedule("linear", 1000)
MU, STD = 0.3, 0.2  # the Gaussian "data" of the closed forms


def gaussian_eps(alpha_bar, mu=MU, std=STD):
    """The optimal eps for x_0 ~ N(mu, std^2): sigma (x_t - alpha mu) / (alpha^2 std^2 + sigma^2)."""

    def eps_model(x_t, t):
        a, s = alpha_sigma(alpha_bar, t)
        return s * (x_t - a * mu) / (a**2 * std**2 + s**2)

    return eps_model


def exact_flow(x_T, alpha_bar, t, mu=MU, std=STD):
    """Where the probability flow of that Gaussian takes x_T from time t: it keeps (x - alpha mu) / total deviation."""
    a, s = alpha_sigma(alpha_bar, t)
    return mu + std * (x_T - a * mu) / math.sqrt(a**2 * std**2 + s**2)


def noise(n, seed=0):
    return torch.randn(n, 1, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------ schedules and the forward process


def test_linear_schedule_is_the_running_product_of_one_minus_beta():
    beta = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
    assert ALPHA_BAR.dtype == torch.float64
    assert ALPHA_BAR[0] == pytest.approx(1 - 1e-4)
    assert math.log(ALPHA_BAR[-1]) == pytest.approx(sum(math.log(1 - float(b)) for b in beta))


def test_cosine_schedule_follows_its_formula_until_the_beta_clip():
    alpha_bar = schedule("cosine", 1000)
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    assert alpha_bar[499] == pytest.approx(f[500] / f[0])
    assert (alpha_bar[1:] < alpha_bar[:-1]).all() and alpha_bar[-1] > 0


def test_unknown_schedule_and_step_counts_are_refused():
    with pytest.raises(ValueError, match="linear or cosine"):
        schedule("sigmoid")
    for steps in (0, 1001):
        with pytest.raises(ValueError, match="1 to 1000"):
            timesteps(1000, steps)


def test_q_sample_has_the_mean_and_variance_of_eq_4():
    x_0 = torch.full((200_000, 1, 1, 1), 0.5)
    t = torch.full((200_000,), 300)
    x_t = q_sample(x_0, t, torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)), ALPHA_BAR)
    assert x_t.mean() == pytest.approx(0.5 * math.sqrt(ALPHA_BAR[300]), abs=0.01)
    assert x_t.var() == pytest.approx(1 - float(ALPHA_BAR[300]), rel=0.02)


def test_training_draws_every_time_from_0_to_T_minus_1():
    torch.manual_seed(0)
    seen = set()

    def model(x_t, t):
        seen.update(t.tolist())
        return x_t

    training_loss(model, torch.zeros(500, 1, 1, 1), schedule("linear", 10))
    assert seen == set(range(10))


@pytest.mark.parametrize("objective", ["eps", "v"])
def test_the_loss_vanishes_for_a_perfect_prediction(objective):
    x_0, eps, t = torch.randn(8, 3, 4, 4), torch.randn(8, 3, 4, 4), torch.arange(0, 800, 100)
    a, s = alpha_sigma(ALPHA_BAR, t)
    target = eps if objective == "eps" else a * eps - s * x_0
    assert training_loss(lambda x_t, t: target, x_0, ALPHA_BAR, objective, 5.0, t, eps).max() < 1e-10


def test_a_teacher_sees_the_input_and_its_prediction_is_the_target():
    x_0, t = torch.randn(8, 3, 4, 4), torch.arange(0, 800, 100)

    def teacher(x_t, t):
        return 2 * x_t + t.view(-1, 1, 1, 1)

    loss = training_loss(
        lambda x_t, t: teacher(x_t, t) + 0.5, x_0, ALPHA_BAR, "v", None, t, perturb=0.3, teacher=teacher
    )
    assert torch.allclose(loss, torch.tensor(0.25), rtol=1e-3)


@pytest.mark.parametrize("plus", [0.0, 1.0])
@pytest.mark.parametrize("objective", ["eps", "v"])
def test_min_snr_weight_is_min_of_snr_and_gamma_on_the_x_0_error(objective, plus):
    """A prediction off by d means x_0 off by (s/a) d for eps and s d for v: its square weighs min(SNR + plus, 5)."""
    x_0, eps, t = torch.randn(4, 3, 4, 4), torch.randn(4, 3, 4, 4), torch.tensor([0, 100, 400, 999])
    a, s = (v.flatten() for v in alpha_sigma(ALPHA_BAR, t))

    def model(x_t, t):
        target = eps if objective == "eps" else a.view(-1, 1, 1, 1) * eps - s.view(-1, 1, 1, 1) * x_0
        return target + 0.1

    x_0_error = 0.1 * (s / a if objective == "eps" else s)
    expected = x_0_error**2 * ((a / s).square() + plus).clamp(max=5)
    loss = training_loss(model, x_0, ALPHA_BAR, objective, 5.0, t, eps, plus=plus)
    assert torch.allclose(loss.double(), expected, rtol=1e-3)


def test_time_shares_make_log_sigma_normal_but_for_a_uniform_part():
    log_sigma = torch.log(ALPHA_BAR.rsqrt().square() - 1) / 2
    share = time_shares(ALPHA_BAR, mean=-0.5, std=0.8, uniform=0.0)
    mean = (share * log_sigma).sum()
    assert share.sum() == pytest.approx(1)
    assert mean == pytest.approx(-0.5, abs=0.01)
    assert (share * (log_sigma - mean) ** 2).sum().sqrt() == pytest.approx(0.8, abs=0.01)
    assert time_shares(ALPHA_BAR, 10, 0.1).argmax() == len(ALPHA_BAR) - 1  # beyond the schedule
    assert torch.allclose(time_shares(ALPHA_BAR, -0.5, 0.8, uniform=0.25), 0.75 * share + 0.25 / len(share))


def test_input_perturbation_adds_noise_of_which_the_target_knows_nothing():
    """For data 0 the input is s (eps + 0.5 xi): its deviation grows to s sqrt(1.25), and eps stays the target."""
    t, eps, seen = torch.full((64,), 400), torch.randn(64, 3, 8, 8), []
    loss = training_loss(
        lambda x_t, t: seen.append(x_t) or eps, torch.zeros_like(eps), ALPHA_BAR, t=t, eps=eps, perturb=0.5
    )
    s = alpha_sigma(ALPHA_BAR, 400)[1]
    assert loss.max() == 0
    assert seen[0].std() == pytest.approx(s * 1.25**0.5, rel=0.02)
    assert (seen[0] / s - eps).std() == pytest.approx(0.5, rel=0.02)


# ------------------------------------------------------------------------ samplers on a Gaussian


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ancestral_sampling_gives_the_data_back(name, variance):
    alpha_bar = schedule(name)
    x_T, g = noise(20_000), torch.Generator().manual_seed(1)

    def fresh():
        return torch.randn(x_T.shape, generator=g, dtype=torch.float64)

    x = run(ddpm(gaussian_eps(alpha_bar), x_T, alpha_bar, timesteps(1000, 1000), fresh, clip=False, variance=variance))
    assert x.mean() == pytest.approx(MU, abs=0.01)
    assert x.std() == pytest.approx(STD, rel=0.03)


@pytest.mark.parametrize("sampler, order", [(ddim, 1), (dpm_solver_pp, 2)])
def test_deterministic_samplers_converge_at_their_order(sampler, order):
    """The error against the exact flow, from time T-1 to time 99, falls like steps^-order."""
    x_T, stop = noise(200), 99
    a, s = alpha_sigma(ALPHA_BAR, stop)
    exact = exact_flow(x_T, ALPHA_BAR, 999)
    exact = a * MU + math.sqrt(a**2 * STD**2 + s**2) * (exact - MU) / STD
    errors = []
    for steps in (60, 120):
        times = [999 - round(900 * i / steps) for i in range(steps + 1)]
        x = run(sampler(gaussian_eps(ALPHA_BAR), x_T, ALPHA_BAR, times, clip=False))
        errors.append((x - exact).abs().max().item())
    measured = math.log2(errors[0] / errors[1])
    assert order - 0.35 < measured < order + 0.6, errors


def test_dpm_solver_is_nearer_to_the_exact_flow_than_ddim():
    x_T = noise(1000)
    exact = exact_flow(x_T, ALPHA_BAR, 999)

    def error(sampler):
        x = run(sampler(gaussian_eps(ALPHA_BAR), x_T, ALPHA_BAR, timesteps(1000, 50), clip=False))
        return (x - exact).abs().max().item()

    assert error(dpm_solver_pp) < 0.5 * error(ddim)


@pytest.mark.parametrize("sampler", [ddim, ddpm, dpm_solver_pp])
def test_x_0_is_clipped_to_the_range_of_images(sampler):
    process = list(sampler(gaussian_eps(ALPHA_BAR, mu=3.0), noise(50), ALPHA_BAR, timesteps(1000, 10)))
    assert all(x_0.abs().max() <= 1 for _, _, x_0 in process)
    assert [t for t, _, _ in process] == timesteps(1000, 10)[1:]
    assert process[-1][1].abs().max() <= 1


def test_course_spacing_visits_981_down_to_1_and_stops_at_0():
    times = timesteps(1000, 50, "course")
    assert times[:3] == [981, 961, 941] and times[-3:] == [21, 1, 0] and len(times) == 51


def test_trailing_spacing_starts_at_pure_noise_and_ends_at_the_data():
    for steps in (1, 7, 12, 1000):
        times = timesteps(1000, steps)
        assert times[0] == 999 and times[-1] == -1 and len(times) == steps + 1
        assert all(a > b for a, b in zip(times, times[1:]))


# ------------------------------------------------------------------------ guidance and v


def test_guidance_scale_1_is_conditional_0_unconditional_and_w_is_scale_minus_1():
    x, t = torch.zeros(2, 1, 1, 1), 500
    c, u = torch.full_like(x, 3.0), torch.full_like(x, 1.0)
    for scale, expected in ((1.0, 3.0), (0.0, 1.0), (2.5, 1.0 + 2.5 * 2.0)):
        assert guided(lambda x, t: c, lambda x, t: (c, u), scale)(x, t).eq(expected).all()
    w = 1.5
    assert guided(lambda x, t: c, lambda x, t: (c, u), 1 + w)(x, t).eq((1 + w) * c - w * u).all()
    each = torch.tensor([1.0, 2.5]).view(-1, 1, 1, 1)  # a picture's own
    assert guided(lambda x, t: c, lambda x, t: (c, u), each)(x, t).flatten().tolist() == [3.0, 6.0]


def test_outside_its_interval_guidance_costs_nothing_and_does_nothing():
    calls = []

    def both(x, t):
        calls.append(t)
        return x + 1, x

    eps_model = guided(lambda x, t: x + 1, both, 3.0, (200, 800))
    x = torch.zeros(1, 1, 1, 1)
    values = [eps_model(x, t).item() for t in (900, 800, 799, 200, 199)]
    assert values == [1, 1, 3, 3, 1] and calls == [799, 200]


def test_v_prediction_and_eps_prediction_are_the_same_model():
    x_0, eps = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    for t in (0, 10, 500, 999):
        a, s = alpha_sigma(ALPHA_BAR, t)
        recovered = eps_from_v(lambda x, t: a * eps - s * x_0, ALPHA_BAR)(a * x_0 + s * eps, t)  # noqa: B023
        assert torch.allclose(recovered, eps, atol=1e-5)


# ------------------------------------------------------------------------ against diffusers


class SmallNetwork(torch.nn.Module):
    """A fixed smooth function of x and t with values of eps's size."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)

    @torch.no_grad()
    def forward(self, x, t):
        return torch.tanh(self.conv(x) * (1 + t / 1000)) + 0.5 * x


def diffusers_run(scheduler, model, x, steps, noises=None, **kwargs):
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        eps = model(x, int(t))
        extra = dict(kwargs, variance_noise=noises()) if noises else kwargs
        x = scheduler.step(eps, t, x, **extra).prev_sample
    return x


def test_dpm_solver_agrees_with_diffusers():
    diffusers = pytest.importorskip("diffusers")
    model, x_T = SmallNetwork(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for steps in (8, 20):
        scheduler = diffusers.DPMSolverMultistepScheduler(
            beta_start=1e-4, beta_end=2e-2, timestep_spacing="trailing", final_sigmas_type="zero"
        )
        theirs = diffusers_run(scheduler, model, x_T, steps)
        assert scheduler.timesteps.tolist() == timesteps(1000, steps)[:-1]
        ours = run(dpm_solver_pp(model, x_T, ALPHA_BAR, timesteps(1000, steps), clip=False))
        assert torch.allclose(ours.float(), theirs, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim_agrees_with_diffusers(eta):
    diffusers = pytest.importorskip("diffusers")
    model, x_T = SmallNetwork(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    scheduler = diffusers.DDIMScheduler(
        beta_start=1e-4, beta_end=2e-2, timestep_spacing="trailing", clip_sample=True, set_alpha_to_one=True
    )

    def draw():
        g = torch.Generator().manual_seed(2)
        return lambda: torch.randn(x_T.shape, generator=g)

    theirs = diffusers_run(scheduler, model, x_T, 20, draw() if eta else None, eta=eta)
    ours = run(ddim(model, x_T, ALPHA_BAR, timesteps(1000, 20), eta, draw()))
    assert torch.allclose(ours.float(), theirs, atol=1e-4)


def test_ancestral_sampling_agrees_with_diffusers():
    diffusers = pytest.importorskip("diffusers")
    model, x_T = SmallNetwork(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    scheduler = diffusers.DDPMScheduler(
        beta_start=1e-4, beta_end=2e-2, timestep_spacing="trailing", clip_sample=True, variance_type="fixed_small"
    )
    scheduler.set_timesteps(100)
    g, x = torch.Generator().manual_seed(2), x_T
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, int(t)), t, x, generator=g).prev_sample
    g = torch.Generator().manual_seed(2)
    times = timesteps(1000, 100)
    ours = run(ddpm(model, x_T, ALPHA_BAR, times, lambda: torch.randn(x_T.shape, generator=g)))
    assert torch.allclose(ours.float(), x, atol=1e-4)
