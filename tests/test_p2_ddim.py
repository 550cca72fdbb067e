"""p2_ddim.py and hw2_2.sh on a tiny network: the pictures, the sheets, repeatability, and one line for bad input."""

import errno
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import p2_ddim
import utils
from diffusion import ddim, schedule, slerp, time_batch, timesteps
from diffusion import run as sample
from UNet import UNet
from utils import torch_version

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    """A network of 0.1 M parameters, whose last layers are not zero as at the start of a training."""
    torch.manual_seed(0)
    model = UNet(channel=4)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.7 * parameter[0].numel() ** -0.5)
    model.out[2].weight.data *= 0.1  # or else rounding errors would grow from step to step
    path = tmp_path_factory.mktemp("unet") / "unet.pt"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noise")
    assert run("--make-noise", folder, "--count", 4, "--size", 32) == 0
    return folder


def run(*args):
    return p2_ddim.main([str(a) for a in args])


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_a_picture_is_the_final_x_stretched_to_its_own_range(unet, noise, tmp_path):
    run(noise, tmp_path, unet)
    x_T = torch.load(noise / "02.pt")
    model = p2_ddim.load_unet(unet)
    x = sample(ddim(lambda x, t: model(x, time_batch(x, t)), x_T, schedule(), timesteps(1000, 50, "course")))
    x = x[0].double().permute(1, 2, 0).numpy()
    expected = np.floor((x - x.min()) / (x.max() - x.min()) * 255 + 0.5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00.png", "01.png", "02.png", "03.png"]
    assert pixels(tmp_path / "02.png").shape == (32, 32, 3)
    assert np.abs(pixels(tmp_path / "02.png") - expected).max() <= 1


def test_hw2_2_writes_the_same_bytes_every_time(unet, noise, tmp_path):
    path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    for out in ("a", "b"):
        command = ["bash", ROOT / "hw2_2.sh", noise, tmp_path / out, unet, "--steps", "10"]
        subprocess.run([str(c) for c in command], check=True, cwd=tmp_path, env={**os.environ, "PATH": path})
    for name in ("00.png", "01.png", "02.png", "03.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("eta", [0, 1])
def test_batch_size_does_not_change_a_picture(unet, noise, tmp_path, eta):
    run(noise, tmp_path / "all", unet, "--eta", eta, "--steps", 10)
    run(noise, tmp_path / "one", unet, "--eta", eta, "--steps", 10, "--batch-size", 1)
    run(noise, tmp_path / "three", unet, "--eta", eta, "--steps", 10, "--batch-size", 3)
    for name in ("00.png", "01.png", "02.png", "03.png"):
        for other in ("one", "three"):
            assert np.abs(pixels(tmp_path / "all" / name) - pixels(tmp_path / other / name)).max() <= 1


def test_what_the_steps_add_is_independent_of_the_noise_that_make_noise_wrote(unet, tmp_path, monkeypatch):
    assert p2_ddim.main(["--make-noise", str(tmp_path), "--count", "2", "--size", "32"]) == 0
    drawn = []

    def draw_twice(eps_model, x, alpha_bar, times, eta, noise):
        drawn.extend([noise(), noise()])
        yield 0, x, x

    monkeypatch.setattr(p2_ddim, "ddim", draw_twice)
    run(tmp_path, tmp_path / "out", unet, "--eta", 0.25, "--seed", 0)
    begun = torch.cat([utils.load_checkpoint(tmp_path / f"{i:02d}.pt") for i in range(2)])
    assert all((z - x).abs().mean() > 1 for z in drawn for x in (begun, begun.flip(0)))


def test_the_seed_matters_only_with_eta(unet, noise, tmp_path):
    for eta, same in ((0, True), (0.5, False)):
        for seed in (0, 1):
            run(noise, tmp_path / f"{eta}{seed}", unet, "--eta", eta, "--steps", 10, "--seed", seed)
        a, b = ((tmp_path / f"{eta}{seed}" / "01.png").read_bytes() for seed in (0, 1))
        assert (a == b) is same


def test_a_folder_may_mix_sizes_shapes_and_names(unet, tmp_path):
    folder = tmp_path / "noise"
    folder.mkdir()
    big = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    torch.save(big, folder / "10.pt")
    torch.save(big[0], folder / "without batch.pt")
    torch.save(big[..., :32, :32].double(), folder / "a small one.pt")
    run(folder, tmp_path / "out", unet, "--steps", 10)
    assert pixels(tmp_path / "out" / "a small one.png").shape == (32, 32, 3)
    assert np.abs(pixels(tmp_path / "out" / "10.png") - pixels(tmp_path / "out" / "without batch.png")).max() <= 1


@pytest.mark.skipif(torch_version() < (2, 0), reason="torch before 2.0 has no bf16 on CPUs")
def test_half_precision_stays_close(unet, noise, tmp_path, capsys):
    run(noise, tmp_path / "fp32", unet, "--steps", 10)
    assert run(noise, tmp_path / "bf16", unet, "--steps", 10, "--precision", "bf16", "--gt", tmp_path / "fp32") == 0
    assert "mean squared error 0.0000" not in capsys.readouterr().out


def test_the_exit_code_tells_whether_the_mean_squared_error_is_under_20(unet, noise, tmp_path, capsys):
    run(noise, tmp_path / "gt", unet, "--steps", 10)
    assert run(noise, tmp_path / "out", unet, "--steps", 10, "--gt", tmp_path / "gt") == 0
    assert "mean squared error 0.0000, under" in capsys.readouterr().out.splitlines()[-1]
    truth = pixels(tmp_path / "gt" / "00.png")
    Image.fromarray(np.where(truth < 128, truth + 10, truth - 10).astype(np.uint8)).save(tmp_path / "gt" / "00.png")
    assert run(noise, tmp_path / "out", unet, "--steps", 10, "--gt", tmp_path / "gt") == 1  # 100 in one of four: 25
    told = json.loads((tmp_path / "out/errors.json").read_text())
    assert told["errors"]["00"] == 100 and told["mean"] == 25 and told["bound"] == 20
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "00: mean squared error 100.0000"
    assert "mean squared error 25.0000, NOT UNDER" in lines[-1]


def test_the_eta_sheet_has_five_rows_of_four_and_begins_with_the_deterministic_ones(unet, noise, tmp_path):
    run(noise, tmp_path, unet, "--steps", 10, "--eta-grid", tmp_path / "sheets" / "eta.png")
    sheet = pixels(tmp_path / "sheets" / "eta.png")
    assert sheet.shape == (5 * 34 + 2, 4 * 34 + 2, 3)
    cell = {(r, c): sheet[34 * r + 2 : 34 * r + 34, 34 * c + 2 : 34 * c + 34] for r in range(5) for c in range(4)}
    for c in range(4):
        stretched = pixels(tmp_path / f"{c:02d}.png")  # the same picture, but for its range
        assert np.corrcoef(stretched.ravel(), cell[0, c].ravel())[0, 1] > 0.999
        assert len({cell[r, c].tobytes() for r in range(5)}) == 5


@pytest.mark.parametrize("how", ["slerp", "linear"])
def test_an_interpolation_begins_and_ends_with_the_two_pictures(unet, noise, tmp_path, how):
    args = ["--steps", 10, "--interpolate", how, "--between", "03", "01", "--grid", tmp_path / "row.png"]
    run(noise, tmp_path, unet, *args)
    row = pixels(tmp_path / "row.png")
    assert row.shape == (36, 11 * 34 + 2, 3)
    for stem, left in (("03", 2), ("01", 10 * 34 + 2)):
        cell = row[2:34, left : left + 32]
        assert np.corrcoef(pixels(tmp_path / f"{stem}.png").ravel(), cell.ravel())[0, 1] > 0.999


def test_an_interpolation_tells_the_norms_of_its_noises(unet, noise, tmp_path, capsys):
    norms = {}
    for how in ("slerp", "linear"):
        run(noise, tmp_path, unet, "--steps", 10, "--interpolate", how, "--grid", tmp_path / "row.png")
        norms[how] = json.loads((tmp_path / "row.json").read_text())["norms"]
        assert f"{how}: norms {' '.join(map(str, norms[how]))}" in capsys.readouterr().out
    assert min(norms["slerp"]) > 0.95
    assert norms["linear"][5] == pytest.approx(0.71, abs=0.03) and norms["linear"][0] == 1


def test_the_middle_of_a_slerp_is_the_picture_of_the_slerped_noise(unet, noise, tmp_path):
    a, b = (torch.load(noise / f"{stem}.pt") for stem in ("00", "01"))
    run(noise, tmp_path, unet, "--steps", 10, "--interpolate", "slerp", "--grid", tmp_path / "row.png")
    model = p2_ddim.make_eps_model(p2_ddim.load_unet(unet), torch.device("cpu"), torch.float32)
    x = sample(ddim(model, slerp(a, b, 0.3), schedule(), timesteps(1000, 10, "course")))
    expected = ((x[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
    assert np.abs(pixels(tmp_path / "row.png")[2:34, 3 * 34 + 2 : 4 * 34] - expected).max() <= 1


def test_noise_files_are_standard_normal_and_the_same_bytes_every_time(noise, tmp_path):
    run("--make-noise", tmp_path, "--count", 2, "--size", 32)
    for name in ("00.pt", "01.pt"):
        assert (tmp_path / name).read_bytes() == (noise / name).read_bytes()
    run("--make-noise", tmp_path / "next", "--count", 1, "--size", 32, "--seed", 1)
    x = torch.load(noise / "01.pt")
    assert torch.equal(torch.load(tmp_path / "next" / "00.pt"), x)
    assert x.shape == (1, 3, 32, 32) and x.dtype == torch.float32
    assert abs(x.mean()) < 0.1 and abs(x.std() - 1) < 0.1


def refused(capsys, *args):
    """The one line of an error with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        run(*args)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "%|" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lambda: torch.zeros(2, 3, 32, 32), "[2, 3, 32, 32]"),
        (lambda: torch.zeros(4, 32, 32), "[4, 32, 32]"),
        (lambda: torch.zeros(3, 32, 64), "[3, 32, 64]"),
        (lambda: torch.zeros(3, 48, 48), "multiple of 32"),
        (lambda: torch.zeros(3, 0, 0), "[3, 0, 0]"),
        (lambda: torch.zeros(32), "[32]"),
        (lambda: torch.full((3, 32, 32), float("nan")), "NaN"),
        (lambda: torch.zeros(3, 32, 32, dtype=torch.int64), "not a tensor of floats"),
        (lambda: {"noise": torch.zeros(3, 32, 32)}, "not a tensor of floats"),
        (lambda: os.system, "refused"),
    ],
)
def test_a_file_that_is_no_noise_is_named_before_anything_is_written(content, says, unet, noise, tmp_path, capsys):
    folder, out = tmp_path / "noise", tmp_path / "out"
    folder.mkdir()
    (folder / "00.pt").write_bytes((noise / "00.pt").read_bytes())
    torch.save(content(), folder / "01.pt")
    line = refused(capsys, folder, out, unet)
    assert str(folder / "01.pt") in line and says in line
    assert not out.exists()


def test_missing_and_damaged_inputs_are_named(unet, noise, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert f"{empty}: no *.pt" in refused(capsys, empty, tmp_path / "out", unet)
    assert "nowhere: no *.pt" in refused(capsys, tmp_path / "nowhere", tmp_path / "out", unet)
    assert "no.pt: no such checkpoint" in refused(capsys, noise, tmp_path / "out", tmp_path / "no.pt")
    (tmp_path / "cut.pt").write_bytes(unet.read_bytes()[:5000])
    assert "cut.pt" in refused(capsys, noise, tmp_path / "out", tmp_path / "cut.pt")
    (empty / "00.pt").write_bytes(b"no noise")
    assert str(empty / "00.pt") in refused(capsys, empty, tmp_path / "out", unet)
    (tmp_path / "file").write_text("in the way")
    assert "cannot write there" in refused(capsys, noise, tmp_path / "file", unet)
    assert "00.png: no such picture" in refused(capsys, noise, tmp_path / "out", unet, "--gt", tmp_path)
    (tmp_path / "00.png").write_bytes(b"no picture")
    assert "00.png: not a readable picture" in refused(capsys, noise, tmp_path / "out", unet, "--gt", tmp_path)
    Image.new("RGB", (64, 64)).save(tmp_path / "00.png")
    assert "64x64" in refused(capsys, noise, tmp_path / "out", unet, "--gt", tmp_path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--steps", "1000"], "--steps: take a whole number, 1 to 500"),
        (["--steps", "0"], "--steps: take a whole number, 1 to 500"),
        (["--steps", "300"], "divisor"),
        (["--eta", "1.5"], "--eta: take a number, 0 to 1, not"),
        (["--interpolate", "slerp"], "go together"),
        (["--grid", "x.png"], "go together"),
        (["--interpolate", "slerp", "--grid", "x.png", "--between", "00", "77"], "77.pt"),
        (["--batch-size", "0"], "--batch-size"),
        (["--precision", "fp16", "--device", "cpu"], "fp16"),
    ],
)
def test_a_wrong_option_is_one_line(options, says, unet, noise, tmp_path, capsys):
    assert says in refused(capsys, noise, tmp_path, unet, *options)
    assert not list(tmp_path.glob("*.png"))
    assert "NOISE_DIR OUT UNET_PT" in refused(capsys, noise)


def test_a_full_disk_leaves_no_half_written_picture(unet, noise, tmp_path, capsys, monkeypatch):
    def save_half(picture, path, **_):
        path.write_bytes(b"\x89PNG")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(p2_ddim, "save_image", save_half)
    assert "No space left" in refused(capsys, noise, tmp_path, unet, "--steps", 10)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_told_not_drawn(unet, noise, tmp_path, capsys):
    state_dict = torch.load(unet)
    state_dict["out.2.bias"].fill_(float("nan"))
    torch.save(state_dict, tmp_path / "nan.pt")
    line = refused(capsys, noise, tmp_path / "out", tmp_path / "nan.pt", "--steps", 10)
    assert "nan.pt: out.2.bias has NaN" in line
    assert not (tmp_path / "out").exists()
