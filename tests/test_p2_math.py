"""What Problem 2 rests on: DDIM and DDPM on a Gaussian, where the answer is known, and paths between two noises."""

import math

import pytest
import torch

import diffusion
from diffusion import ddim, ddpm, lerp, schedule, slerp, timesteps
from utils import beta_scheduler, noise_stream

MEAN, STD = 0.3, 0.5  # of the data, a Gaussian: its best eps has a closed form


def gaussian_eps(alpha_bar):
    """E[eps | x_t] for x_0 ~ N(MEAN, STD^2), which is (x_t - sqrt(alpha_bar) MEAN) sqrt(1 - alpha_bar) / Var[x_t]."""

    def eps_model(x_t, t):
        a = alpha_bar[t]
        return (x_t - a.sqrt() * MEAN) * (1 - a).sqrt() / (a * STD**2 + 1 - a)

    return eps_model


def run(sampler, times, n=16, **options):
    alpha_bar = schedule("linear", 1000)
    noise = noise_stream(0, [5], (n, 3, 16, 16))  # one stream of n pictures at a time
    x = noise()[0].double()
    options = {"noise": lambda: noise()[0].double(), "clip": False, **options}
    return diffusion.run(sampler(gaussian_eps(alpha_bar), x, alpha_bar, times, **options))


def test_the_courses_beta_scheduler_is_the_linear_schedule():
    assert torch.allclose(torch.cumprod(1 - beta_scheduler(), 0), schedule("linear", 1000), rtol=1e-12)
    assert timesteps(1000, 50, "course")[:2] == [981, 961] and timesteps(1000, 50, "course")[-2:] == [1, 0]


def test_eta_1_over_all_steps_is_ancestral_sampling():
    times = timesteps(1000, 1000)
    a, b = run(ddim, times, eta=1.0), run(ddpm, times)
    assert (a - b).abs().max() < 1e-6  # step by step, with the same noise
    n = a.numel()  # 12,288 values: within four standard errors of the truth
    assert abs(a.mean() - MEAN) < 4 * STD / math.sqrt(n)
    assert abs(a.std() - STD) < 4 * STD / math.sqrt(2 * n) + 2e-3


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_other_etas_have_the_same_distribution_but_other_pictures(eta):
    times = timesteps(1000, 500)
    x = run(ddim, times, eta=eta)
    assert abs(x.mean() - MEAN) < 4 * STD / math.sqrt(x.numel()) + 2e-3
    assert abs(x.std() - STD) < 4 * STD / math.sqrt(2 * x.numel()) + 5e-3
    assert (x - run(ddim, times, eta=1.0)).abs().mean() > 0.1


def test_slerp_keeps_the_norm_gives_the_ends_exactly_and_moves_at_equal_angles():
    a, b = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    b = b * a.norm() / b.norm()
    path = [slerp(a, b, alpha / 10) for alpha in range(11)]
    assert torch.equal(path[0], a) and torch.equal(path[10], b)
    assert all(abs(x.norm() / a.norm() - 1) < 1e-5 for x in path)
    steps = torch.tensor([float((x - y).norm()) for x, y in zip(path, path[1:])])
    assert steps.std() < 1e-4 * steps.mean()


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0])
def test_slerp_of_parallel_noises_is_linear(factor):
    a = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))
    x = slerp(a, factor * a, 0.25)
    assert torch.isfinite(x).all()
    assert torch.allclose(x, lerp(a, factor * a, 0.25), atol=1e-6)


def test_the_middle_of_a_linear_path_has_only_0_71_of_the_norm_of_noise():
    a, b = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    assert lerp(a, b, 0.5).norm() / a.norm() == pytest.approx(math.sqrt(0.5), abs=0.005)
    assert slerp(a, b, 0.5).norm() / a.norm() == pytest.approx(1.0, abs=0.005)
