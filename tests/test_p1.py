"""Problem 1: the network, what hw2_1.sh writes, and a training that learns, stops and resumes."""

import csv
import functools
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, script
from PIL import Image
from test_digits import write_domain
from test_ldm_checkpoint import Runs

from classifiers import LeNet, load_classifier, predict
from p1_model import NO_DIGIT, DigitUNet, load_digit_unet
from utils import half, load_checkpoint, save_checkpoint

CONFIG = {"channels": 16, "deep": 64, "T": 1000, "schedule": "cosine", "objective": "v", "min_snr": 5.0}


def read(folder):
    return {str(p.relative_to(folder)): np.asarray(Image.open(p)).astype(int) for p in sorted(folder.rglob("*.png"))}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small untrained network whose output is not zero, so that noise, digit and domain all matter."""
    torch.manual_seed(0)
    model = DigitUNet(CONFIG["channels"], CONFIG["deep"])
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05) if p.abs().sum() == 0 else None
    path = tmp_path_factory.mktemp("p1") / "unet.pt"
    save_checkpoint({"state_dict": half(model.state_dict()), "config": CONFIG, "step": 0, "metrics": {}}, path)
    return path


# ------------------------------------------------------------------------ the network


def test_output_depends_on_every_input(checkpoint):
    model, _ = load_digit_unet(checkpoint)
    x, t, digit, domain = torch.randn(1, 3, 28, 28), torch.tensor([300]), torch.tensor([4]), torch.tensor([0])
    with torch.no_grad():
        out = model(x, t, digit, domain)
        assert out.shape == x.shape and out.dtype == torch.float32
        for changed in (
            (x + 0.1, t, digit, domain),
            (x, t + 100, digit, domain),
            (x, t, digit + 1, domain),
            (x, t, torch.tensor([NO_DIGIT]), domain),
            (x, t, digit, domain + 1),
        ):
            assert (model(*changed) - out).abs().max() > 1e-4


def test_a_new_network_predicts_zero():
    t, digit, domain = torch.tensor([0, 999]), torch.tensor([0, NO_DIGIT]), torch.tensor([0, 1])
    out = DigitUNet(16, 64)(torch.randn(2, 3, 28, 28), t, digit, domain)
    assert out.abs().max() == 0


# ------------------------------------------------------------------------ p1_infer.py


def test_the_graders_layout(checkpoint, tmp_path):
    done = script("p1_infer.py", tmp_path / "out", "--checkpoint", checkpoint, "--steps", 1, "--guidance", 1)
    pictures = read(tmp_path / "out")
    expected = {f"{d}/{digit}_{n:03d}.png" for d in ("mnistm", "svhn") for digit in range(10) for n in range(1, 51)}
    assert set(pictures) == expected and {p.shape for p in pictures.values()} == {(28, 28, 3)}
    assert "wrote 1000 images in" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("sampler", ["dpm++", "ddpm"])
def test_batch_size_and_count_do_not_change_a_picture(checkpoint, tmp_path, sampler):
    options = ["--checkpoint", checkpoint, "--steps", 3, "--sampler", sampler, "--precision", "fp32"]
    script("p1_infer.py", tmp_path / "a", *options, "--num-per-digit", 2, "--batch-size", 40)
    script("p1_infer.py", tmp_path / "b", *options, "--num-per-digit", 2, "--batch-size", 7)
    script("p1_infer.py", tmp_path / "c", *options, "--num-per-digit", 1)
    a, b, c = (read(tmp_path / name) for name in "abc")
    assert set(a) == set(b) and set(c) < set(a)
    assert max(abs(a[k] - b[k]).max() for k in a) <= 1 and max(abs(a[k] - c[k]).max() for k in c) <= 1


def test_each_domain_is_guided_with_its_own_scale(checkpoint, tmp_path):
    options = ["--checkpoint", checkpoint, "--steps", 3, "--num-per-digit", 1, "--interval", 0, 1000]
    for name, scales in {"low": "1.5", "high": "6", "each": "6/1.5"}.items():
        script("p1_infer.py", tmp_path / name, *options, "--guidance", scales)
    low, high, each = (read(tmp_path / name) for name in ("low", "high", "each"))
    assert any(np.any(low[k] != high[k]) for k in low if k.startswith("svhn"))
    for k, picture in each.items():
        assert np.array_equal(picture, (high if k.startswith("mnistm") else low)[k])


@pytest.mark.parametrize("options", [[], ["--fast"]])
def test_hw2_1_gives_the_same_bytes_every_time(tmp_path, options):
    if not (ROOT / "checkpoints/p1_unet.pt").is_file():
        pytest.skip("checkpoints/p1_unet.pt is not there; bash hw2_download_ckpt.sh")
    outputs = []
    for name in "ab":
        script("hw2_1.sh", tmp_path / name, "--num-per-digit", 5, *options)
        outputs.append({p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*.png")})
    assert outputs[0] == outputs[1] and len(outputs[0]) == 100
    judges = {d: load_classifier(ROOT / f"checkpoints/{d}_classifier.pth") for d in ("mnistm", "svhn")}
    for domain, judge in judges.items():  # the table in README.md has the accuracies; this catches a wreck
        files = sorted((tmp_path / "a" / domain).iterdir())
        images = torch.from_numpy(np.stack([np.asarray(Image.open(f)) for f in files])).permute(0, 3, 1, 2)
        assert (predict(judge, images) == torch.tensor([int(f.name[0]) for f in files])).float().mean() > 0.9


def test_grids_and_trajectory_are_written(checkpoint, tmp_path):
    sheets = ["--grid", tmp_path / "g.png", "--trajectory", tmp_path / "t.png"]
    script("p1_infer.py", "--checkpoint", checkpoint, "--steps", 6, *sheets)
    pictures = read(tmp_path)
    assert set(pictures) == {"g_mnistm.png", "g_svhn.png", "t.png"}
    assert pictures["g_svhn.png"].shape == (582, 582, 3) and pictures["t.png"].shape == (118, 350, 3)
    assert not np.array_equal(pictures["g_mnistm.png"], pictures["g_svhn.png"])


def test_bad_checkpoints_are_one_line_and_exit_code_2(checkpoint, tmp_path):
    whole = checkpoint.read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"state_dict": {}, "config": Runs(os.system, "touch pwned")}, tmp_path / "evil.pt")
    torch.save({"state_dict": LeNet().state_dict()}, tmp_path / "other.pt")
    damaged = load_checkpoint(checkpoint)
    del damaged["state_dict"]["stem.weight"]
    torch.save(damaged, tmp_path / "lacks.pt")
    for name, message in {
        "gone.pt": "no such checkpoint",
        "cut.pt": "damaged",
        "evil.pt": "would run code",
        "other.pt": "not a checkpoint of p1_train.py",
        "lacks.pt": "lacks the key stem.weight",
    }.items():
        done = script("p1_infer.py", tmp_path / "out", "--checkpoint", tmp_path / name, code=2, cwd=tmp_path)
        error = [line for line in done.stderr.splitlines() if line]
        assert len(error) == 1 and name in error[0] and message in error[0]
    assert not (tmp_path / "out").exists() and not (tmp_path / "pwned").exists()


def test_an_unwritable_output_folder_is_one_line(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    done = script("p1_infer.py", tmp_path / "file/out", "--checkpoint", checkpoint, code=2)
    assert "cannot write there" in done.stderr and len(done.stderr.splitlines()) == 1


def test_hw2_1_without_a_folder_shows_its_usage():
    assert "usage: bash hw2_1.sh OUTPUT_FOLDER" in script("hw2_1.sh", code=2).stderr


# ------------------------------------------------------------------------ p1_train.py


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Small domains, and options of a training that takes seconds."""
    folder = tmp_path_factory.mktemp("tiny")
    for seed, name in enumerate(("mnistm", "svhn")):
        write_domain(folder / name, count=200, seed=seed, flat=True)
    torch.manual_seed(0)
    save_checkpoint({"state_dict": LeNet().state_dict()}, folder / "lenet.pth")
    judge = folder / "lenet.pth"
    return [
        "--data",
        folder,
        "--classifiers",
        judge,
        judge,
        "--channels",
        16,
        "--deep",
        64,
        "--batch-size",
        16,
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--ema",
        0.5,
        0.8,
        "--warmup",
        2,
    ]


def losses(run, column):
    with open(run / "csv/version_0/metrics.csv") as f:
        return [float(row[column]) for row in csv.DictReader(f) if row[column]]


def test_a_resumed_training_equals_an_uninterrupted_one(tiny, tmp_path):
    pytest.importorskip("pytorch_lightning")
    options = [*tiny, "--epoch-steps", 3, "--lr", 1e-3]
    script("p1_train.py", *options, "--out", tmp_path / "whole", "--steps", 9)
    script("p1_train.py", *options, "--out", tmp_path / "parts", "--steps", 9, "--max-epochs", 2)
    assert load_checkpoint(tmp_path / "parts/last.ckpt")["global_step"] == 6
    done = script("p1_train.py", *options, "--out", tmp_path / "parts", "--steps", 9)
    assert "step 9 of 9; wrote" in done.stdout
    a, b = (load_checkpoint(tmp_path / run / "last.ckpt") for run in ("whole", "parts"))
    assert a["global_step"] == b["global_step"] == 9
    assert all(torch.equal(a["state_dict"][k], b["state_dict"][k]) for k in a["state_dict"])
    images = [(tmp_path / run / "samples/0000009.png").read_bytes() for run in ("whole", "parts")]
    assert images[0] == images[1]


def test_ctrl_c_says_where_the_same_line_goes_on(tiny, tmp_path):
    pytest.importorskip("pytorch_lightning")
    command = [sys.executable, ROOT / "p1_train.py", *tiny, "--out", tmp_path, "--steps", 9000, "--epoch-steps", 3]
    heeds_ctrl_c = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # background jobs do not
    options = {"stderr": subprocess.PIPE, "text": True, "preexec_fn": heeds_ctrl_c}
    with subprocess.Popen(list(map(str, command)), **options) as running:
        while not (tmp_path / "last.ckpt").is_file() and running.poll() is None:
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        _, error = running.communicate()
    assert running.returncode == 130 and "Traceback" not in error
    assert error.strip().splitlines()[-1] == f"interrupted; the same line goes on from {tmp_path}/last.ckpt"


def test_a_short_training_lowers_the_loss_of_both_domains(tiny, tmp_path):
    pytest.importorskip("pytorch_lightning")
    script("p1_train.py", *tiny, "--out", tmp_path, "--steps", 120, "--epoch-steps", 40, "--lr", 4e-3)
    for domain in ("mnistm", "svhn"):
        first, *_, last = losses(tmp_path, f"val_loss_0.5_{domain}")
        assert last < 0.9 * first
    saved = load_checkpoint(tmp_path / "best.pt")
    assert {"state_dict", "config", "step", "metrics"} <= set(saved) and 0 <= saved["metrics"]["accuracy"] <= 1
    lowest = min(losses(tmp_path, "val_loss_0.5") + losses(tmp_path, "val_loss_0.8"))
    assert saved["metrics"]["val_loss"] == pytest.approx(lowest, rel=1e-5)
    script("p1_infer.py", tmp_path / "out", "--checkpoint", tmp_path / "best.pt", "--num-per-digit", 1, "--steps", 2)
    assert len(read(tmp_path / "out")) == 20


def test_a_few_step_network_is_not_trained_as_a_whole_one(tiny, tmp_path):
    pytest.importorskip("pytorch_lightning")
    import p1_train

    with pytest.raises(SystemExit):
        options = *tiny, "--start", ROOT / "checkpoints/p1_student.pt", "--out", tmp_path / "run"
        p1_train.main(list(map(str, options)))
    assert not (tmp_path / "run").exists()


def test_a_training_goes_on_from_a_checkpoint_and_its_config(checkpoint, tiny, tmp_path):
    pytest.importorskip("pytorch_lightning")
    options = [*tiny, "--start", checkpoint, "--channels", 32, "--steps", 1, "--epoch-steps", 1, "--lr", 1e-9]
    script("p1_train.py", *options, "--out", tmp_path)
    before, after = load_checkpoint(checkpoint), load_checkpoint(tmp_path / "best.pt")
    assert after["config"]["channels"] == 16
    for key, value in before["state_dict"].items():
        assert torch.allclose(value.float(), after["state_dict"][key].float(), atol=1e-4), key


RECORDING = """
import sys
sys.path.insert(0, {root!r})
import torch
import p1_train

class Recording(p1_train.DigitDiffusion):
    def on_train_start(self):
        self.seen, self.noise = [], []

    def training_step(self, batch, i):
        self.seen += [int(x) for x in batch[0].flatten(1).long().sum(1)]
        self.noise.append(torch.get_rng_state())  # what the step draws times and noise from
        return super().training_step(batch, i)

    def on_train_end(self):
        saved = {{"seen": self.seen, "noise": self.noise, "weights": self.state_dict()}}
        torch.save(saved, {out!r} + f"/rank{{self.global_rank}}.pt")

p1_train.DigitDiffusion = Recording
p1_train.main(sys.argv[1:])
"""


def test_two_processes_train_one_network_on_different_pictures_and_noise(tiny, tmp_path):
    pytest.importorskip("pytorch_lightning")
    (tmp_path / "recording.py").write_text(RECORDING.format(root=str(ROOT), out=str(tmp_path)))
    steps = ["--out", tmp_path, "--steps", 3, "--epoch-steps", 3, "--devices", 2]
    command = [sys.executable, tmp_path / "recording.py", *tiny, *steps]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr
    assert "MEMBER: 2/2" in done.stdout + done.stderr and done.stdout.count("step 3 of 3; wrote") == 1
    assert load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 3
    a, b = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert a["weights"] and all(torch.equal(v, b["weights"][k]) for k, v in a["weights"].items())
    assert len(a["seen"]) == len(b["seen"]) == 3 * 16 and sorted(a["seen"]) != sorted(b["seen"])
    assert not any(torch.equal(x, y) for x, y in zip(a["noise"], b["noise"]))


def test_a_training_without_data_is_one_line(tmp_path):
    pytest.importorskip("pytorch_lightning")
    done = script("p1_train.py", "--data", tmp_path / "nowhere", "--out", tmp_path / "run", code=2)
    assert "nowhere/mnistm/train.csv: not found" in done.stderr and len(done.stderr.strip().splitlines()) == 1
