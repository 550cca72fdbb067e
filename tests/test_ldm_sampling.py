"""ldm's samplers, network and autoencoder: exact where the answer is known, the same by every path."""

import math

import ldm_tiny
import pytest
import torch
import torch.nn.functional as F
from ldm.lr_scheduler import LambdaLinearScheduler
from ldm.models.diffusion.ddim import DDIMSampler, ddim
from ldm.models.diffusion.dpm_solver import DPMSolverSampler, dpm_solver_pp
from ldm.models.diffusion.sampling import guided
from ldm.modules import attention
from ldm.modules.diffusionmodules.openaimodel import timestep_embedding
from ldm.util import noise_stream

ABAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, dim=0)


@pytest.fixture(scope="module")
def model():
    return ldm_tiny.tiny_model()


@pytest.fixture(scope="module")
def texts(model):
    return model.get_learned_conditioning(["a dog", "a cat"]), model.get_learned_conditioning(["", ""])


# --------------------------------------------------------------------------------------- data with a known answer
# For x_0 ~ N(0, s^2): eps(x_t, t) = sigma x_t / (alpha^2 s^2 + sigma^2), and the probability-flow ODE keeps
# x_t / sqrt(alpha^2 s^2 + sigma^2) constant.

S = 0.5


def gaussian_eps(x, t):
    log_alpha = 0.5 * torch.log(ABAR)
    low = min(int(t), 998)
    a = math.exp(log_alpha[low] + (t - low) * (log_alpha[low + 1] - log_alpha[low]))
    return x * math.sqrt(1 - a * a) / (a * a * S * S + 1 - a * a)


def ode_error(steps, sampler=dpm_solver_pp, start=999):
    x_T = torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64)
    *_, (t, x, _) = sampler(gaussian_eps, x_T, ABAR, steps)
    assert abs(t) < 1e-9
    deviation = [math.sqrt(a * S * S + 1 - a) for a in (float(ABAR[start]), float(ABAR[0]))]
    return abs(float(x) - 2.0 * deviation[1] / deviation[0])


def test_dpm_solver_converges_to_the_ode_and_with_second_order():
    errors = [ode_error(n) for n in (160, 320, 640)]
    assert errors[2] < 1e-3 and errors[0] / errors[1] > 3 and errors[1] / errors[2] > 3.3


def test_dpm_solver_predicts_the_data_at_its_last_step():
    x_T = torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64)
    *_, (_, x, x_0) = dpm_solver_pp(gaussian_eps, x_T, ABAR, 640)
    assert abs(float(x_0) - 2.0 * S / math.sqrt(float(ABAR[-1]) * S * S + 1 - float(ABAR[-1]))) < 0.01
    assert not torch.equal(x_0, x)


def test_ddim_converges_to_the_ode_with_first_order():
    coarse, fine = (ode_error(n, ddim, 1 + (n - 1) * (1000 // n)) for n in (100, 200))
    assert fine < 0.015 and 1.8 < coarse / fine < 2.2


def test_ddim_with_eta_one_keeps_the_variance_of_the_data():
    draw = torch.Generator().manual_seed(0)
    x_T = torch.randn(20000, 1, 1, 1, generator=draw, dtype=torch.float64)
    noise = lambda: torch.randn(x_T.shape, generator=draw, dtype=torch.float64)  # noqa: E731
    *_, (_, x, _) = ddim(gaussian_eps, x_T, ABAR, 500, eta=1.0, noise=noise)
    wanted = math.sqrt(float(ABAR[0]) * S * S + 1 - float(ABAR[0]))
    assert abs(float(x.std()) / wanted - 1) < 0.02


def test_samplers_visit_the_times_that_they_say():
    seen = []
    eps = lambda x, t: seen.append(t) or torch.zeros_like(x)  # noqa: E731
    list(dpm_solver_pp(eps, torch.zeros(1, 1, 1, 1), ABAR, 5))
    assert seen == pytest.approx([999, 799.2, 599.4, 399.6, 199.8])
    seen.clear()
    assert [t for t, _, _ in ddim(eps, torch.zeros(1, 1, 1, 1), ABAR, 50)][-2:] == [1, 0]
    assert seen == [1 + 20 * i for i in reversed(range(50))]


@pytest.mark.parametrize("steps", [7, 30, 300, 600, 999])
def test_ddim_makes_the_steps_that_were_asked_for_over_all_times(steps):
    seen = []
    list(ddim(lambda x, t: seen.append(t) or torch.zeros_like(x), torch.zeros(1, 1, 1, 1), ABAR, steps))
    assert len(seen) == steps and seen[-1] == 1 and seen[0] > 999 - 1000 / steps
    assert len(set(seen)) == steps and seen == sorted(seen, reverse=True)


def test_steps_out_of_range_are_refused():
    for sampler, steps in ((ddim, 0), (ddim, 1000), (dpm_solver_pp, 0)):
        with pytest.raises(ValueError, match="steps"):
            list(sampler(gaussian_eps, torch.zeros(1, 1, 1, 1), ABAR, steps))


# ---------------------------------------------------------------------------------------- samplers on a model


@pytest.mark.parametrize("sampler,eta", [(DPMSolverSampler, 0.0), (DDIMSampler, 0.0), (DDIMSampler, 0.7)])
def test_batch_size_does_not_change_a_picture(model, sampler, eta):
    c, uc = model.get_learned_conditioning("a dog"), model.get_learned_conditioning("")

    def pictures(indices):
        latents, _ = sampler(model).sample(
            4,
            len(indices),
            [4, 8, 8],
            c,
            eta=eta,
            verbose=False,
            noise=noise_stream(5, indices, (4, 8, 8)),
            unconditional_conditioning=uc,
            unconditional_guidance_scale=3.0,
        )
        return ((model.decode_first_stage(latents) + 1) * 127.5).clamp(0, 255)

    together, alone = pictures([0, 1, 2]), torch.cat([pictures([i]) for i in range(3)])
    assert (together - alone).abs().max() < 1


def test_guidance_asks_for_both_conditionings_in_one_batch(model, texts):
    calls = []
    original = model.apply_model
    model.apply_model = lambda x, t, c: calls.append((x.shape[0], c)) or original(x, t, c)
    try:
        for scale in (7.5, 1.0):
            DPMSolverSampler(model).sample(
                2,
                2,
                [4, 8, 8],
                texts[0],
                verbose=False,
                unconditional_guidance_scale=scale,
                unconditional_conditioning=texts[1],
            )
    finally:
        del model.apply_model
    assert [n for n, _ in calls] == [4, 4, 2, 2]
    assert torch.equal(calls[0][1].context, torch.cat([texts[1], texts[0]]))


# --------------------------------------------------------------------------------------- what steps leave to the next


def calls_of(modules, function):
    """(result of function(), the batch sizes that each of the modules was called with meanwhile)."""
    sizes = [[] for _ in modules]
    hooks = [m.register_forward_hook(lambda _, x, y, seen=seen: seen.append(len(y))) for m, seen in zip(modules, sizes)]
    try:
        return function(), sizes
    finally:
        for hook in hooks:
            hook.remove()


def sample(model, texts, **options):
    noise = noise_stream(3, range(2), (4, 8, 8))
    guidance = {"unconditional_conditioning": texts[1], "unconditional_guidance_scale": 3.0}
    return DPMSolverSampler(model).sample(
        10, 2, [4, 8, 8], texts[0], verbose=False, noise=noise, **guidance, **options
    )[0]


def test_keys_and_values_of_the_prompt_are_computed_once_and_change_no_bit(model, texts, monkeypatch):
    layers = [m.to_k for name, m in model.model.named_modules() if name.endswith("attn2")]
    once, sizes = calls_of(layers, lambda: sample(model, texts))
    monkeypatch.setattr(model, "remember", lambda cond, *how: cond)
    every_step, plain_sizes = calls_of(layers, lambda: sample(model, texts))
    assert torch.equal(once, every_step)
    assert all(s == [4] for s in sizes) and all(s == [4] * 10 for s in plain_sizes)


def test_deep_features_used_again_at_the_same_place_change_no_bit(model, texts):
    x, t, memory = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([9, 9]), None
    memory = model.remember(texts[0], every=2)
    middle = [model.model.diffusion_model.middle_block]
    (first, again, third), sizes = calls_of(middle, lambda: [model.apply_model(x, t, memory) for _ in range(3)])
    plain = model.apply_model(x, t, texts[0])
    assert sizes == [[2, 2]] and all(torch.equal(plain, eps) for eps in (first, again, third))


def test_fast_runs_the_deep_blocks_every_second_time_and_guides_only_early(model, texts):
    network = model.model.diffusion_model
    parts = [network.input_blocks[0], network.middle_block]
    quick, sizes = calls_of(parts, lambda: sample(model, texts, fast=True))
    assert sizes == [[4] * 6 + [2] * 4, [4] * 3 + [2] * 2]
    assert torch.isfinite(quick).all() and not torch.equal(quick, sample(model, texts))


def test_perturbed_attention_guidance_moves_away_from_pixels_that_see_themselves_alone(model, texts, monkeypatch):
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    given = {"unconditional_conditioning": texts[1], "unconditional_guidance_scale": 3.0}
    eps = guided(model, texts[0], **given, pag=0.7)(x, 500.0)
    t = torch.full((2,), 500.0)
    plain, of_prompt = guided(model, texts[0], **given)(x, 500.0), model.apply_model(x, t, texts[0])
    monkeypatch.setattr(attention, "COARSE", 3)
    none = guided(model, texts[0], **given, pag=0.7)(x, 500.0)
    for layer in (m for name, m in model.model.named_modules() if name.endswith("attn1")):
        monkeypatch.setattr(layer, "forward", lambda x, layer=layer, **_: layer.to_out(layer.to_v(x)))
    perturbed = model.apply_model(x, t, texts[0])
    assert (eps - plain).abs().max() > 1e-3
    assert torch.allclose(eps, plain + 0.7 * (of_prompt - perturbed), atol=1e-5)
    assert torch.allclose(none, plain, atol=1e-5)  # no map is coarse


def test_the_last_of_a_trajectory_is_the_sample(model, texts):
    arguments = {
        "unconditional_conditioning": texts[1],
        "unconditional_guidance_scale": 2.0,
        "x_T": torch.ones(2, 4, 8, 8),
    }
    for sampler in (DPMSolverSampler(model), DDIMSampler(model)):
        steps = list(sampler.trajectory(3, 2, [4, 8, 8], texts[0], **arguments))
        seen = []
        latents, inter = sampler.sample(
            3, 2, [4, 8, 8], texts[0], verbose=False, callback=seen.append, log_every_t=1, **arguments
        )
        assert torch.equal(latents, steps[-1][1]) and seen == [0, 1, 2]
        if isinstance(sampler, DDIMSampler):
            assert len(inter["x_inter"]) == 4 and torch.equal(inter["pred_x0"][-1], steps[-1][2])


def test_samplers_refuse_what_they_do_not_do(model, texts):
    with pytest.raises(ValueError, match="mask"):
        DDIMSampler(model).sample(2, 2, [4, 8, 8], texts[0], verbose=False, mask=torch.ones(1))


# ------------------------------------------------------------------------------------- one result, several paths


@pytest.mark.parametrize("budget", [1, 300, 10**9])
def test_sliced_attention_is_attention(budget):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 5) for n in (17, 11, 11))
    exact = (q.double() @ k.double().transpose(-1, -2) / 5**0.5).softmax(-1) @ v.double()
    assert (attention.sliced_attention(q, k, v, budget) - exact).abs().max() < 1e-5
    assert (attention.attention(q, k, v) - exact).abs().max() < 1e-5


@pytest.mark.parametrize("size", [(40, 30), (64, 64), (64, 65), (113, 200)])
def test_tiles_meet_without_a_seam(model, size, monkeypatch):
    """With a decoder that only looks at single pixels, tiles and the whole are the same picture."""
    vae = model.first_stage_model
    monkeypatch.setattr(type(vae), "_decode_whole", lambda self, z: F.interpolate(z[:, :3], scale_factor=8.0))
    z = torch.randn(2, 4, *size)
    assert (vae.decode(z, tiled=True) - vae.decode(z, tiled=False)).abs().max() < 1e-5


def test_an_image_of_one_tile_is_decoded_as_a_whole(model):
    z = torch.randn(1, 4, 16, 8)
    assert torch.allclose(model.decode_first_stage(z, tiled=True), model.decode_first_stage(z), atol=1e-5)


def test_short_memory_means_tiles(model, monkeypatch):
    calls = []
    vae = model.first_stage_model
    monkeypatch.setattr(type(vae), "_decode_tiled", lambda self, z: calls.append(1) or self._decode_whole(z))
    for free in (10**12, 1000):
        monkeypatch.setattr("ldm.models.autoencoder.free_memory", lambda device, free=free: free)
        model.decode_first_stage(torch.randn(2, 4, 8, 8))
    assert len(calls) == 2


def test_recomputed_activations_give_the_same_gradient_through_a_frozen_network(model):
    unet = model.model.diffusion_model
    gradients = []
    for unet.use_checkpoint in (True, False):
        c = torch.ones(1, 5, 32, requires_grad=True)
        unet(torch.ones(1, 4, 8, 8), torch.tensor([10]), context=c).sum().backward()
        gradients.append(c.grad)
    assert torch.allclose(*gradients, atol=1e-6) and gradients[0].abs().max() > 0
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.skipif(not hasattr(F, "scaled_dot_product_attention"), reason="bfloat16 on CPUs needs torch 2")
def test_bfloat16_is_close_to_float32(texts):
    exact, half = ldm_tiny.tiny_model(), ldm_tiny.tiny_model()
    half.model.bfloat16()
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([500.5, 20.0])
    a, b = (m.apply_model(x, t, texts[0]) for m in (exact, half))
    assert b.dtype == torch.float32 and (a - b).abs().max() < 0.05 * a.abs().max()


def test_conditionings_may_come_in_every_form_that_compvis_takes(model, texts):
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 4])
    plain = model.apply_model(x, t, texts[0])
    assert torch.equal(plain, model.apply_model(x, t, [texts[0]]))
    assert torch.equal(plain, model.apply_model(x, t, {"c_crossattn": [texts[0]]}))


def test_time_embedding_follows_its_equation():
    e = timestep_embedding(torch.tensor([3.5]), 8)
    w = [10000 ** (-i / 4) for i in range(4)]
    assert e[0].tolist() == pytest.approx([math.cos(3.5 * v) for v in w] + [math.sin(3.5 * v) for v in w], abs=1e-5)


def test_every_time_may_be_drawn_in_training(model, monkeypatch):
    seen = []
    monkeypatch.setattr(model, "p_losses", lambda x, c, t: seen.extend(t.tolist()))
    model(torch.zeros(20000, 1, 1, 1), torch.zeros(1))
    assert min(seen) == 0 and max(seen) == 999 and len(set(seen)) == 1000


def test_learning_rate_warms_up_and_decays():
    f = LambdaLinearScheduler(
        warm_up_steps=[10, 0], f_min=[0.1, 0.5], f_max=[1.0, 1.0], f_start=[0.0, 1.0], cycle_lengths=[110, 100]
    )
    assert [f(0), f(5), f(10), f.schedule(110)] == pytest.approx([0.0, 0.5, 0.1 + 0.9 * 100 / 110, 0.1])
    assert f(160) == pytest.approx(0.75) and f(210) == pytest.approx(0.5)


# ---------------------------------------------------------------------------------------- another implementation


def test_network_and_autoencoder_agree_with_diffusers(model, texts):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders import single_file_utils as convert

    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    unet_config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
    }
    unet = diffusers.UNet2DConditionModel(**unet_config).eval()
    unet.load_state_dict(convert.convert_ldm_unet_checkpoint(dict(state), config=dict(unet.config)))
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
    ).eval()
    vae.load_state_dict(convert.convert_ldm_vae_checkpoint(dict(state), config=dict(vae.config)))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([999.0, 12.0])
    with torch.no_grad():
        assert torch.allclose(model.apply_model(x, t, texts[0]), unet(x, t, texts[0]).sample, atol=1e-4)
        assert torch.allclose(model.decode_first_stage(x), vae.decode(x / 0.18215).sample, atol=1e-4)
        image = torch.rand(1, 3, 64, 64) * 2 - 1
        assert torch.allclose(model.encode_first_stage(image).mean, vae.encode(image).latent_dist.mean, atol=1e-4)
