"""Every command and every training on an accelerator, or rather on a pretend one: pretend.py says what that sees."""

import inspect
import json
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_digits import write_domain

from utils import torch_version

if torch_version() < (2, 5):
    pytest.skip("the pretend accelerator needs torch 2.5 or newer", allow_module_level=True)

from pretend import Pretend

CHECKPOINTS, TINY = ROOT / "checkpoints", ROOT / "tiny/textual_inversion"
PRETEND = "pretend:0"


@pytest.fixture(autouse=True)
def weights_come_with_the_model(monkeypatch):
    """ldm puts weights on the device one by one, by `parameter.data =`, which the pretend device cannot; here they come
    to the CPU, and with the whole model to the device."""
    from ldm import checkpoint

    import p3_model  # noqa: F401  (it puts ldm on the path)

    real = checkpoint.load_weights
    monkeypatch.setattr(
        checkpoint, "load_weights", lambda model, stored, path, device, dtype: real(model, stored, path, "cpu", dtype)
    )


def run(script, device, *options):
    """main() of a script, with --device; gives the Pretend that counted."""
    path = ROOT / script
    sys.path.insert(0, str(path.parent))
    main = runpy.run_path(str(path), run_name=path.stem)["main"]
    argv = [*map(str, options), "--device", device]
    before, sys.argv = sys.argv, [script, *argv]
    try:
        with Pretend() as counted:
            assert not (main(argv) if inspect.signature(main).parameters else main())
    finally:
        sys.argv = before
        sys.path.remove(str(path.parent))
    return counted


def contents(folder):
    """{name: pixels} of every picture, and {name: text} of every csv and JSON, below a folder."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".")]
    pictures = {str(p.relative_to(folder)): np.asarray(Image.open(p)).astype(int) for p in files if p.suffix == ".png"}
    return pictures, {str(p.relative_to(folder)): p.read_text() for p in files if p.suffix in (".csv", ".json")}


# ------------------------------------------------------------------------ the commands


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """What the commands take: noises, digits, a JSON with two prompts, and pictures for the grader of Problem 3."""
    folder = tmp_path_factory.mktemp("devices")
    (folder / "noise").mkdir()
    for i in range(2):
        noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(i))
        torch.save(noise, folder / f"noise/{i:02}.pt")
    write_domain(folder / "svhn", count=20)
    task = json.loads((TINY / "input.json").read_text())
    for key, entry in task.items():
        for name in ("prompt", "prompt_4_clip_eval", "baseline"):
            entry[name] = entry[name][:1]
        entry["validation_prompts"] = dict(list(entry["validation_prompts"].items())[:1])
        (folder / "graded" / key / "0").mkdir(parents=True)
        for i in range(25):
            shutil.copy(next((TINY / key).glob("*.*g")), folder / f"graded/{key}/0/{i}.png")
    (folder / "input.json").write_text(json.dumps(task))
    (folder / "clip/val").mkdir(parents=True)
    shutil.copy(ROOT / "tiny/clip_zeroshot/id2label.json", folder / "clip")
    for path in sorted((ROOT / "tiny/clip_zeroshot/val").glob("*.png"))[:4]:
        shutil.copy(path, folder / "clip/val")
    for domain in ("mnistm", "svhn"):
        (folder / "digits" / domain).mkdir(parents=True)
        for i in range(10):
            shutil.copy(folder / f"svhn/data/{i:05}.png", folder / f"digits/{domain}/{i}_001.png")
    return folder


FP32 = ["--precision", "fp32"]
COMMANDS = {
    "p1_infer.py dpm++": lambda w, o: [o, "--num-per-digit", 1, "--steps", 3, *FP32],
    "p1_infer.py ddpm": lambda w, o: [o, "--num-per-digit", 1, "--steps", 3, "--sampler", "ddpm", *FP32],
    "p1_infer.py strips": lambda w, o: ["--trajectory", o / "x.png", "--steps", 3, "--interval", 0, 1000, *FP32],
    "p2_ddim.py": lambda w, o: [
        *(w / "noise", o, CHECKPOINTS / "p2_faces.pt", "--eta", 0.5, "--steps", 4),
        *("--interpolate", "slerp", "--grid", o / "row.png", *FP32),
    ],
    "p3_infer.py": lambda w, o: [
        *(w / "input.json", o, CHECKPOINTS / "tiny.ckpt", "--embeddings", TINY / "embeddings"),
        *("--images", 2, "--steps", 8, *FP32),
    ],
    "stable-diffusion/scripts/txt2img.py": lambda w, o: [
        *("--prompt", "a rocket", "--outdir", o, "--ckpt", CHECKPOINTS / "tiny.ckpt", "--H", 64, "--W", 64, "--f", 4),
        *("--n_iter", 1, "--n_samples", 2, "--ddim_steps", 4, "--ddim_eta", 0.5, "--precision", "full"),
    ],
    "p3_clip_zeroshot.py": lambda w, o: ["--data", w / "clip", "--model", CHECKPOINTS / "tiny_clip.pt", "--out", o],
    "p4_infer.py": lambda w, o: [w / "svhn/data", o / "digits.csv", "--target", "svhn"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_makes_the_same_on_the_device_as_on_the_cpu(command, work, tmp_path):
    for device in ("cpu", PRETEND):
        (tmp_path / device).mkdir()
        run(command.split()[0], device, *COMMANDS[command](work, tmp_path / device))
    (pictures, texts), (others, other_texts) = contents(tmp_path / "cpu"), contents(tmp_path / PRETEND)
    assert set(pictures) == set(others) and set(texts) == set(other_texts) and (pictures or texts)
    for name, picture in pictures.items():
        assert abs(picture - others[name]).max() <= 1, name
    for name in texts:
        if name.endswith(".csv"):
            assert texts[name] == other_texts[name]


@pytest.mark.parametrize("grader", ["digit_classifier.py", "evaluation/grade_hw2_3.py"])
def test_a_grader_says_the_same_on_the_device_as_on_the_cpu(grader, work, capsys):
    options = {
        "digit_classifier.py": ["--folder", work / "digits", "--svhn-checkpoint", CHECKPOINTS / "svhn_classifier.pth"],
        "evaluation/grade_hw2_3.py": [
            *("--json_path", work / "input.json", "--input_dir", TINY, "--output_dir", work / "graded"),
            *("--clip", CHECKPOINTS / "tiny_clip.pt"),
        ],
    }[grader]
    said = [(run(grader, device, *options), capsys.readouterr().out)[1] for device in ("cpu", PRETEND)]
    assert said[0] == said[1] and said[0]


def test_hw2_1_reads_nothing_back_but_its_pictures(tmp_path):
    """1,000 digits in 10 batches of 16 steps."""
    from p1_model import DigitUNet
    from utils import half, save_checkpoint

    config = {"channels": 16, "deep": 64, "T": 1000, "schedule": "cosine", "objective": "v", "min_snr": 5.0}
    save_checkpoint({"state_dict": half(DigitUNet(16, 64).state_dict()), "config": config}, tmp_path / "unet.pt")
    counted = run("p1_infer.py", PRETEND, tmp_path / "out", "--checkpoint", tmp_path / "unet.pt")
    assert counted.reads <= 1  # the first one asks whether the device computes at all
    assert counted.downloads == 10
