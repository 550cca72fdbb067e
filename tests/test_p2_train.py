"""p2_train.py in small: it learns, resumes where it stopped, and its checkpoint draws pictures in p2_ddim.py."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("pytorch_lightning", reason="training needs requirements-dev")

import p2_ddim
import p2_train
from UNet import load_unet

SMALL = ["--size", 32, "--channel", 4, "--steps", 16, "--epoch-steps", 8, "--batch-size", 8, "--lr", 2e-3]
SMALL += ["--warmup", 4, "--ema", 0.5, 0.8, "--precision", "fp32", "--device", "cpu"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """60 pictures of one brightness each: what the network has to learn is the same everywhere in a picture."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for i in range(60):
        Image.new("RGB", (32, 40), tuple(random.integers(0, 256, 3).tolist())).save(folder / f"{i:05d}.png")
    return folder


def train(*args):
    p2_train.main([str(a) for a in args])


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    train("--data", photos, "--out", out, *SMALL)
    return out


def losses(out, name):
    (path,) = (out / "csv").rglob("metrics.csv")
    with open(path, newline="") as f:
        return [float(row[name]) for row in csv.DictReader(f) if row.get(name)]


def test_the_loss_falls(trained):
    for name in ("val_loss_0.5", "val_loss_0.8"):
        values = losses(trained, name)
        assert len(values) == 2
        assert values[1] < values[0]


def test_the_average_with_the_lowest_loss_of_all_is_kept(trained):
    of_decay = {decay: losses(trained, f"val_loss_{decay}") for decay in (0.5, 0.8)}
    metrics = torch.load(trained / "best.pt", weights_only=False)["metrics"]
    assert metrics["val_loss"] == pytest.approx(min(map(min, of_decay.values())), rel=1e-5)
    assert metrics["val_loss"] == pytest.approx(min(of_decay[metrics["ema"]]), rel=1e-5)


def test_a_stopped_training_resumes_to_the_same_weights(photos, trained, tmp_path):
    train("--data", photos, "--out", tmp_path, *SMALL, "--max-epochs", 1)
    assert torch.load(tmp_path / "last.ckpt", weights_only=False)["global_step"] == 8
    train("--data", photos, "--out", tmp_path, *SMALL)
    once, twice = (torch.load(out / "best.pt", weights_only=False) for out in (trained, tmp_path))
    assert once["step"] == twice["step"] == 16
    for key, value in once["state_dict"].items():
        assert torch.allclose(value.float(), twice["state_dict"][key].float(), atol=2e-3), key
    assert once["metrics"] == pytest.approx(twice["metrics"], abs=1e-4)


def test_start_goes_on_from_the_weights_of_another_objective(photos, trained, tmp_path):
    options = ["--start", trained / "best.pt", "--channel", 8, "--objective", "eps"]
    train("--data", photos, "--out", tmp_path, *SMALL, *options, "--steps", 1, "--epoch-steps", 1, "--lr", 1e-9)
    before, after = (torch.load(out / "best.pt", weights_only=False) for out in (trained, tmp_path))
    assert (before["config"]["objective"], after["config"]["objective"]) == ("v", "eps")
    assert before["config"]["channel"] == after["config"]["channel"] == 4
    for key, value in before["state_dict"].items():
        assert torch.allclose(value.float(), after["state_dict"][key].float(), atol=1e-4), key


def test_start_grows_to_another_multiplier(photos, trained, tmp_path):
    options = ["--start", trained / "best.pt", "--multiplier", 1, 1, 3, 3, 4, 4]
    train("--data", photos, "--out", tmp_path, *SMALL, *options)
    grown = load_unet(tmp_path / "best.pt")
    assert (grown.channel, grown.channel_multiplier) == (4, (1, 1, 3, 3, 4, 4))
    assert losses(tmp_path, "val_loss_0.5")[0] < 1.1 * losses(trained, "val_loss_0.5")[-1]


def test_guide_teaches_the_guided_prediction(photos, trained, tmp_path, capsys):
    """Of a network and of one a little worse: the loss is 0 without guidance, and falls towards what is learned.
    Another guide does not go on with it."""
    other = torch.load(trained / "best.pt", weights_only=False)
    for value in other["state_dict"].values():
        value.mul_(0.95)
    torch.save(other, tmp_path / "worse.pt")
    options = ["--data", photos, *SMALL, "--start", trained / "best.pt", "--guide", tmp_path / "worse.pt"]
    options += ["--perturb", 0]
    train(*options, "--out", tmp_path / "none", "--guide-scale", 1, "--steps", 1, "--epoch-steps", 1, "--lr", 1e-9)
    assert losses(tmp_path / "none", "val_loss_0.5") == [pytest.approx(0, abs=1e-9)]
    train(*options, "--out", tmp_path / "run", "--guide-scale", 4)
    first, last = losses(tmp_path / "run", "val_loss_0.5")
    assert last < first

    good, worse, student = (
        load_unet(path) for path in (trained / "best.pt", tmp_path / "worse.pt", tmp_path / "run/best.pt")
    )
    x_t, t = torch.randn(16, 3, 32, 32), torch.arange(16) * 60
    with torch.no_grad():
        target = worse(x_t, t) + 4 * (good(x_t, t) - worse(x_t, t))
        assert (student(x_t, t) - target).square().mean() < (good(x_t, t) - target).square().mean()

    other["state_dict"]["out.2.bias"] += 1
    torch.save(other, tmp_path / "worse.pt")
    with pytest.raises(SystemExit):
        train(*options, "--out", tmp_path / "run", "--guide-scale", 4)
    assert "run/last.ckpt: of a training with another config" in capsys.readouterr().err


def test_a_guide_that_predicts_something_else_is_one_line(photos, trained, tmp_path, capsys):
    other = torch.load(trained / "best.pt", weights_only=False)
    other["config"]["objective"] = "eps"
    torch.save(other, tmp_path / "eps.pt")
    options = ["--start", trained / "best.pt", "--guide", tmp_path / "eps.pt"]
    with pytest.raises(SystemExit) as stop:
        train("--data", photos, "--out", tmp_path / "run", *options)
    assert stop.value.code == 2
    assert "eps.pt: predicts eps, not v" in capsys.readouterr().err.splitlines()[-1]


def test_the_checkpoint_draws_pictures_and_is_half_precision_but_for_the_time(trained, tmp_path):
    state_dict = torch.load(trained / "best.pt", weights_only=False)["state_dict"]
    assert {k for k, v in state_dict.items() if v.dtype != torch.float16} == {"time.0.inv_freq"}
    p2_ddim.main(["--make-noise", str(tmp_path / "noise"), "--count", "2", "--size", "32"])
    p2_ddim.main([str(tmp_path / "noise"), str(tmp_path / "out"), str(trained / "best.pt"), "--steps", "10"])
    assert Image.open(tmp_path / "out" / "01.png").size == (32, 32)
    assert Image.open(trained / "samples" / "0000016.png").size == (8 * 34 + 2, 2 * 34 + 2)


def test_photos_are_cropped_scaled_and_a_fixed_few_are_held_back(photos):
    a, held_back = p2_train.read_faces(photos, 32)
    assert a.shape[1:] == (3, 32, 32) and a.dtype == torch.uint8
    assert len(a) + len(held_back) == 60 and 1 <= len(held_back) <= 6
    b, _ = p2_train.read_faces(photos, 32)
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--size", "48"], "--size: take a multiple of 32"),
        (["--channel", "30"], "--channel: channel 30"),
        (["--data", "/nowhere"], "/nowhere: 0 pictures"),
        (["--guide", "worse.pt"], "--guide: give the network that it is to guide"),
    ],
)
def test_bad_options_are_one_line(options, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        p2_train.main(["--out", str(tmp_path / "run"), *options])
    assert stop.value.code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_damaged_photo_is_named(photos, tmp_path, capsys):
    for path in photos.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[: 50 if path.name == "00007.png" else None])
    with pytest.raises(SystemExit) as stop:
        train("--data", tmp_path, "--out", tmp_path / "run", *SMALL)
    assert stop.value.code == 2
    assert "00007.png: not a readable picture" in capsys.readouterr().err.splitlines()[-1]
