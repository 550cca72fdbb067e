"""stable-diffusion/ against the course's own code: the numbers of its reference run, the sizes of the real model."""

import ast
import hashlib

import ldm_tiny
import numpy as np
import pytest
import torch
from conftest import ROOT
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.util import instantiate_from_config, read_config


@pytest.fixture(scope="module")
def ref():
    return ldm_tiny.reference_model()


def gap(a, b):
    return float((a.detach().double() - b.double()).abs().max())


def test_prompts_become_the_same_ids_and_conditionings(ref):
    model, r, prompts = ref
    assert torch.equal(model.cond_stage_model.tokenize(prompts), r["input_ids_c"])
    assert torch.equal(model.cond_stage_model.tokenize(""), r["input_ids_uc"])
    assert gap(model.get_learned_conditioning(prompts), r["c"]) < 1e-5
    assert gap(model.get_learned_conditioning(["", ""]), r["uc"]) < 1e-5


def test_schedule_is_the_same(ref):
    model, r, _ = ref
    assert gap(model.betas, r["betas"]) < 1e-7 and gap(model.alphas_cumprod, r["alphas_cumprod"]) < 1e-7


def test_every_network_call_gives_the_same_eps(ref):
    model, r, _ = ref
    both = torch.cat([r["uc"], r["c"]])
    for x, t, eps in zip(r["call_x"], r["call_t"], r["call_eps"]):
        assert gap(model.apply_model(x, t, both), eps) < 1e-5


CASES = [("", 5, 7.5), ("wide_", 5, 7.5), ("g1_", 5, 1.0), ("s20_", 20, 7.5), ("s50_", 50, 7.5)]


@pytest.mark.parametrize("case,steps,scale", CASES)
def test_samples_are_the_same(ref, case, steps, scale):
    model, r, _ = ref
    x_T = r[case + "x_T"]
    latents, nothing = DPMSolverSampler(model).sample(
        S=steps,
        batch_size=2,
        shape=list(x_T.shape[1:]),
        conditioning=r["c"],
        verbose=False,
        x_T=x_T,
        eta=0.0,
        unconditional_guidance_scale=scale,
        unconditional_conditioning=r["uc"],
    )
    assert nothing is None and gap(latents, r[case + "latent"]) < 2e-3
    assert gap(model.decode_first_stage(latents), r[case + "decoded_raw"]) < 1e-4


def test_pictures_are_the_same_within_a_level(ref):
    model, r, _ = ref
    image = ((model.decode_first_stage(r["latent"]) + 1) / 2).clamp(0, 1)
    assert gap(image, r["image_float"]) < 1e-4
    uint8 = (255 * image).permute(0, 2, 3, 1).numpy().astype(np.uint8)
    assert np.abs(uint8.astype(int) - r["image_uint8"].numpy().astype(int)).max() <= 1


def test_images_are_encoded_the_same(ref):
    model, r, _ = ref
    posterior = model.encode_first_stage(r["enc_image"])
    assert gap(torch.cat([posterior.mean, posterior.logvar], dim=1), r["enc_moments"]) < 1e-4
    assert gap(model.get_first_stage_encoding(posterior.mode()), r["enc_z_mode_scaled"]) < 1e-4


def test_training_loss_and_the_gradient_of_a_token_are_the_same(ref):
    model, r, prompts = ref
    table = model.cond_stage_model.transformer.get_input_embeddings().weight.requires_grad_(True)
    noisy = model.q_sample(r["enc_z_mode_scaled"], r["train_t"], r["train_noise"])
    assert gap(noisy, r["train_x_noisy"]) < 1e-6
    loss, parts = model.p_losses(
        r["enc_z_mode_scaled"], model.get_learned_conditioning(prompts), r["train_t"], noise=r["train_noise"]
    )
    loss.backward()
    assert gap(loss, r["train_loss"]) < 1e-5 and gap(parts["val/loss_simple"], r["train_loss"]) < 1e-5
    assert gap(table.grad[int(r["train_token_id"])], r["train_token_grad"]) < 1e-6
    table.requires_grad_(False)


# sha256 of the lines "key<tab>shape" of sd-v1-4.ckpt, sorted; shapes as 320x4x3x3
SD_V1_KEYS = (1143, "16f6a0b8420ba93a0a225a8fb149243074ffd20f4b0b7f839fca6b5b356acc4e")


@pytest.mark.skipif(not hasattr(torch, "get_default_device"), reason="the full-size model without memory needs torch 2")
def test_full_size_model_has_the_keys_of_sd_v1():
    with torch.device("meta"):
        model = instantiate_from_config(read_config(ldm_tiny.CONFIG).model)
    lines = sorted(f"{k}\t{'x'.join(map(str, v.shape))}" for k, v in model.state_dict().items())
    assert (len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()) == SD_V1_KEYS
    assert sum(p.numel() for p in model.parameters()) == 1_066_235_307


def test_the_digest_is_that_of_the_real_checkpoint():
    lines = ldm_tiny.reference("keys/sd_v1_keys.tsv").read_text().splitlines()[1:]
    lines = sorted("\t".join(line.split("\t")[:2]) for line in lines)
    assert (len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()) == SD_V1_KEYS


def test_norms_have_the_constants_that_numbers_do_not_show():
    model = ldm_tiny.tiny_model()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.GroupNorm):
            small = name.startswith("first_stage_model") or name.endswith(".1.norm")
            assert module.num_groups == 32 and module.eps == (1e-6 if small else 1e-5), name


def test_ldm_is_small():
    files = [f for f in (ldm_tiny.SD / "ldm").rglob("*.py") if f.name != "compat.py"]
    assert sum(len(f.read_text().splitlines()) for f in files) < 1500


def test_stable_diffusion_imports_nothing_from_outside_it():
    outside = {f.stem for f in ROOT.glob("*.py")} | {"diffusers", "pytorch_lightning"}
    for file in [*(ldm_tiny.SD / "ldm").rglob("*.py"), *(ldm_tiny.SD / "scripts").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
                assert not {n.split(".")[0] for n in names} & outside, file
