"""ldm as scripts of others call it: what CompVis's scripts and students' trainings do in turn, on the shipped model."""

import ldm_tiny
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import instantiate_from_config, load_model
from omegaconf import OmegaConf
from PIL import Image

from UNet import UNet

ROOT = ldm_tiny.SD.parent
CKPT = ROOT / "checkpoints/tiny.ckpt"
PHOTOS = sorted((ROOT / "tiny/textual_inversion/0").glob("*.png"))


def from_config(resized=0):
    """A model of tiny.yaml as CompVis's scripts build it; with `resized` rows more, as students do before loading."""
    model = instantiate_from_config(OmegaConf.load(str(ldm_tiny.SD / "configs/stable-diffusion/tiny.yaml")).model)
    if resized:
        model.cond_stage_model.transformer.resize_token_embeddings(49408 + resized)
    return model


def load_from_config(model):
    """torch.load and load_state_dict, as nearly every script has them."""
    pl_sd = torch.load(str(CKPT), map_location="cpu")
    missing, _ = model.load_state_dict(pl_sd["state_dict"], strict=False)
    assert set(missing) <= set(model.schedule_names)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return load_model(None, CKPT)


@pytest.fixture(scope="module")
def texts(model):
    return [model.get_learned_conditioning(2 * [prompt]) for prompt in ("a rocket, in the style of Noto", "")]


# ------------------------------------------------------------------------------------------- loading


def test_torch_load_and_load_state_dict_give_the_model_of_load_model(model):
    ours, theirs = model.state_dict(), load_from_config(from_config()).state_dict()
    assert set(ours) == set(theirs) and all(torch.equal(ours[k], theirs[k].to(ours[k])) for k in ours)


def test_the_checkpoint_tells_its_steps():
    assert torch.load(str(CKPT), map_location="cpu")["global_step"] > 0


def test_rows_that_were_added_before_loading_stay(model):
    resized = from_config(resized=2)
    added = resized.cond_stage_model.transformer.get_input_embeddings().weight[-2:].detach().clone()
    table = load_from_config(resized).cond_stage_model.transformer.get_input_embeddings().weight
    assert len(table) == 49410 and torch.equal(table[-2:], added)
    assert torch.equal(table[:-2], model.cond_stage_model.transformer.get_input_embeddings().weight)


def test_the_device_of_the_text_encoder_may_be_set(model):
    model.cond_stage_model.device = torch.device("cpu")
    assert model.cond_stage_model.device == torch.device("cpu")


def test_networks_tell_their_sizes(model):
    unet = OmegaConf.merge(ldm_tiny.tiny_config().model.params.unet_config, {"params": {"image_size": 32}})
    assert instantiate_from_config(unet).image_size == 32 and model.first_stage_model.embed_dim == 4


def test_the_helpers_of_ldm_util_are_there(model):
    from ldm.util import count_params, default, exists

    assert count_params(model) == sum(p.numel() for p in model.parameters())
    assert exists(0) and not exists(None)
    assert default(0, 1) == 0 and default(None, 1) == 1 and default(None, lambda: 2) == 2


# ------------------------------------------------------------------------------------------- training


def resize_and_freeze(model, word):
    """<new1> in tokenizer and table, starting as `word`, everything frozen first; (its id, the table)."""
    tokenizer, transformer = model.cond_stage_model.tokenizer, model.cond_stage_model.transformer
    for param in model.parameters():
        param.requires_grad = False
    assert tokenizer.add_tokens("<new1>") == 1
    transformer.resize_token_embeddings(len(tokenizer))
    new = tokenizer.convert_tokens_to_ids("<new1>")
    weights = transformer.get_input_embeddings().weight.data
    weights[new] = weights[tokenizer.encode(word, add_special_tokens=False)[0]]
    return new, transformer.get_input_embeddings()


def latents_of(model):
    pictures = [np.asarray(Image.open(p).convert("RGB").resize((64, 64))) for p in PHOTOS]
    images = torch.from_numpy(np.stack(pictures)).float().permute(0, 3, 1, 2) / 127.5 - 1
    return model.get_first_stage_encoding(model.encode_first_stage(images).mode()).detach()


def loss_of(model, z, t, noise):
    """A student's own p_losses: get_loss of each picture, weighed by logvar."""
    c = model.get_learned_conditioning(len(z) * ["a <new1>, in the style of Noto"])
    simple = model.get_loss(model.apply_model(model.q_sample(z, t, noise), t, c), noise, mean=False).mean([1, 2, 3])
    model.logvar = model.logvar.to(model.device)
    loss = simple / torch.exp(model.logvar[t]) + model.logvar[t]
    return model.l_simple_weight * loss.mean()


def test_a_stock_training_of_40_steps_moves_the_embedding_and_lowers_the_loss():
    model = load_from_config(from_config())
    new, table = resize_and_freeze(model, "face")
    before = table.weight.detach().clone()
    z = latents_of(model)
    draw = torch.Generator().manual_seed(0)
    held = z.repeat(4, 1, 1, 1), torch.linspace(20, 980, 4 * len(z)).long()
    held = (*held, torch.randn(held[0].shape, generator=draw))
    with torch.no_grad():
        first = loss_of(model, *held).item()
    optimizer = torch.optim.AdamW(table.parameters(), lr=2e-2)
    for _ in range(40):
        pick, t = (torch.randint(n, (2,), generator=draw) for n in (len(z), model.num_timesteps))
        loss = loss_of(model, z[pick], t, torch.randn(2, *z.shape[1:], generator=draw))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():  # as students do: every other row goes back
            table.weight[:new] = before[:new]
    with torch.no_grad():
        last = loss_of(model, *held).item()
    assert (table.weight[new] - before[new]).norm() > 0.05 * before[new].norm()
    assert last < 0.98 * first


def test_a_resized_table_learns_with_everything_else_frozen():
    model = ldm_tiny.tiny_model()
    new, table = resize_and_freeze(model, "dog")
    assert table.weight.requires_grad
    model.p_losses(torch.ones(1, 4, 8, 8), model.get_learned_conditioning(["a <new1>"]), torch.tensor([500]))[
        0
    ].backward()
    assert table.weight.grad[new].abs().max() > 0


def test_get_loss_is_the_squared_error(model):
    a, b = torch.randn(2, 2, 4, 3, 3)
    assert torch.equal(model.get_loss(a, b), F.mse_loss(a, b))
    assert torch.equal(model.get_loss(a, b, mean=False), (a - b) ** 2)


# ------------------------------------------------------------------------------------------- sampling


def test_img2img_by_compvis_calls_gives_a_latent_near_the_picture(model, texts):
    sampler = DDIMSampler(model)
    sampler.make_schedule(ddim_num_steps=10, ddim_eta=0.0, verbose=False)
    z, draw = latents_of(model)[:2], torch.Generator().manual_seed(0)
    far = []
    for strength in (0.2, 1.0):
        t_enc = int(strength * 10)
        noise = torch.randn(z.shape, generator=draw)
        z_enc = sampler.stochastic_encode(z, torch.tensor([t_enc] * 2), noise=noise)
        assert torch.equal(z_enc, model.q_sample(z, torch.tensor([1 + 100 * min(t_enc, 9)] * 2), noise))
        guidance = {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": texts[1]}
        samples = sampler.decode(z_enc, texts[0], t_enc, **guidance)
        far.append((samples - z).norm().item())
        assert torch.isfinite(model.decode_first_stage(samples)).all()
    assert far[0] < 0.7 * far[1]


def test_decoding_all_steps_is_sampling(model, texts):
    sampler, x = DDIMSampler(model), torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    sampler.make_schedule(ddim_num_steps=4)
    whole, _ = sampler.sample(S=4, batch_size=2, shape=[4, 16, 16], conditioning=texts[0], x_T=x, verbose=False)
    assert torch.equal(sampler.decode(x, texts[0], 4), whole)


def test_plms_takes_the_steps_of_diffusers_scheduler(model, texts):
    from ldm.models.diffusion.plms import PLMSSampler

    diffusers = pytest.importorskip("diffusers")
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    kinds = {"beta_schedule": "scaled_linear", "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}
    theirs = diffusers.PNDMScheduler(beta_start=0.00085, beta_end=0.012, **kinds)
    theirs.set_timesteps(8)
    wanted = x
    for t in theirs.timesteps:
        with torch.no_grad():
            wanted = theirs.step(model.apply_model(wanted, t.expand(2), texts[0]), t, wanted).prev_sample
    options = {"S": 8, "batch_size": 2, "shape": [4, 16, 16], "conditioning": texts[0], "verbose": False}
    assert torch.allclose(PLMSSampler(model).sample(x_T=x, **options)[0], wanted, atol=1e-3)
    with pytest.raises(ValueError, match="eta"):
        PLMSSampler(model).sample(eta=0.5, **options)


def test_p_sample_loop_draws_latents_without_guidance(model, texts):
    torch.manual_seed(0)
    latents = model.p_sample_loop(cond=texts[0], shape=(2, 4, 16, 16), timesteps=4, verbose=False)
    torch.manual_seed(0)
    options = {"S": 4, "batch_size": 2, "shape": [4, 16, 16], "conditioning": texts[0], "eta": 1.0}
    wanted, _ = DDIMSampler(model).sample(verbose=False, **options)
    assert torch.equal(latents, wanted)
    options = {"timesteps": 2, "return_intermediates": True, "x_T": latents, "verbose": False}
    _, seen = model.p_sample_loop(texts[0], (2, 4, 16, 16), **options)
    assert torch.equal(seen[0], latents)


def test_the_dpm_solver_package_has_compvis_modules(model, texts):
    from ldm.models.diffusion.dpm_solver import DPMSolverSampler
    from ldm.models.diffusion.dpm_solver import sampler as module
    from ldm.models.diffusion.dpm_solver.dpm_solver import DPM_Solver, NoiseScheduleVP, model_wrapper

    assert module.DPMSolverSampler is DPMSolverSampler
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    ns = NoiseScheduleVP("discrete", alphas_cumprod=model.alphas_cumprod)
    kind = {"model_type": "noise", "guidance_type": "classifier-free", "guidance_scale": 4.0}
    texts = {"condition": texts[0], "unconditional_condition": texts[1]}
    model_fn = model_wrapper(lambda x, t, c: model.apply_model(x, t, c), ns, **kind, **texts)
    solver = DPM_Solver(model_fn, ns, predict_x0=True, thresholding=False)
    latents = solver.sample(x, steps=5, skip_type="time_uniform", method="multistep", order=2, lower_order_final=True)
    guidance = {"unconditional_guidance_scale": 4.0, "unconditional_conditioning": texts["unconditional_condition"]}
    wanted, _ = DPMSolverSampler(model).sample(5, 2, [4, 16, 16], texts["condition"], x_T=x, verbose=False, **guidance)
    assert torch.equal(latents, wanted)


def test_noise_that_nobody_gave_is_drawn_on_the_models_device(model, texts, monkeypatch):
    devices, draw = [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, **k: devices.append(k.get("device")) or draw(*a, **k))
    DDIMSampler(model).sample(3, 2, [4, 16, 16], texts[0], eta=1.0, verbose=False)
    assert devices and set(devices) == {model.device}


def test_options_of_compvis_decoding_change_nothing(model):
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(4))
    options = {"predict_cids": False, "force_not_quantize": False}
    assert torch.equal(model.decode_first_stage(z, **options), model.decode_first_stage(z))


# ------------------------------------------------------------------------------------------- parts


def test_a_schedule_may_be_registered_anew():
    model = ldm_tiny.tiny_model()
    before = model.alphas_cumprod.clone()
    model.register_schedule(beta_schedule="linear", timesteps=500, linear_start=0.001, linear_end=0.02)
    assert model.num_timesteps == 500 and len(model.alphas_cumprod) == len(model.logvar) == 500
    model.register_schedule(given_betas=np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    assert torch.allclose(model.alphas_cumprod, before, atol=1e-6)
    with pytest.raises(ValueError, match="cosine"):
        model.register_schedule(beta_schedule="cosine")


def test_the_posteriors_divergence_and_likelihood_are_those_of_torchs_normals():
    a, b = (DiagonalGaussianDistribution(torch.randn(2, 8, 3, 3)) for _ in range(2))
    normal = [torch.distributions.Normal(d.mean, d.std) for d in (a, b)]
    unit, kl = torch.distributions.Normal(0.0, 1.0), torch.distributions.kl_divergence
    assert torch.allclose(a.kl(), kl(normal[0], unit).sum([1, 2, 3]), rtol=1e-4)
    assert torch.allclose(a.kl(b), kl(*normal).sum([1, 2, 3]), rtol=1e-4)
    x = torch.randn(2, 4, 3, 3)
    assert torch.allclose(a.nll(x), -normal[0].log_prob(x).sum([1, 2, 3]), rtol=1e-4)


def test_the_face_network_takes_the_courses_arguments():
    torch.manual_seed(0)
    mine = UNet(channel=16).eval()
    theirs = UNet(in_channel=3, channel=16, attn_heads=1, use_affine_time=False, dropout=0).eval()
    theirs.load_state_dict(mine.state_dict())
    x, t = torch.randn(1, 3, 32, 32), torch.tensor([7])
    with torch.no_grad():
        assert torch.equal(mine(x, t), theirs(x, time=t))
    for name, value in (("in_channel", 1), ("attn_heads", 4), ("use_affine_time", True), ("dropout", 0.1)):
        with pytest.raises(ValueError, match=f"{name}.*UNet.pt"):
            UNet(**{name: value})
