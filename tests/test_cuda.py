"""On a real GPU, where there is one: what tests/test_devices.py proves on a pretend one, and what that cannot see."""

import argparse
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

if not torch.cuda.is_available():
    pytest.skip("##### NO GPU HERE: nothing of this file was tested #####", allow_module_level=True)

import p3_model
from p3_invert import Examples, Inversion, Recipe
from utils import pick_device

CHECKPOINTS, TINY = ROOT / "checkpoints", ROOT / "tiny/textual_inversion"
FP32 = ["--precision", "fp32"]


def run(script, *options):
    command = [sys.executable, ROOT / script, *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def pictures(folder):
    return {str(p.relative_to(folder)): np.asarray(Image.open(p)).astype(int) for p in sorted(folder.rglob("*.png"))}


def furthest(a, b):
    a, b = pictures(a), pictures(b)
    assert a and set(a) == set(b)
    return max(abs(a[k] - b[k]).max() for k in a)


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noise")
    run("p2_ddim.py", "--make-noise", folder, "--count", 2, "--size", 64)
    return folder


COMMANDS = {
    "hw2_1": lambda noise, out: ["p1_infer.py", out, "--num-per-digit", 2],
    "hw2_2": lambda noise, out: ["p2_ddim.py", noise, out, CHECKPOINTS / "p2_faces.pt"],
    "hw2_3": lambda noise, out: [
        *("p3_infer.py", TINY / "input.json", out, CHECKPOINTS / "tiny.ckpt", "--images", 2),
        *("--embeddings", TINY / "embeddings"),
    ],
}


@pytest.mark.parametrize("problem", COMMANDS)
def test_in_float32_the_pictures_are_the_cpus_within_a_grey_level(problem, noise, tmp_path):
    for device in ("cpu", "cuda"):
        run(*COMMANDS[problem](noise, tmp_path / device), *FP32, "--device", device)
    assert furthest(tmp_path / "cpu", tmp_path / "cuda") <= 1


@pytest.mark.parametrize("problem", COMMANDS)
def test_as_shipped_a_second_run_gives_the_same_bytes(problem, noise, tmp_path):
    for name in "ab":
        run(*COMMANDS[problem](noise, tmp_path / name), "--device", "cuda")
    files = [p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.png")]
    assert files and all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


def test_the_face_network_gives_the_courses_numbers():
    from test_unet_face import REFERENCE, fill

    from diffusion import ddim, schedule, timesteps
    from diffusion import run as sample
    from p2_ddim import make_eps_model
    from UNet import UNet

    reference = {k: torch.from_numpy(v) for k, v in np.load(REFERENCE).items()}
    device = pick_device("cuda")
    eps_model = make_eps_model(fill(UNet()).eval(), device, torch.float32)
    x = sample(ddim(eps_model, reference["x"][:1].to(device), schedule(), timesteps(1000, 50, "course")))
    assert (x.cpu() - reference["ddim50"]).abs().max() < 2e-3


def test_stable_diffusion_in_fp16_draws_what_the_cpu_draws_in_float32():
    drawn = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.float16)):
        model = p3_model.load_stable_diffusion(CHECKPOINTS / "tiny.ckpt", torch.device(device), dtype)
        drawn.append(p3_model.generate(model, "a rocket, in the style of Noto", range(2)).float())
    assert (drawn[0] - drawn[1]).abs().mean() < 4 and drawn[0].std() > 10  # of 255


def test_a_step_of_textual_inversion_in_fp16_scales_its_loss_and_moves_the_vectors(tmp_path):
    from p3_concepts import read_concepts

    device = torch.device("cuda")
    model = p3_model.load_stable_diffusion(CHECKPOINTS / "tiny.ckpt", device, torch.float16)
    concept = read_concepts(TINY / "input.json")[0]
    recipe = Recipe(batch=2, size=p3_model.own_size(model))
    inversion = Inversion(model, p3_model.learned_tokens(model), concept, recipe, tmp_path)
    assert inversion.scaler.is_enabled()
    before, moments = inversion.vectors.detach().clone(), torch.ones(2, 2, 4, 16, 16, device=device)
    loss = inversion.optimize(Examples(moments, moments[:1], [["a photo of {}"]] * 2), 0)
    assert np.isfinite(loss) and inversion.vectors.isfinite().all() and not torch.equal(inversion.vectors, before)


@pytest.mark.parametrize("precision", ["auto", "fp16"])
@pytest.mark.parametrize("script", ["p1_train.py", "p2_train.py", "p4_train.py", "p3_train.py"])
def test_a_training_takes_a_step_and_goes_on_on_the_cpu(script, precision, tmp_path):
    from test_devices import SMALL, STEPS, TRAININGS, TWO_STEPS, write_data

    data = write_data(tmp_path / "data")
    if script == "p3_train.py":
        options = ["--device", "cuda", "--precision", precision]
        run(script, "--data", data / "emoji", "--out", tmp_path / "out", *STEPS, *options, *TWO_STEPS)
        assert (tmp_path / "out/model.ckpt").is_file()
        return
    options, folder = TRAININGS[script]
    line = [script, "--data", data / folder, "--out", tmp_path / "out", *options, *SMALL, "--steps", 4]
    run(*line, "--precision", precision, "--device", "cuda", "--max-epochs", 1)
    assert "step 4 of 4" in run(*line, "--device", "cpu")


def test_the_moving_average_is_on_the_gpu_before_the_module_is():
    pl = pytest.importorskip("pytorch_lightning")
    from train_common import MovingAverage

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(2, 2)

    average = MovingAverage(argparse.Namespace(device=torch.device("cuda"), ema=0.9, warmup=0))
    average.setup(None, Module(), "fit")
    assert {p.device.type for p in average._average_model.parameters()} == {"cuda"}
