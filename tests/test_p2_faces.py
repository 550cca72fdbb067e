"""The faces that ship, checkpoints/p2_faces.pt: by the commands of the README, few steps, and by its loss."""

import os
import pathlib

import numpy as np
import pytest
import torch
from PIL import Image

import p2_ddim
from diffusion import schedule, training_loss
from UNet import load_unet

ROOT = pathlib.Path(__file__).resolve().parent.parent
FACES = ROOT / "checkpoints" / "p2_faces.pt"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Ten steps of eight noises, with the sheets of both interpolations."""
    folder = tmp_path_factory.mktemp("faces")
    p2_ddim.main(["--make-noise", str(folder / "noise"), "--count", "8", "--size", "64", "--seed", "0"])
    for how in ("slerp", "linear"):
        grid = ["--interpolate", how, "--grid", str(folder / f"{how}.png")]
        p2_ddim.main([str(folder / "noise"), str(folder), str(FACES), "--steps", "10", *grid])
    return folder


def pixels(path):
    return np.asarray(Image.open(path)).astype(float)


def test_the_mean_of_some_faces_is_symmetric_and_upright_as_a_face_is(drawn):
    mean = np.mean([pixels(drawn / f"{i:02d}.png") for i in range(8)], axis=0).mean(-1)[8:56, 8:56]
    mirrored, turned = (np.corrcoef(mean.ravel(), x.ravel())[0, 1] for x in (mean[:, ::-1], mean[::-1]))
    assert mirrored > 0.5 and mirrored > turned + 0.2


def test_the_faces_differ(drawn):
    faces = np.stack([pixels(drawn / f"{i:02d}.png").ravel() for i in range(8)])
    assert np.corrcoef(faces)[~np.eye(8, dtype=bool)].mean() < 0.8


def test_half_way_slerp_keeps_the_contrast_that_linear_interpolation_loses(drawn):
    middle = {how: pixels(drawn / f"{how}.png")[2:66, 2 + 5 * 66 :][:, :64].std() for how in ("slerp", "linear")}
    assert middle["linear"] < 0.9 * middle["slerp"]


@torch.no_grad()
def test_the_loss_on_faces_held_back_from_the_training():
    if "HW2_DATA" not in os.environ:
        pytest.skip("needs face photographs: set HW2_DATA to a folder with face/photos")
    pytest.importorskip("pytorch_lightning")  # the graders' versions are without it
    from p2_train import read_faces

    photos = pathlib.Path(os.environ["HW2_DATA"]) / "face" / "photos"
    if not photos.is_dir():
        pytest.skip(f"{photos}: no such folder")
    x_0 = read_faces(photos, 64)[1][:64].float() / 127.5 - 1
    draw = torch.Generator().manual_seed(0)
    t, eps = torch.arange(7, 1000, 1000 // 64)[: len(x_0)], torch.randn(x_0.shape, generator=draw)
    unet = load_unet(FACES).eval()
    loss = training_loss(unet, x_0, schedule("linear", 1000), unet.objective, t=t, eps=eps).mean()
    assert loss < 0.07
