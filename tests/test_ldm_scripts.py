"""Scripts on ldm: those that students wrote for the course's code run unchanged, and txt2img does what it says."""

import runpy
import sys

import ldm_tiny
import numpy as np
import pytest
import torch
from ldm.modules.encoders.modules import FrozenCLIPEmbedder, write_clip_vocabulary
from ldm.modules.textual_inversion import LearnedTokens
from ldm.util import ModelError, instantiate_from_config, load_model
from omegaconf import OmegaConf
from PIL import Image

SCRIPT = ldm_tiny.SD / "scripts/txt2img.py"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return ldm_tiny.write_tiny(tmp_path_factory.mktemp("tiny"))


# As reports of the course have it: load as CompVis's txt2img does, add <new1> to tokenizer and table, train its row,
# sample.
STUDENT = """
import sys
import torch
import numpy as np
from contextlib import nullcontext
from omegaconf import OmegaConf
from torch import autocast
from ldm.util import instantiate_from_config
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion

def load_model_from_config(config, ckpt, verbose=False):
    pl_sd = torch.load(ckpt, map_location="cpu")
    sd = pl_sd["state_dict"]
    model = instantiate_from_config(config.model)
    m, u = model.load_state_dict(sd, strict=False)
    assert m == [] and u == [], (m, u)
    model.eval()
    return model

config = OmegaConf.load(sys.argv[1])
model = load_model_from_config(config, sys.argv[2])
assert isinstance(model, LatentDiffusion)
device = model.device
model = model.to(device)
tokenizer, transformer = model.cond_stage_model.tokenizer, model.cond_stage_model.transformer
for param in model.parameters():
    param.requires_grad = False

assert tokenizer.add_tokens("<new1>") == 1
transformer.resize_token_embeddings(len(tokenizer))
placeholder = tokenizer.convert_tokens_to_ids("<new1>")
initial = tokenizer.encode("corgi", add_special_tokens=False)[0]
embeds = transformer.get_input_embeddings().weight.data
embeds[placeholder] = embeds[initial]
before = embeds.clone()
transformer.text_model.embeddings.token_embedding.weight.requires_grad = True
optimizer = torch.optim.AdamW(transformer.get_input_embeddings().parameters(), lr=1e-2, weight_decay=0.0)

image = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)
posterior = model.encode_first_stage(image)
z = model.get_first_stage_encoding(posterior).detach()
for step in range(2):
    t = torch.randint(0, model.num_timesteps, (1,), device=device).long()
    noise = torch.randn_like(z)
    x_noisy = model.q_sample(x_start=z, t=t, noise=noise)
    c = model.get_learned_conditioning(["a photo of a <new1>"])
    loss = torch.nn.functional.mse_loss(model.apply_model(x_noisy, t, c), noise)
    loss_2, parts = model.p_losses(z, c, t, noise=noise)
    assert abs((loss - loss_2).item()) < 1e-5
    loss.backward()
    grad = transformer.get_input_embeddings().weight.grad
    grad[torch.arange(len(tokenizer)) != placeholder] = 0
    optimizer.step()
    optimizer.zero_grad()
after = transformer.get_input_embeddings().weight.data
assert torch.equal(after[:placeholder], before[:placeholder])
assert not torch.equal(after[placeholder], before[placeholder])

start_code = torch.randn([2, 4, 8, 8], device=device)
with torch.no_grad():
    with autocast("cpu", dtype=torch.bfloat16):
        with model.ema_scope():
            uc = model.get_learned_conditioning(2 * [""])
            c = model.get_learned_conditioning(["<new1>", "a <new1> dog"])
            for sampler in (DPMSolverSampler(model), DDIMSampler(model)):
                samples, _ = sampler.sample(S=2, conditioning=c, batch_size=2, shape=[4, 8, 8], verbose=False,
                                            unconditional_guidance_scale=7.5, unconditional_conditioning=uc, eta=0.0,
                                            x_T=start_code)
                x = model.decode_first_stage(samples)
                x = torch.clamp((x + 1.0) / 2.0, min=0.0, max=1.0).cpu().permute(0, 2, 3, 1).numpy()
                assert x.shape == (2, 64, 64, 3) and np.isfinite(x).all()
assert model.betas.shape == model.alphas_cumprod.shape == (1000,)
assert model.model.diffusion_model is not None and model.first_stage_model is not None
print("done")
"""


def test_students_scripts_run_unchanged(files, tmp_path, monkeypatch, capsys):
    script = STUDENT
    if not hasattr(torch.nn.functional, "scaled_dot_product_attention"):  # torch 1: no layer norm under CPU autocast
        script = script.replace('autocast("cpu", dtype=torch.bfloat16)', "nullcontext()")
    (tmp_path / "student.py").write_text(script)
    monkeypatch.setattr(sys, "argv", ["student.py", *files])
    runpy.run_path(str(tmp_path / "student.py"), run_name="__main__")
    assert capsys.readouterr().out.endswith("done\n")


def test_compvis_config_with_all_its_training_entries_is_understood():
    training = OmegaConf.create(
        {
            "model": {
                "base_learning_rate": 1.0e-04,
                "params": {
                    "num_timesteps_cond": 1,
                    "log_every_t": 200,
                    "first_stage_key": "jpg",
                    "cond_stage_key": "txt",
                    "use_ema": False,
                    "monitor": "val/loss_simple_ema",
                    "scheduler_config": {
                        "target": "ldm.lr_scheduler.LambdaLinearScheduler",
                        "params": {
                            "warm_up_steps": [10000],
                            "cycle_lengths": [10**13],
                            "f_start": [1e-6],
                            "f_max": [1.0],
                            "f_min": [1.0],
                        },
                    },
                    "unet_config": {"params": {"image_size": 32, "legacy": False}},
                    "first_stage_config": {
                        "params": {"monitor": "val/rec_loss", "lossconfig": {"target": "torch.nn.Identity"}}
                    },
                },
            }
        }
    )
    config = OmegaConf.merge(ldm_tiny.tiny_config(), training)
    model = instantiate_from_config(config.model)
    assert set(model.state_dict()) == set(ldm_tiny.tiny_model().state_dict())
    assert instantiate_from_config(config.model.params.scheduler_config)(5000) == pytest.approx(0.5, abs=1e-5)


def test_an_unknown_entry_is_mentioned():
    config = OmegaConf.merge(ldm_tiny.tiny_config(), {"model": {"params": {"linear_strat": 0.1}}})
    with pytest.warns(UserWarning, match="linear_strat"):
        instantiate_from_config(config.model)


# ---------------------------------------------------------------------------------------- the text encoder


def test_a_folder_in_transformers_layout_is_a_text_encoder(tmp_path):
    """config.json, tokenizer and weights as save_pretrained writes them; the folder's own vocabulary is used."""
    torch.manual_seed(3)
    first = FrozenCLIPEmbedder(config=ldm_tiny.TINY_TEXT)
    first.transformer.save_pretrained(tmp_path)
    write_clip_vocabulary(tmp_path)
    second = FrozenCLIPEmbedder(version=str(tmp_path), device="cpu", max_length=77)
    assert torch.equal(first(["a dog"]), second(["a dog"]))
    assert not any(p.requires_grad for p in second.parameters())


def test_a_version_that_is_neither_known_nor_a_folder_is_refused(tmp_path):
    for version, word in (("openai/no-such-model", "neither"), (str(tmp_path), "config.json")):
        with pytest.raises(ModelError, match=word):
            FrozenCLIPEmbedder(version=version)


def test_prompts_are_tokenised_as_clip_does():
    clip = pytest.importorskip("clip")
    prompts = [
        "a photograph of an astronaut riding a horse",
        "A corgi, in the style of David Revoy!",
        "1234 it's 5.5%",
        "café 日本語 ☃",
    ]
    ours = FrozenCLIPEmbedder(config=ldm_tiny.TINY_TEXT).tokenize(prompts)
    theirs = clip.tokenize(prompts)
    for a, b in zip(ours, theirs):
        length = int(b.argmax()) + 1  # CLIP pads with 0, Stable Diffusion with the end token
        assert torch.equal(a[:length], b[:length].long()) and (a[length:] == 49407).all()


def test_too_long_a_prompt_is_cut_with_a_warning():
    embedder = FrozenCLIPEmbedder(config=ldm_tiny.TINY_TEXT)
    with pytest.warns(UserWarning, match="cut to 75"):
        ids = embedder.tokenize("dog " * 100)
    assert ids.shape == (1, 77) and ids[0, 0] == 49406 and ids[0, -1] == 49407 and (ids[0, 1:-1] == 1929).all()


# ---------------------------------------------------------------------------------------- txt2img


@pytest.fixture
def txt2img(files, capsys):
    """Runs the script: (exit code, stdout, stderr)."""
    small = ["--H", "64", "--W", "64", "--ddim_steps", "2", "--device", "cpu", "--precision", "full", "--seed", "7"]
    main = runpy.run_path(str(SCRIPT))["main"]

    def call(out, *options):
        code = 0
        try:
            main(["--config", files[0], "--ckpt", files[1], "--outdir", str(out), *small, *options])
        except SystemExit as e:
            code = e.code
        return (code, *capsys.readouterr())

    return call


def pictures(folder):
    return [np.asarray(Image.open(p)).astype(int) for p in sorted(folder.glob("*.png"))]


def test_txt2img_writes_pictures_that_do_not_depend_on_the_batch(txt2img, tmp_path):
    code, out, err = txt2img(tmp_path / "a", "--prompt", "a dog", "--n_samples", "3", "--n_iter", "2")
    assert code == 0 and "wrote 6 pictures" in out.splitlines()[-1], err
    assert txt2img(tmp_path / "b", "--prompt", "a dog", "--n_samples", "1", "--n_iter", "6", "--n_rows", "2")[0] == 0
    a, b = (pictures(tmp_path / x / "samples") for x in "ab")
    assert len(a) == len(b) == 6 and a[0].shape == (64, 64, 3)
    assert max(np.abs(x - y).max() for x, y in zip(a, b)) <= 1
    assert all(np.abs(a[i] - a[j]).max() > 1 for i in range(6) for j in range(i))
    assert pictures(tmp_path / "a")[0].shape == (2 * 66 + 2, 3 * 66 + 2, 3)
    assert pictures(tmp_path / "b")[0].shape == (3 * 66 + 2, 2 * 66 + 2, 3)


def test_txt2img_options(txt2img, files, tmp_path):
    (tmp_path / "prompts.txt").write_text("a dog\n\na cat\na <new1> and a <new2>\n")
    for name, n in (("new1", 1), ("new2", 2)):
        tokens = LearnedTokens(load_model(*files).cond_stage_model)
        tokens.add(f"<{name}>", torch.randn(n, 32))
        tokens.save(tmp_path / f"{name}.safetensors")
    code, out, err = txt2img(
        tmp_path,
        "--from-file",
        str(tmp_path / "prompts.txt"),
        "--n_samples",
        "2",
        "--fixed_code",
        "--skip_grid",
        "--ddim_eta",
        "0.5",
        "--scale",
        "1",
        "--embedding_path",
        str(tmp_path / "new1.safetensors"),
        str(tmp_path / "new2.safetensors"),
    )
    assert code == 0, err
    made = pictures(tmp_path / "samples")
    assert len(made) == 6 and not list(tmp_path.glob("grid*"))
    assert all(np.array_equal(made[i], made[i + 3]) for i in range(3))  # fixed_code: every iteration the same
    assert txt2img(tmp_path, "--skip_save", "--n_iter", "1", "--n_samples", "1", "--pag", "1")[0] == 0
    assert len(pictures(tmp_path / "samples")) == 6 and len(list(tmp_path.glob("grid-0000.png"))) == 1


MISTAKES = [
    (["--H", "100"], "multiples of 64"),
    (["--ckpt", "none.ckpt"], "none.ckpt"),
    (["--ddim_steps", "0"], "ddim_steps"),
    (["--ddim_steps", "1000", "--sampler", "ddim"], "ddim_steps"),
    (["--from-file", "no.txt"], "no.txt"),
    (["--config", "no.yaml"], "no.yaml"),
    (["--embedding_path", "no.pt"], "no.pt"),
]


@pytest.mark.parametrize("options,word", MISTAKES)
def test_txt2img_ends_with_one_line_on_bad_input(txt2img, tmp_path, options, word):
    code, _, err = txt2img(tmp_path, *options)
    assert code == 2 and word in err.splitlines()[-1] and err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err and not list(tmp_path.rglob("*.png"))
